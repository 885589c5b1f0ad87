"""Stable Preference Optimization: bilevel preference alignment of language models in JAX.

Losses (``spo_jax.losses``), bilevel solvers (``spo_jax.solvers``), the pair layout and its
log-probs, and the training step that binds them. Source: arXiv 2507.07723.
"""

__version__ = "0.1.0"

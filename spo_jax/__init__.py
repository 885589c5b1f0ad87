"""Stable Preference Optimization: bilevel preference alignment of language models in JAX.

Losses, bilevel solvers, the pair layout with its log-probs, and the training step that binds
them. Source: arXiv 2507.07723. Names below are imported when first used.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

__version__ = "0.1.0"

# Said at the first import of transformers where PyTorch is missing, as it may well be here.
_NOT_ABOUT_A_RUN = "PyTorch was not found"
logging.getLogger("transformers").addFilter(
    lambda record: not record.getMessage().startswith(_NOT_ABOUT_A_RUN)
)

_PUBLIC = {
    "spo_jax.types": (
        "BilevelBatch CompletionBatch PreferenceBatch PreferenceRow SFTBatch SFTRow Segments "
        "TrainState UnpairedRow"
    ),
    "spo_jax.losses": (
        "LOSSES UNPAIRED_LOSSES PairLogprobs UnpairedLogprobs make_preference_loss kto_loss "
        "dpo_loss cpo_loss dpop_loss rdpo_loss simpo_loss "
        "alphadpo_loss ipo_loss slic_loss token_mean_nll chosen_hinge"
    ),
    "spo_jax.solvers": (
        "SOLVERS Levels Solver SolverState make_levels make_solver make_penalty "
        "make_preference_only make_inner_only make_primal_dual make_dynamic_barrier "
        "make_projected make_random_level make_max_level make_alternating make_unrolled "
        "make_unrolled_first_order make_optimizer make_schedule"
    ),
    "spo_jax.objective": (
        "token_logprobs token_spread predictor_states scored_mask make_objective "
        "make_logprobs_fn make_head_gradients completion_logprobs loss_coefficients Objective"
    ),
    "spo_jax.models": "Model Execution load_model load_params init_model save_pretrained",
    "spo_jax.parallel": "make_mesh tree_shardings place_batch",
    "spo_jax.config": "Config load_config",
    "spo_jax.tasks": "TASKS Task",
    "spo_jax.policies": "generate repetition distinct_n",
    "spo_jax.sampling.make_pairs": "PairSettings pairs_of_samples write_pairs",
    "spo_jax.dynamics.bandit": (
        "Bandit make_shift_bandit make_bandit_levels simulate masses log_policy"
    ),
    "spo_jax.dynamics.law": ("make_exact_law make_head_law make_mass law_terms"),
    "spo_jax.training.update": "make_train_step jit_step init_state shard_state",
    "spo_jax.training.run": "train judge_start",
    "spo_jax.report": "make_report",
    "spo_jax.study": "read_study run_study read_evidence make_study_page",
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names.split()}

__all__ = [*sorted(_MODULE_OF), "__version__"]


def __getattr__(name: str) -> Any:
    # The losses must not cost the import of transformers and datasets.
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'spo_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

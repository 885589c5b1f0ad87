"""A weight for each update, the least that does not let the inner loss rise."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from spo_jax.solvers.base import Solver
from spo_jax.solvers.two_gradients import TINY, make_two_gradients

INSIDE = ("free", "hold")


def barrier_weight(
    gap: Float[Array, ""],
    product: Float[Array, ""],
    inner_norm2: Float[Array, ""],
    *,
    strength: float,
    tolerance: float,
    inside: str,
) -> Float[Array, ""]:
    """``max(0, (phi - <grad F, grad g>) / |grad g|^2)``, in the words of ``make_dynamic_barrier``.

    ``product`` is ``<grad F, grad g>`` and ``inner_norm2`` ``|grad g|^2``.
    """
    outside = gap > tolerance
    barrier = jnp.where(outside, strength * inner_norm2, 0.0)
    weight = jnp.maximum(0.0, (barrier - product) / (inner_norm2 + TINY))
    return jnp.where(outside, weight, 0.0) if inside == "free" else weight


def make_dynamic_barrier(
    *,
    outer: optax.GradientTransformation,
    strength: float = 1.0,
    tolerance: float = 0.0,
    inside: str = "free",
) -> Solver:
    """Update: the ``outer`` chain on ``grad F + w grad g`` with the least ``w >= 0`` that is safe.

    Outside the safe region (``g > tolerance``, nats per token)
    ``w = max(0, (strength |grad g|^2 - <grad F, grad g>) / |grad g|^2)``: the direction ``d``
    then has ``<grad g, d> >= strength |grad g|^2``, so a gradient step along it never raises
    the inner loss to first order. Inside, ``free`` takes ``w = 0``, the plain step; ``hold``
    takes the formula without its first term, so that the inner loss does not rise there
    either. The guarantee is about ``d``: a chain that rescales coordinates (Adam) bends it, and
    the metric ``inner_change`` says what became of it.
    Source: Gong, Liu, "Automatic and harmless regularization with constrained and
    lexicographic optimization: a dynamic barrier approach", NeurIPS 2021, with METHOD
    section 4's ``phi``.

    Metrics: ``barrier_weight`` (also as ``penalty_weight``, the weight of ``grad g``),
    ``gradient_inner_product`` and ``gradient_cosine`` of the two gradients,
    ``inner_grad_norm``, and ``inner_change``, the change of the inner loss that the update
    makes to first order (nats per token).

    Cost: one forward and two backward passes where the inner data are the chosen completions;
    one of each for the pairs and for the SFT rows where the inner level has data of its own.

    Raises:
        ValueError: a ``strength`` that is not positive, or an unknown ``inside``.
    """
    if not strength > 0:
        raise ValueError(f"strength={strength}: expected a positive number")
    if inside not in INSIDE:
        raise ValueError(f"inside={inside!r}: choose one of {', '.join(INSIDE)}")

    def weight_of(gap, product, inner_norm2):
        return barrier_weight(
            gap, product, inner_norm2, strength=strength, tolerance=tolerance, inside=inside
        )

    solver = make_two_gradients(outer, weight_of)

    def update(state, batch, levels):
        state, (aux, metrics) = solver.update(state, batch, levels)
        return state, (aux, metrics | {"barrier_weight": metrics["penalty_weight"]})

    return Solver(solver.init, update)

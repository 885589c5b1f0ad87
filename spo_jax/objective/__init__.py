"""What binds model, loss and solver: log-probs in chunks, a batch's terms, the two levels."""

from spo_jax.objective.calibration import loss_coefficients, make_head_gradients
from spo_jax.objective.levels import Objective, ObjectiveState, make_objective
from spo_jax.objective.logprobs import predictor_states, scored_mask, token_logprobs, token_spread
from spo_jax.objective.terms import (
    Denominators,
    LogprobsFn,
    Terms,
    completion_logprobs,
    make_logprobs_fn,
)

__all__ = [
    "Denominators",
    "LogprobsFn",
    "Objective",
    "ObjectiveState",
    "Terms",
    "completion_logprobs",
    "loss_coefficients",
    "make_head_gradients",
    "make_logprobs_fn",
    "make_objective",
    "predictor_states",
    "scored_mask",
    "token_logprobs",
    "token_spread",
]

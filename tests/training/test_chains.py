"""What a stage starts from."""

import numpy as np
import pytest

from spo_jax.config.schema import Config, Named
from spo_jax.losses import make_preference_loss
from spo_jax.parallel.mesh import make_mesh
from spo_jax.training.stage import inner_updates, make_stage
from tests.solvers.test_solvers import START, levels
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("solver", "options", "updates"),
    [
        ("alternating", {"inner_steps": 3}, 3),
        ("unrolled", {}, 1),
        ("inner_only", {}, 1),
        ("penalty", {"penalty_weight": 2.0}, 1),
    ],
)
def test_the_inner_schedule_is_as_long_as_its_steps(solver, options, updates):
    assert inner_updates(Named(solver, options)) == updates


def test_a_schedule_of_the_weight_is_as_long_as_the_stage():
    options = {"weight_schedule": "geometric", "initial_weight": 1.0, "penalty_weight": 100.0}
    config = Config(solver=Named("penalty", options))
    loss = make_preference_loss("dpo", beta=0.1)
    stage = make_stage(config, "preference", tiny_model(), loss, make_mesh(), steps=3)
    state, weights = stage.solver.init(START), []
    for _ in range(stage.steps):
        state, (_, metrics) = stage.solver.update(state, 0, levels())
        weights.append(float(metrics["penalty_weight"]))
    np.testing.assert_allclose(weights, [1.0, 10.0, 100.0], rtol=1e-5)

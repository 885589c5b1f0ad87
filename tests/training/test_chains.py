"""What a stage starts from."""

import pytest

from spo_jax.config.schema import Named
from spo_jax.training.stage import inner_updates


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

"""The table of docs/losses.md says what the code does."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from spo_jax.losses import (
    LOSSES,
    UNPAIRED_LOSSES,
    UnpairedLogprobs,
    alphadpo_init_statistics,
    alphadpo_update_statistics,
    hyperparameters,
    make_preference_loss,
)
from tests.losses.test_preference import HYPER, REFERENCE, pair

PAGE = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
ROWS = {
    cells[0].strip("` "): [cell.strip() for cell in cells[1:]]
    for line in PAGE.splitlines()
    if line.startswith("| `")
    for cells in [line.strip("|").split("|")]
}


def test_every_loss_has_its_row():
    assert list(ROWS) == [*LOSSES, *UNPAIRED_LOSSES]


@pytest.mark.parametrize("name", LOSSES)
def test_reference_and_what_is_held(name):
    loss = make_preference_loss(name, **HYPER[name])
    _, reference, held, *_ = ROWS[name]
    assert reference == ("yes" if loss.needs_reference else "no")

    def value(chosen, rejected):
        policy = pair(chosen, rejected)
        # What is averaged over the batch: here this pair is all of it.
        found = loss.statistic(policy, REFERENCE)[0] if loss.statistic else jnp.zeros(())
        statistics = alphadpo_update_statistics(alphadpo_init_statistics(), found, found**2 + 1)
        return jnp.sum(loss.loss(policy, REFERENCE, statistics))

    def pulls(chosen, rejected):
        return jax.grad(value, (0, 1))(jnp.float32(chosen), jnp.float32(rejected))

    # The margin is won, and the chosen one has lost 1 nat: is it raised for its own sake?
    chosen, rejected = pulls(-7.0, -409.0)
    for_its_own = chosen < -1e-3 and abs(chosen + rejected) > 1e-3
    assert held == ("yes" if for_its_own else "no"), (chosen, rejected)


def test_what_is_held_of_unpaired_rows():
    """A desirable completion below the reference is raised, however far down the others are."""
    kto = make_preference_loss("kto", beta=0.5)

    def value(completion):
        policy = UnpairedLogprobs(completion, jnp.array([True, False]))
        return jnp.sum(
            kto.loss(policy, UnpairedLogprobs(jnp.zeros(2), policy.desirable), kl=jnp.zeros(()))
        )

    assert jax.grad(value)(jnp.array([-1.0, -400.0]))[0] < -1e-3
    assert ROWS["kto"][1:3] == ["yes", "yes"]


@pytest.mark.parametrize("name", [*LOSSES, *UNPAIRED_LOSSES])
def test_settings_and_source_are_named(name):
    equation, _, _, settings, _ = ROWS[name]
    fn, _ = (LOSSES | UNPAIRED_LOSSES)[name]
    for key in hyperparameters(fn):
        known = ("beta", "label_smoothing", "gamma_beta_ratio", "tau", "length_normalized", "clip")
        assert key in known or key in equation + settings, key
    assert "arXiv" in fn.__doc__ or "METHOD" in fn.__doc__

"""An update that is not finite is not applied: whatever the solver, nothing of it stays."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spo_jax import (
    CompletionBatch,
    init_state,
    jit_step,
    make_logprobs_fn,
    make_objective,
    make_penalty,
    make_preference_loss,
    make_train_step,
)
from spo_jax.models import init_model
from spo_jax.solvers import SOLVERS
from spo_jax.solvers.base import apply_gradients
from spo_jax.training.update import _in_order
from spo_jax.types import BilevelBatch
from tests.tiny import ARCHITECTURE
from tests.training.test_solvers_on_models import KEY, PARAMS, batch_of, make_step


def poisoned(batch, level):
    """One scored token is in no vocabulary: its log-prob is not a number, as from a broken row."""
    part = getattr(batch, level)
    broken = jnp.asarray(part.completion_tokens).at[1, 0, 0].set(10**6)
    return batch._replace(**{level: part._replace(completion_tokens=broken)})


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.wide
@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_broken_row_changes_nothing_but_the_count(name, micro_batches):
    """Parameters, both optimizers, multipliers and statistics stay, bit for bit."""
    inner_data = "chosen" if name == "preference_only" else "sft"
    init, step = make_step(
        name, "alphadpo", inner_data, micro_batches=micro_batches, inner_value="reference"
    )
    step, good = jax.jit(step), batch_of(inner_data)
    assert good.preference.completion_mask[1, 0, 0]
    state, metrics = step(init(PARAMS, KEY), good)
    assert not metrics["skipped"]
    moved = jax.tree.map(lambda a, b: np.any(a != b), state.solver.params, PARAMS)
    assert all(jax.tree.leaves(moved))
    # random_level draws the outer level here, max_level goes on with the inner one.
    level = "sft" if name in ("inner_only", "max_level") else "preference"
    after, metrics = step(state, poisoned(good, level))
    assert metrics["skipped"]
    same((after.solver, after.objective), (state.solver, state.objective))
    assert int(after.step) == int(state.step) + 1
    assert np.any(after.key != state.key)
    # And the next good batch is an update like any other.
    again, metrics = step(after, good)
    assert not metrics["skipped"]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(again))
    expected, _ = step(state._replace(step=after.step, key=after.key), good)
    same(again, expected)


@pytest.mark.wide
@pytest.mark.parametrize("name", SOLVERS)
def test_the_second_update_is_the_program_of_the_first(name):
    """Its state is of the same types, weak ones too: else it would be compiled again."""
    inner_data = "chosen" if name == "preference_only" else "sft"
    init, step = make_step(name, "alphadpo", inner_data, inner_value="running_min")

    def types(state):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)

    before = jax.eval_shape(init, PARAMS, KEY)
    after, _ = jax.eval_shape(step, before, batch_of(inner_data))
    assert types(after) == types(before)


def test_infinite_parameters_after_an_inner_step_are_not_kept():
    """The inner step of an alternating update overflows; its outer gradient tells."""
    from spo_jax.losses import make_preference_loss
    from spo_jax.objective.levels import make_objective
    from spo_jax.solvers import make_alternating
    from spo_jax.training.update import init_state, make_train_step
    from tests.tiny import tiny_logprobs
    from tests.training.test_solvers_on_models import MODEL

    objective = make_objective(tiny_logprobs(MODEL), make_preference_loss("dpo", beta=0.5))
    solver = make_alternating(outer=optax.sgd(1e-3), inner=optax.sgd(1e38), inner_steps=3)
    step = jax.jit(make_train_step(objective, solver, schedule=optax.constant_schedule(1.0)))
    state = init_state(solver, objective, PARAMS, KEY)
    after, metrics = step(state, batch_of("chosen"))
    assert metrics["skipped"]
    same(after.solver, state.solver)


def test_tokens_are_those_of_both_levels():
    init, step = make_step("penalty", "dpo", "sft")
    batch = batch_of("sft")
    _, metrics = jax.jit(step)(init(PARAMS, KEY), batch)
    masks = [m for part in batch for m in (part.prompt_mask, part.completion_mask)]
    assert int(metrics["tokens"]) == sum(int(m.sum()) for m in masks)
    assert isinstance(batch, BilevelBatch)


def wide_step(chain):
    """An update of the plain loss by ``chain``; loss and gradient of it are finite."""
    from spo_jax.losses import make_preference_loss
    from spo_jax.objective.levels import make_objective
    from spo_jax.solvers import make_preference_only
    from spo_jax.training.update import init_state, make_train_step
    from tests.tiny import tiny_logprobs
    from tests.training.test_solvers_on_models import MODEL

    objective = make_objective(tiny_logprobs(MODEL), make_preference_loss("dpo", beta=0.5))
    solver = make_preference_only(outer=chain)
    step = jax.jit(make_train_step(objective, solver, schedule=optax.constant_schedule(1.0)))
    return step, init_state(solver, objective, PARAMS, KEY)


@pytest.mark.parametrize("what", ["weights", "moments"])
def test_an_update_that_overflows_behind_a_finite_gradient_is_seen(what):
    """The step is looked at itself, and what of the new state its norm does not bound."""

    def spoil(grads, state, params=None):
        if what == "weights":
            return jax.tree.map(lambda g: g * 1e38 * 1e38, grads), state
        return grads, state + jnp.inf

    chain = optax.GradientTransformation(lambda params: jnp.zeros(()), spoil)
    step, state = wide_step(chain)
    after, metrics = step(state, batch_of("chosen"))
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(metrics["grad_norm"])
    if what == "weights":  # the loop refuses the state
        assert not np.isfinite(metrics["update_norm"])
        return
    assert metrics["skipped"]
    assert metrics["moved_share"] == 0
    same(after.solver, state.solver)


def test_the_share_moved_is_among_the_metrics():
    step, state = wide_step(optax.sgd(1e-2))
    _, metrics = step(state, batch_of("chosen"))
    assert not metrics["skipped"]
    assert 0.9 < float(metrics["moved_share"]) <= 1
    still, metrics = wide_step(optax.sgd(1e-12))[0](state, batch_of("chosen"))
    assert metrics["update_norm"] > 0
    assert metrics["moved_share"] == 0
    same(still.solver.params, state.solver.params)


@pytest.mark.wide
@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "lion", "sgd"])
def test_finite_norms_bound_every_moment(name):
    """Gradients as large as float32 has them: what the two norms let through is all finite."""
    from spo_jax.solvers import all_finite, make_optimizer

    chain, _ = make_optimizer(name=name, steps=9, learning_rate=1e-3, max_grad_norm=None)
    let_through = []
    for size in (1.0, 1e10, 1e17, 1e19, 1e25, 1e38):
        grads = jax.tree.map(lambda x, s=size: s * x, PARAMS)
        params, state, metrics = apply_gradients(chain, grads, chain.init(PARAMS), PARAMS)
        if all(np.isfinite(metrics[name]) for name in ("grad_norm", "update_norm")):
            let_through.append(size)
            assert all_finite((params, state)), size
    assert let_through[:3] == [1.0, 1e10, 1e17]
    assert 1e25 not in let_through


def test_the_step_copies_nothing_of_the_state_it_is_given():
    """The new state takes its buffers; what is read after that would be copied first."""
    model = init_model({**ARCHITECTURE, "vocab_size": 32})
    objective = make_objective(make_logprobs_fn(model), make_preference_loss("dpo", beta=0.1))
    solver = make_penalty(outer=optax.adamw(1e-3))
    step = jit_step(make_train_step(objective, solver, schedule=optax.constant_schedule(1e-3)))
    state = jax.eval_shape(
        lambda key: init_state(solver, objective, model.init(key), key), jax.random.PRNGKey(0)
    )
    ids, real = jnp.ones((2, 2, 3), jnp.int32), jnp.ones((2, 2, 3), bool)
    pairs = CompletionBatch(ids[:, 0], real[:, 0], ids, real, jnp.arange(2), jnp.zeros((2, 2)))
    text = step.lower(state, BilevelBatch(pairs)).compile().as_text()
    copied = re.findall(r"copy\(%?(state_solver\w*)", text)
    assert not [name for name in copied if "embed" in name or "kernel" in name]


@pytest.mark.on_cpu
def test_behind_the_gradients_a_step_keeps_less_than_one_more_array_of_moments():
    """What AdamW's metrics and its new state both need is not written for the one and kept."""
    chain = optax.adamw(1e-3)
    params = {"kernel": jnp.ones((512, 512))}

    def store(params, state, grads):
        moved, new_state, metrics = apply_gradients(chain, grads, state, params)
        fine = _in_order(jnp.isfinite(metrics["grad_norm"]), metrics)
        keep = lambda new, old: jnp.where(fine, new, old)  # noqa: E731
        return jax.tree.map(keep, (moved, new_state), (params, state)), metrics

    given = params, chain.init(params), params
    compiled = jax.jit(store, donate_argnums=(0, 1)).lower(*given).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes / params["kernel"].nbytes
    assert temporaries < 3.5, "weights"

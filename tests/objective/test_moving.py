"""A reference that moves (TR-DPO): where it goes, what is counted from it, what leaves it alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spo_jax.checkpoints.reading import broken_weights
from spo_jax.losses import make_preference_loss
from spo_jax.objective.adapted import OnBase, adapted_objective
from spo_jax.objective.levels import make_objective
from spo_jax.objective.moving import make_moving, start_reference
from spo_jax.objective.terms import completion_logprobs
from spo_jax.parallel.mesh import make_mesh, place_batch
from spo_jax.plan.compiled import memory_summary
from spo_jax.solvers import SOLVERS, make_penalty
from spo_jax.training.update import init_state, jit_step, make_train_step, shard_state
from spo_jax.types import BilevelBatch
from tests.objective.test_adapted import BASE, TRAINED, join, make
from tests.objective.test_tracked import two_and_two
from tests.objective.test_unpaired_rows import unpaired_batch
from tests.tiny import tiny_logprobs
from tests.training.test_solvers_on_models import (
    KEY,
    MODEL,
    PARAMS,
    batch_of,
    make_step,
    relative_difference,
)
from tests.training.test_update import poisoned, same

SOFT, HARD = make_moving(alpha=0.25, every=2), make_moving(alpha=1.0, every=2)
LOGPROBS = tiny_logprobs(MODEL)


def moving_step(name="penalty", loss="dpo", inner_data="chosen", moving=SOFT, **options):
    return make_step(name, loss, inner_data, reference="online", moving=moving, **options)


def followed(moving, reference, policies, fine=True):
    """Where the reference is behind each of the updates that ended with ``policies``."""
    found, at = [], start_reference(jnp.asarray(reference))
    for number, policy in enumerate(policies, start=1):
        at = moving.follow(at, jnp.asarray(policy), jnp.asarray(number), jnp.asarray(fine))
        found.append(np.asarray(at.params, np.float64).tolist())
    return found


def test_a_soft_update_by_hand():
    """Of 8 and 4: every second update takes a quarter of the way to where the policy is then."""
    found = followed(SOFT, [8.0, 4.0], [[0.0, 0.0], [4.0, 8.0], [1.0, 1.0], [11.0, 1.0]])
    assert found == [[8.0, 4.0], [7.0, 5.0], [7.0, 5.0], [8.0, 4.0]]


def test_a_hard_update_is_the_policy():
    policies = [[1.0], [0.1], [3.0], [4e-20]]
    found = followed(HARD, [1e30], policies)
    np.testing.assert_array_equal(found, np.float32([[1e30], [0.1], [0.1], [4e-20]]))


def test_what_is_equal_stays_so_and_what_is_not_fine_leaves_it():
    start = np.asarray(jax.random.normal(jax.random.key(0), (1000,)))
    every = make_moving(alpha=0.3, every=1)
    assert followed(every, start, [start] * 3) == [start.astype(np.float64).tolist()] * 3
    assert followed(every, [8.0], [[0.0]] * 2, fine=False) == [[8.0]] * 2
    assert followed(every, [8.0], [[np.nan]], fine=False) == [[8.0]]


@pytest.mark.parametrize(("alpha", "behind"), [(0.6, 0.0), (0.08, 6.0)])
def test_in_bfloat16_a_small_alpha_stays_a_few_spacings_behind(alpha, behind):
    """Those from 1 to 2 are 2^-7: it ends where ``alpha`` times the rest is half of one."""
    spacing = 2.0**-7
    policy = jnp.full((1,), 1 + 20 * spacing, jnp.bfloat16)
    found = followed(make_moving(alpha=alpha, every=1), jnp.ones((1,), jnp.bfloat16), [policy] * 40)
    assert (20 * spacing + 1 - found[-1][0]) / spacing == behind


def in_a_loop(name, loss, batches, alpha, every, **options):
    """The same by an update with a frozen reference, which is handed another one now and then."""
    init, step = make_step(name, loss, reference="online", **options)
    step, state, reference, lines = jax.jit(step), init(PARAMS, KEY), PARAMS, []
    for number, batch in enumerate(batches, start=1):
        state, metrics = step(state, batch, reference)
        lines.append(metrics)
        if number % every == 0:
            reference = jax.tree.map(
                lambda ref, own: (1 - alpha) * ref + alpha * own, reference, state.solver.params
            )
    return state, reference, lines


def judged_by(params, batch):
    """The batch with its log-probs under ``params``, as a run has those of its start."""

    def rows(part):
        if part is None:
            return None
        return part._replace(reference_logprobs=completion_logprobs(LOGPROBS, params, part))

    return BilevelBatch(rows(batch.preference), rows(batch.sft))


OF_THE_LOSS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "grad_norm")


@pytest.mark.wide
@pytest.mark.parametrize("name", ["penalty", *sorted(SOLVERS.keys() - {"penalty", "inner_only"})])
def test_training_is_that_of_a_loop_that_moves_the_reference(name):
    """With an inner value that is a number: that of a reference is counted from the start."""
    inner = {"inner_value": 0.5}
    batches = [judged_by(PARAMS, batch_of("chosen", seed)) for seed in range(5)]
    init, step = moving_step(name, **inner)
    step, state, lines = jax.jit(step), init(PARAMS, KEY), []
    for batch in batches:
        state, metrics = step(state, batch)
        lines.append(metrics)
    wanted, reference, expected = in_a_loop(name, "dpo", batches, 0.25, 2, **inner)
    assert relative_difference(wanted.solver.params, state.solver.params) < 1e-5
    assert relative_difference(reference, state.objective.reference.params) < 1e-5
    assert relative_difference(reference, PARAMS) > 1e-3
    for found, line in zip(lines, expected, strict=True):
        for key in OF_THE_LOSS:
            np.testing.assert_allclose(found[key], line[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner_data", ["chosen", pytest.param("sft", marks=pytest.mark.long)])
def test_rewards_are_against_it_and_log_ratios_gap_and_hinge_from_the_start(inner_data):
    init, step = moving_step(
        inner_data=inner_data, moving=HARD, regularizer="hinge", regularizer_weight=0.1
    )
    start = MODEL.init(seed=1)
    moved = init(PARAMS, KEY)
    batch = judged_by(start, batch_of(inner_data))
    _, metrics = jax.jit(step)(moved, batch)
    # The policy is where the reference is, and that is not where they began.
    np.testing.assert_allclose(metrics["rewards/chosen"], 0, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-5)
    frozen = make_objective(
        LOGPROBS, make_preference_loss("dpo", beta=0.5), inner_data=inner_data,
        regularizer="hinge", regularizer_weight=0.1,
    )  # fmt: skip
    levels = frozen.levels(frozen.init())
    (_, gap), (wanted, _) = jax.jit(levels.both)(PARAMS, batch)
    np.testing.assert_allclose(metrics["gap"], gap, rtol=1e-4)
    for key in ("log_ratio/chosen", "log_ratio/margin", "inner_value", "regularizer"):
        np.testing.assert_allclose(metrics[key], wanted[key], rtol=1e-4)
        assert abs(wanted[key]) > 1e-2, key


def test_unpaired_completions_have_their_kl_and_rewards_against_it():
    options = {"inner_value": 0.5, "moving": make_moving(alpha=1.0, every=1)}
    init, step = moving_step("preference_only", "kto", **options)
    rows = [BilevelBatch(unpaired_batch(seed=seed)) for seed in (0, 1, 2)]
    batches = [judged_by(PARAMS, batch) for batch in rows]
    step, state = jax.jit(step), init(PARAMS, KEY)
    for batch in batches:
        state, metrics = step(state, batch)
    plain = {"inner_value": 0.5}
    wanted, _, lines = in_a_loop("preference_only", "kto", batches, 1.0, 1, **plain)
    assert relative_difference(wanted.solver.params, state.solver.params) < 1e-5
    for key in ("loss", "kl", "rewards/accuracies", "rewards/chosen"):
        np.testing.assert_allclose(metrics[key], lines[-1][key], rtol=1e-4, atol=1e-5)
    # Three updates away from the start, and the reference two.
    assert abs(metrics["log_ratio/chosen"]) > 10 * abs(lines[-1]["log_ratio/chosen"])


def test_a_skipped_update_leaves_it_bit_for_bit():
    init, step = moving_step(moving=HARD)
    step, good = jax.jit(step), judged_by(PARAMS, batch_of("chosen"))
    state, _ = step(init(PARAMS, KEY), good)
    after, metrics = step(state, poisoned(good, "preference"))
    assert metrics["skipped"]
    same((after.solver, after.objective), (state.solver, state.objective))
    same(after.objective.reference.params, PARAMS)
    # The one that was due is left out: the next comes two updates later, as ever.
    third, _ = step(after, good)
    same(third.objective.reference.params, PARAMS)
    fourth, _ = step(third, good)
    same(fourth.objective.reference.params, fourth.solver.params)


def test_two_steps_and_two_are_four_bit_for_bit(tmp_path):
    moving = make_moving(alpha=0.25, every=3)
    state, again = two_and_two(*moving_step("primal_dual", "alphadpo", moving=moving), tmp_path)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert relative_difference(PARAMS, state.objective.reference.params) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.eight_devices
@pytest.mark.long
def test_eight_devices_take_the_steps_of_one_and_cut_it_like_the_policy():
    init, step = moving_step("primal_dual", inner_data="sft", micro_batches=2)
    ends = []
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(data=2, fsdp=2, tensor=2)):
        state, shardings = shard_state(init, mesh, PARAMS, KEY)
        compiled = jit_step(step, shardings)
        for seed in range(3):
            state, _ = compiled(state, place_batch(batch_of("sft", seed), mesh))
        reference = state.objective.reference.params
        assert jax.tree.map(lambda x: x.sharding, reference) == jax.tree.map(
            lambda x: x.sharding, state.solver.params
        )
        ends.append(jax.device_get(state))
    assert not reference["head"].sharding.is_fully_replicated
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), *ends)


def test_it_takes_over_its_own_buffers():
    """Memory of an update is that of one with a frozen reference: no third copy in passing."""
    batch, found = batch_of("chosen"), []
    for init, step, given in (
        (*make_step("penalty", "dpo", reference="online"), PARAMS),
        (*moving_step(), None),
    ):
        state = jax.eval_shape(init, PARAMS, KEY)
        compiled = jit_step(step).lower(state, batch, given).compile()
        found.append(memory_summary(compiled))
    weights = sum(x.nbytes for x in jax.tree.leaves(PARAMS))
    frozen, moving = found
    assert moving["aliased"] - frozen["aliased"] == weights
    assert moving["total"] - frozen["total"] < weights / 10


def test_of_adapters_it_is_the_adapters_without_dropout():
    def drop(whole, *, key):
        return whole | {"mix": 0.0 * whole["mix"]}

    options = {"reference": "online", "moving": make_moving(alpha=1.0, every=1)}
    own = adapted_objective(lambda whole: make(whole, **options), join, drop)
    solver = make_penalty(outer=optax.sgd(0.1), penalty_weight=1.0)
    step = jax.jit(make_train_step(own, solver, schedule=optax.constant_schedule(0.1)))
    state = init_state(solver, own, TRAINED, np.zeros(2, np.uint32))
    batch = BilevelBatch(batch_of("chosen").preference)
    state, metrics = step(state, batch, OnBase(BASE))
    same(state.objective.reference.params, state.solver.params)
    assert set(state.objective.reference.params) == {"mix"}
    sums = completion_logprobs(LOGPROBS, join(BASE, TRAINED), batch.preference)
    nothing = completion_logprobs(LOGPROBS, BASE | {"mix": 0.0 * BASE["mix"]}, batch.preference)
    chosen = 0.5 * jnp.mean((nothing - sums)[:, 0])
    np.testing.assert_allclose(metrics["rewards/chosen"], chosen, rtol=1e-4)


def test_a_broken_one_is_not_saved():
    init, _ = moving_step()
    state = init(PARAMS, KEY)
    assert broken_weights(state) == []
    broken = start_reference(PARAMS | {"mix": PARAMS["mix"] * jnp.nan})
    state = state._replace(objective=state.objective._replace(reference=broken))
    assert broken_weights(state) == ["objective/reference/params/mix"]


def test_what_cannot_move():
    for alpha, every in ((0.0, 1), (1.1, 1), (1.0, 0)):
        with pytest.raises(ValueError, match="expected 0 < alpha <= 1 and every from 1"):
            make_moving(alpha=alpha, every=every)
    dpo = make_preference_loss("dpo", beta=0.5)
    simpo = make_preference_loss("simpo", beta=2.0, gamma_beta_ratio=0.3)
    for loss, mode in ((dpo, "precomputed"), (simpo, "online"), (None, "online")):
        with pytest.raises(ValueError, match="moving is for a loss with a reference"):
            make_objective(LOGPROBS, loss, reference=mode, moving=SOFT)

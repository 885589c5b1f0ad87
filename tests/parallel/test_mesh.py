"""Meshes, rules and batches; and that eight devices compute what one computes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from spo_jax.losses import make_preference_loss
from spo_jax.objective.levels import make_objective
from spo_jax.parallel.mesh import (
    BATCH,
    DECODER_RULES,
    batch_shards,
    check_batch_size,
    make_mesh,
    partition_spec,
    place_batch,
    sharded_shapes,
    sharding_table,
    tree_shardings,
    unsharded,
)
from spo_jax.solvers import make_penalty
from spo_jax.solvers.optimizers import make_optimizer
from spo_jax.training.update import init_state, jit_step, make_train_step, shard_state
from spo_jax.types import BilevelBatch, TrainState
from tests.tiny import random_batch, tiny_logprobs, tiny_model, tiny_params

MODEL = tiny_model()


@pytest.mark.eight_devices
def test_sizes_of_a_mesh():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(data=2, fsdp=-1, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(data=1, fsdp=8).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    one = make_mesh(devices=jax.devices()[:1])
    assert dict(one.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert batch_shards(make_mesh(data=2, fsdp=2, tensor=2)) == 4


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"data": 3}, "mesh.data=3, mesh.fsdp=1, mesh.tensor=1 does not fit 8 devices"),
        ({"data": 2}, "sizes must multiply to 8; set one of them to -1"),
        ({"tensor": 3}, "mesh.tensor=3 does not fit 8 devices"),
        ({"fsdp": -1}, "only one may be -1"),
        ({"data": 8, "tensor": 0}, "sizes are positive"),
        ({"fsdp": -2}, "sizes are positive"),
    ],
)
def test_meshes_that_do_not_fit(sizes, text):
    with pytest.raises(ValueError, match=text):
        make_mesh(**sizes)


def test_first_match_wins_and_what_does_not_divide_is_left_whole():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rules = [(r"\['a'\]$", P("tensor", "fsdp")), (r"a", P("fsdp")), (r"", P())]
    spec = partial(partition_spec, rules=rules, mesh=mesh)
    assert spec("['a']", (4, 4)) == P("tensor", "fsdp")
    assert spec("['ab']", (4, 4)) == P("fsdp")
    assert spec("['b']", (4, 4)) == P()
    assert spec("['a']", (5, 4)) == P(None, "fsdp")
    assert spec("['a']", (4, 5)) == P("tensor", None)
    # A factored second moment keeps its parameter's path and loses a dimension.
    assert spec("['a']", (4,)) == P()
    with pytest.raises(ValueError, match=r"no sharding rule matches \['c'\]"):
        partition_spec("['c']", (4,), rules[:1], mesh)


FITTED = {
    "['embed']": P(None, "fsdp"),  # a vocabulary of 53 is not cut in two
    "['attention']['q']['kernel']": P(None, "fsdp", "tensor"),
    "['attention']['k']['kernel']": P(None, "fsdp", "tensor"),
    "['attention']['v']['kernel']": P(None, "fsdp", "tensor"),
    "['attention']['o']['kernel']": P(None, "tensor", "fsdp"),
    "['mlp']['gate']['kernel']": P(None, "fsdp", "tensor"),
    "['mlp']['up']['kernel']": P(None, "fsdp", "tensor"),
    "['mlp']['down']['kernel']": P(None, "tensor", "fsdp"),
}


def specs(tree, mesh):
    """``(path, shape, spec)`` of every leaf."""
    shardings = tree_shardings(tree, mesh)
    pairs = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(shardings), strict=True)
    return [(jax.tree_util.keystr(path), leaf.shape, s.spec) for (path, leaf), s in pairs]


def rule(path):
    return next((spec for end, spec in FITTED.items() if path.endswith(end)), P())


def test_every_parameter_has_its_rule():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    found = specs(MODEL.abstract_params(), mesh)
    assert len(found) == 11
    for path, _, spec in found:
        assert spec == rule(path), path
    assert sum(spec != P() for _, _, spec in found) == len(FITTED)


def test_biases_and_an_untied_head():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    spec = partial(partition_spec, rules=DECODER_RULES, mesh=mesh)
    assert spec("['layers']['attention']['q']['bias']", (2, 16)) == P(None, "tensor")
    assert spec("['layers']['attention']['o']['bias']", (2, 16)) == P()
    assert spec("['head']", (16, 64)) == P("fsdp", "tensor")


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_optimizer_states_lie_like_their_parameters(name):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    options = {"min_dim_size_to_factor": 4} if name == "adafactor" else {}
    optimizer, _ = make_optimizer(name=name, steps=4, learning_rate=0.1, options=options)
    params = MODEL.abstract_params()
    ranks = {
        jax.tree_util.keystr(p): x.ndim for p, x in jax.tree_util.tree_leaves_with_path(params)
    }
    state = specs(jax.eval_shape(optimizer.init, params), mesh)
    cut = 0
    for path, shape, spec in state:
        parameter = next((p for p in ranks if path.endswith(p)), None)
        same_rank = parameter is not None and len(shape) == ranks[parameter]
        assert spec == (rule(path) if same_rank else P()), path
        cut += spec != P()
    assert cut == {"adamw": 2 * len(FITTED), "adafactor": 0, "muon": len(FITTED) + 1}[name]


def tree_of(**shapes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def test_the_table_says_where_every_leaf_lies():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    found = {row.path: row for row in sharding_table(MODEL.abstract_params(), mesh)}
    assert len(found) == 11
    q = found["layers/attention/q/kernel"]
    assert (q.shape, q.dtype, q.spec) == ((2, 16, 16), "float32", "(-, fsdp, tensor)")
    assert (q.bytes, q.bytes_per_device, q.note) == (2048, 512, "")
    embed = found["embed"]
    assert (embed.spec, embed.bytes_per_device) == ("(-, fsdp)", 53 * 8 * 4)
    assert embed.note == "dimension 0 of 53 does not divide over mesh.tensor=2"
    norm = found["final_norm/scale"]
    assert (norm.spec, norm.bytes_per_device) == ("replicated", 64)
    assert norm.note == "no rule cuts it over fsdp or tensor"


def test_bytes_per_device_are_those_of_the_shards():
    mesh = make_mesh(data=2, fsdp=4)
    params = MODEL.abstract_params()
    shardings = jax.tree.leaves(tree_shardings(params, mesh))
    for row, sharding in zip(sharding_table(params, mesh), shardings, strict=True):
        assert row.bytes_per_device == 4 * np.prod(sharding.shard_shape(row.shape))


def test_axes_of_one_and_joined_axes_in_the_table():
    tree = tree_of(a=(16, 3), b=(6, 4))
    rules = [(r"a", P(("fsdp", "tensor"))), (r"", P("tensor", "fsdp"))]
    a, b = sharding_table(tree, make_mesh(data=2, fsdp=2, tensor=2), rules)
    assert (a.spec, a.bytes_per_device, a.note) == ("(fsdp+tensor)", 48, "")
    assert (b.spec, b.bytes_per_device, b.note) == ("(tensor, fsdp)", 24, "")
    a, b = sharding_table(tree, make_mesh(data=2, fsdp=4), rules)
    assert (a.spec, b.spec, b.note) == ("(fsdp)", "(-, fsdp)", "")
    assert {row.note for row in sharding_table(tree, make_mesh(), rules)} == {""}


def test_what_is_large_and_whole_is_found():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    tree = {
        "embed": jax.ShapeDtypeStruct((1001, 1024), jnp.float32),
        "head": jax.ShapeDtypeStruct((1024, 1000), jnp.float32),
        "adapter": jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16),
        "scale": jax.ShapeDtypeStruct((1024,), jnp.float32),
        "layers": {"q": {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}},
    }
    found = {row.path: row.note for row in unsharded(tree, mesh, min_bytes=2**20)}
    assert found == {
        "embed": "dimension 0 of 1001 does not divide over mesh.tensor=2",
        "adapter": "no rule cuts it over fsdp or tensor",
        "layers/q/kernel": "its rule is for 3 dimensions, the leaf has 2",
    }
    assert [row.path for row in unsharded(tree, mesh, min_bytes=2**21 + 1)] == ["layers/q/kernel"]
    assert not unsharded(tree, mesh)
    assert not unsharded(tree, make_mesh(), min_bytes=1)


def test_batches_divide_or_say_what_would():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    check_batch_size("train.batch_size", 12, 1, mesh)
    check_batch_size("train.batch_size", 16, 4, mesh)
    with pytest.raises(ValueError) as caught:
        check_batch_size("batch_size", 10, 1, mesh)
    expected = "batch_size=10 does not divide over 4 data shards: use a multiple of 4"
    assert str(caught.value) == f"{expected}, such as 8 or 12"
    with pytest.raises(ValueError, match=r"x 2 micro-batches: use a multiple of 8, such as 8$"):
        check_batch_size("batch_size", 4, 2, mesh)


def test_rows_are_cut_over_data_and_fsdp():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = place_batch({"a": np.arange(16).reshape(8, 2), "none": None}, mesh)
    assert placed["a"].sharding.spec == BATCH
    assert {s.data.shape for s in placed["a"].addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(placed["a"], np.arange(16).reshape(8, 2))


def one_step(mesh):
    """The state after one update on ``mesh``, and its metrics."""
    loss = make_preference_loss("dpo", beta=0.5)
    objective = make_objective(tiny_logprobs(MODEL), loss)
    # A large eps: where a gradient is nearly 0, Adam would blow rounding up to a whole step.
    optimizer, schedule = make_optimizer(
        name="adamw", steps=4, learning_rate=0.05, weight_decay=0.1, options={"eps": 1e-2}
    )
    solver = make_penalty(outer=optimizer, penalty_weight=2.0)
    key = jax.random.key_data(jax.random.key(0))
    init = partial(init_state, solver, objective)
    state, shardings = shard_state(init, mesh, tiny_params(MODEL), key)
    step = make_train_step(objective, solver, schedule=schedule)
    step = jit_step(step, shardings)
    return step(state, place_batch(BilevelBatch(random_batch(filler=1)), mesh))


@pytest.fixture(scope="module")
def on_one_device():
    return jax.device_get(one_step(make_mesh(devices=jax.devices()[:1])))


@pytest.mark.wide
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "q_shard"),
    [
        ({"data": 8}, (2, 16, 16)),
        pytest.param({"data": 1, "fsdp": 8}, (2, 2, 16), marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, (2, 8, 8), marks=pytest.mark.slow),
    ],
)
def test_eight_devices_take_the_step_of_one(on_one_device, sizes, q_shard):
    state, metrics = one_step(make_mesh(**sizes))
    for part in (state.solver.params, state.solver.outer[1][0].mu):
        q = part["layers"]["attention"]["q"]["kernel"]
        assert {shard.data.shape for shard in q.addressable_shards} == {q_shard}
        assert len(q.addressable_shards) == 8
    expected_state, expected_metrics = on_one_device
    moved = jax.tree.map(lambda a, b: a - b, expected_state.solver.params, tiny_params(MODEL))
    assert min(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(moved)) > 1e-4
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected_state), strict=True
    )
    for (path, found), expected in pairs:
        np.testing.assert_allclose(
            found, expected, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path)
        )
    assert set(metrics) == set(expected_metrics)
    for key, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[key], rtol=1e-5, atol=1e-6, err_msg=key)


def test_parameters_that_lie_on_one_device_are_moved_to_the_mesh():
    def init(params, key):
        return TrainState(jnp.zeros((), jnp.int32), params, (), key)

    mesh, key = make_mesh(data=1, fsdp=8), jnp.zeros(2, jnp.uint32)
    params = jax.device_put(tiny_params(MODEL), jax.devices()[0])  # said, so jit leaves them there
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(params)} == {1}
    state, shardings = shard_state(init, mesh, params, key)
    assert jax.tree.map(lambda x: x.sharding, state.solver) == shardings.solver
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state.solver))
    jax.tree.map(np.testing.assert_array_equal, state.solver, params)


@pytest.mark.parametrize("donate", [True, False])
def test_the_start_lives_on_unless_it_is_donated(donate):
    """A step donates its state: without a copy it would take the start's buffers along."""
    mesh = make_mesh(devices=jax.devices()[:1])
    params = {"w": jax.device_put(jnp.arange(4.0), jax.devices()[0])}

    def init(params, key):
        return TrainState(jnp.zeros((), jnp.int32), params, (), key)

    state, shardings = shard_state(init, mesh, params, jnp.zeros(2, jnp.uint32), donate=donate)
    jax.tree.map(lambda x: x.delete(), state.solver)
    assert params["w"].is_deleted() == donate
    like = sharded_shapes(state, mesh)
    assert jax.tree.map(lambda x: x.sharding, like) == shardings
    assert like.solver["w"].shape == (4,)

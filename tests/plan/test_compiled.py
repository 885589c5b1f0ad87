"""An update compiled from shapes alone is the one that training runs, and its memory is known."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from spo_jax.config.choices import bound_loss
from spo_jax.config.moving_reference import stays_online
from spo_jax.config.schema import LoraConfig
from spo_jax.config.validation import checked_config, load_config
from spo_jax.models import init_model, join, load_hf_config, split
from spo_jax.parallel.mesh import make_mesh, place_batch, sharded_shapes
from spo_jax.plan import compile_pair_update, memory_summary
from spo_jax.plan.compiled import assemble, make_model, stage_rows
from spo_jax.plan.tables import groups_of, large_unsharded
from spo_jax.policies.adapters import adapted
from spo_jax.policies.loading import execution, load_policy
from spo_jax.training.material import (
    frozen_logprobs,
    keep_reference,
    make_batches,
    rows_of_stage,
)
from spo_jax.training.run import first_state
from spo_jax.training.stage import compile_update, make_stage, what_stays
from tests.tiny import ARCHITECTURE

SHORT = {"train": "builtin:arithmetic", "max_completion_length": 16, "completion_buckets": [16]}
TREE = {
    "model": {"tokenizer": "builtin:arithmetic", "init": ARCHITECTURE},
    "sft_data": SHORT,
    "data": SHORT,
    "task": {
        "digits": 1,
        "sft_problems": 40,
        "preference_problems": 24,
        "test_problems": 8,
        "samples": 2,
    },
    "loss": {"name": "alphadpo", "beta": 2.0, "gamma_beta_ratio": 0.3, "alpha": 0.1},
    "outer": {"learning_rate": 1e-3, "schedule": "constant", "warmup_ratio": 0.0},
    "train": {"steps": 4, "batch_size": 16, "gradient_accumulation": 2},
    "mesh": {"data": 2, "fsdp": -1},
}
KINDS = {
    "frozen log-probs": {},
    "reference and SFT rows in the step": {
        "reference": {"mode": "online"},
        "objective": {"inner_data": "sft"},
        "train": {**TREE["train"], "inner_batch_size": 32},
    },
    "a reference that moves": {"reference": {"mode": "online", "moving": {"alpha": 1, "every": 2}}},
    "unpaired rows": {
        "loss": {"name": "kto", "beta": 0.1},
        "data": {**SHORT, "eval_fraction": 0.25},
    },
    "validation rows": {
        "objective": {"validation_fraction": 0.4},
        "solver": {"name": "primal_dual", "form": "lagrangian"},
        "train": {"steps": 4, "batch_size": 8},
        "mesh": {"data": 2, "fsdp": -1},
    },
    "adapters": {"lora": {"rank": 4, "dropout": 0.1}},
    "adapters and their reference in the step": {
        "lora": {"rank": 4, "targets": ("q_proj", "v_proj")},
        "reference": {"mode": "online"},
    },
    "no reference": {
        "reference": {"mode": "none"},
        "loss": {"name": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5},
        "solver": {"name": "preference_only"},
        "objective": {"inner_value": "running_min"},
    },
}


def config_of(lora=None, **keys):
    """TREE as it is trained, on the eight devices."""
    tree = {**TREE, **keys}
    own = (tree.get("objective") or {}).get("inner_data") == "sft"
    config = checked_config(tree if own else {k: v for k, v in tree.items() if k != "sft_data"})
    # A configuration has adapters on a model that has learnt something alone; here it has not.
    return config if lora is None else dataclasses.replace(config, lora=LoraConfig(**lora))


def planned(config, architecture, batch):
    """What is compiled for a batch's lengths where neither rows nor number of steps is known."""
    data = dataclasses.replace(config.data, train="nowhere.jsonl")
    loop = dataclasses.replace(config.train, steps=None, epochs=1.0)
    unknown = dataclasses.replace(config, data=data, sft_data=data, train=loop)
    pairs = batch.preference
    return compile_pair_update(
        unknown,
        architecture,
        devices=jax.devices(),
        prompt_length=pairs.prompt_tokens.shape[1],
        completion_length=pairs.completion_tokens.shape[2],
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.long
def test_what_is_planned_is_what_training_runs(kind, tmp_path):
    config = config_of(output_dir=str(tmp_path), **KINDS[kind])
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    start = load_policy(config.model, mesh, seed=0, work=tmp_path / "model")
    if config.lora.rank is not None:
        start = start._replace(params=adapted(start.params, config.lora, mesh, seed=0))
    trained, base = split(start.params)
    rows = rows_of_stage(config, "preference", start, {}, resume=False)
    reference = keep_reference(config, tmp_path, start, mesh, resume=False)
    whole = reference and join(base, reference)
    frozen = frozen_logprobs(config, start.model, whole, rows, mesh)
    stays = what_stays(base, reference if stays_online(config) else None)
    stage = make_stage(
        config, "preference", start.model, bound_loss(config.loss), mesh, steps=config.train.steps
    )
    batch = place_batch(next(make_batches(config, "preference", rows, frozen, mesh)), mesh)

    def state():
        return first_state(config, stage, start, mesh, donate=False)

    expected = compile_update(stage, trained, mesh, stays)(state(), batch)
    compiled = planned(config, load_hf_config(start.folder), batch)
    found = compiled(state(), batch, stays)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def tiny_plan(devices=None, architecture=None, **keys):
    sizes = {"prompt_length": 8, "completion_length": 16, **keys}
    architecture = architecture or {**ARCHITECTURE, "vocab_size": 64}
    return compile_pair_update(
        config_of(mesh={"data": 1, "fsdp": -1}),
        architecture,
        devices=devices or jax.devices(),
        **sizes,
    )


@pytest.mark.long
def test_memory_of_a_device():
    before = len(jax.live_arrays())
    compiled = tiny_plan()
    memory = memory_summary(compiled)
    assert len(jax.live_arrays()) == before
    mesh = make_mesh(data=1, fsdp=8)
    model = init_model({**ARCHITECTURE, "vocab_size": 64}, execution(config_of().model))
    params = jax.tree.leaves(sharded_shapes(model.abstract_params(), mesh))
    part = sum(4 * math.prod(x.sharding.shard_shape(x.shape)) for x in params)
    # Parameters and Adam's two moments, and a few numbers; of 16 rows two.
    rows = 2 * (8 * (4 + 1) + 2 * 16 * (4 + 1) + 4 + 2 * 4)
    assert 3 * part + rows < memory["arguments"] < 3 * part + rows + 256
    assert 3 * part <= memory["aliased"] < memory["outputs"]
    assert memory["temporaries"] > part
    held = memory["arguments"] + memory["temporaries"] + memory["outputs"] - memory["aliased"]
    assert memory["total"] == held


def tiny_groups(architecture=None, **keys):
    """What an update of these settings holds, by name."""
    config = config_of(mesh={"data": 1, "fsdp": -1}, **keys)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    model = make_model(config, architecture or {**ARCHITECTURE, "vocab_size": 64}, mesh)
    rows = stage_rows(config, "preference", prompt_length=8, completion_length=16)
    groups = groups_of(assemble(config, model, mesh, "preference", rows))
    return {group.name: group for group in groups}


def test_a_reference_that_moves_takes_the_place_of_the_frozen_one():
    ahead = tiny_groups()
    moving = tiny_groups(reference={"mode": "online", "moving": {"alpha": 1, "every": 2}})
    assert set(moving) - set(ahead) == {"moving reference"}
    found, policy = moving["moving reference"], moving["parameters"]
    assert (found.bytes, found.bytes_per_device) == (policy.bytes, policy.bytes_per_device)
    # The start's log-probs lie in the batch, as where nothing is online.
    for name in ("batch", "counters and statistics"):
        assert moving[name].bytes == ahead[name].bytes
    assert "reference parameters" in tiny_groups(reference={"mode": "online"})


def test_adapters_are_what_has_moments_and_a_reference():
    wide = {**ARCHITECTURE, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    wide |= {"head_dim": 32}
    whole = tiny_groups(wide)
    layers, hidden, kv, inner, rank = 2, 64, 32, 128, 4
    ends = 2 * hidden + 2 * (hidden + kv) + 2 * hidden + 2 * (hidden + inner) + inner + hidden
    adapters = 4 * layers * rank * ends
    scales = 4 * layers * 7
    sizes = {}
    for quantize in (None, "nf4"):
        lora = {"rank": rank, "quantize": quantize}
        found = tiny_groups(wide, lora=lora, reference={"mode": "online"})
        assert found["parameters"].bytes == found["reference parameters"].bytes == adapters
        assert 2 * adapters <= found["optimizer moments (outer)"].bytes < 2 * adapters + 16
        sizes[quantize] = found["base"].bytes - scales
    assert sizes[None] == whole["parameters"].bytes
    kernels = layers * (2 * hidden**2 + 2 * hidden * kv + 3 * hidden * inner)
    assert sizes["nf4"] == sizes[None] - kernels * 4 + kernels // 2 + kernels * 4 // 64


def test_a_tracked_copy_counts_its_weights_and_moments():
    tracked = {"objective": {"inner_value": "tracked"}, "solver": {"name": "primal_dual"}}
    plain, copied = tiny_groups(solver={"name": "primal_dual"}), tiny_groups(**tracked)
    assert set(copied) - set(plain) == {"tracked parameters", "optimizer moments (tracked)"}
    for more, like in (
        ("tracked parameters", "parameters"),
        ("optimizer moments (tracked)", "optimizer moments (outer)"),
    ):
        sizes = [(copied[x].bytes, copied[x].bytes_per_device) for x in (more, like)]
        assert sizes[0] == sizes[1]
    # One number more: the loss of the copy.
    statistics = "counters and statistics"
    assert copied[statistics].bytes == plain[statistics].bytes + 4


@pytest.mark.long
def test_devices_and_batch_are_those_asked_for():
    compiled = tiny_plan(jax.devices()[:4], batch_size=8)
    state, batch, _ = compiled.args_info[0]
    assert batch.preference.completion_tokens.shape == (8, 2, 16)
    assert all(leaf.donated for leaf in jax.tree.leaves(state))
    for sharding in jax.tree.leaves(compiled.input_shardings[0]):
        assert sharding.device_set <= set(jax.devices()[:4])


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"batch_size": 12}, "train.batch_size=12 does not divide over 8 data shards"),
        ({"devices": jax.devices()[:3]}, "train.batch_size=16 does not divide over 3"),
        ({"architecture": {"model_type": "gpt9"}}, "model_type='gpt9' is not supported"),
    ],
)
def test_what_cannot_be_planned(keys, text):
    with pytest.raises(ValueError, match=text):
        tiny_plan(**keys)


@pytest.mark.eight_devices
def test_inner_rows_have_a_size_of_their_own():
    own = {**KINDS["reference and SFT rows in the step"]}
    own["train"] = {**TREE["train"], "inner_batch_size": 20}
    with pytest.raises(ValueError, match="inner_batch_size=20 does not divide over 8"):
        compile_pair_update(
            config_of(**own),
            {**ARCHITECTURE, "vocab_size": 64},
            devices=jax.devices(),
            prompt_length=8,
            completion_length=16,
        )


# The configurations that docs/plan.md plans

FOLDER = Path(__file__).parents[2] / "configs"
PLANNED = {
    "llama_1b": ("paper/architectures/llama-3.2-1b", 1_235_814_400),
    "llama_8b": ("paper/architectures/llama-3-8b", 8_030_261_248),
    "llama_70b": ("plan/architectures/llama-3.1-70b", 70_553_706_496),
}
"""With what the models' publishers count: a wrong dimension in a file cannot hit it."""


@pytest.mark.parametrize("name", PLANNED)
def test_planned_configurations_assemble_at_their_true_shapes(name):
    file, parameters = PLANNED[name]
    config = load_config(FOLDER / "plan" / f"{name}.yaml")
    mesh = make_mesh(data=1, fsdp=8)
    model = make_model(config, json.loads((FOLDER / f"{file}.json").read_text()), mesh)
    rows = stage_rows(config, "preference", prompt_length=None, completion_length=None)
    assert (rows[0].prompt, rows[0].completion) == (1024, 1024)
    assembled = assemble(config, model, mesh, "preference", rows)
    groups = {group.name: group for group in groups_of(assembled)}
    assert groups["parameters"].bytes == 4 * parameters
    moments = groups["optimizer moments (outer)"]
    assert 8 * parameters <= moments.bytes < 8 * parameters + 16
    # Norms alone are whole on every device.
    assert groups["parameters"].bytes_per_device < 4 * parameters / 8 * 1.001
    assert large_unsharded(assembled) == []

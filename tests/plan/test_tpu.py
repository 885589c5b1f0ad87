"""Plans for TPUs that are not there; where the TPU compiler is installed (the extra ``plan``)."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
import yaml
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spo_jax.cli import main
from spo_jax.config.validation import checked_config
from spo_jax.parallel.mesh import make_mesh
from spo_jax.plan import describe_machine, plan_stage
from spo_jax.plan.counts import collectives, products
from spo_jax.plan.hlo import read_module, trip_count, visits
from tests.tiny import ARCHITECTURE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the TPU compiler: pip install 'spo-jax[plan]'",
    ),
]

MODEL = {
    **ARCHITECTURE,
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 1024,
}
TREE = {
    "model": {"path": "nowhere/tiny", "compute_dtype": "bfloat16", "remat": "full"},
    "data": {"train": "nowhere.jsonl", "max_prompt_length": 256, "max_completion_length": 256},
    "train": {"steps": 10, "batch_size": 8},
    "mesh": {"data": 1, "fsdp": -1},
}


def plan(topology="v5e:2x2", **model):
    config = checked_config({**TREE, "model": {**TREE["model"], **model}})
    return plan_stage(config, MODEL, describe_machine(topology), "preference")


def test_a_scan_of_sharded_products_counts_what_it_is():
    machine = describe_machine("v5e:2x2")
    mesh = make_mesh(data=2, fsdp=2, devices=machine.devices)

    def loss(weights, x):
        body = lambda c, w: (jnp.tanh(c @ w), None)  # noqa: E731
        return jnp.mean(jax.lax.scan(body, x, weights)[0] ** 2)

    def shape(dims, *spec):
        return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    arguments = shape((5, 512, 512), None, None, "fsdp"), shape((64, 512), "data")
    module = read_module(jax.jit(jax.grad(loss)).lower(*arguments).compile().as_text())
    loops = [v for v in visits(module) if v.instruction.opcode == "while"]
    assert [trip_count(module, v.computation, v.instruction) for v in loops] == [5, 5]
    assert products(module).flops == 3 * 5 * 2 * 64 * 512 * 512 // 4
    assert {row.group for row in collectives(module)} == {2}


@pytest.mark.parametrize("attention", ["xla", "splash"])
def test_a_plan_for_four_chips(attention):
    found = plan(attention=attention)
    assert found["fits"] is True
    memory, counts = found["memory"], found["counts"]
    assert memory["hbm"] == 16 * 2**30
    assert memory["source"] == "the compiler's"
    listed = sum(group["bytes_per_device"] for group in found["shardings"])
    # A TPU pads small arrays to tiles.
    assert listed <= memory["arguments"] < 1.1 * listed + 2**20
    assert 1.0 < counts["flops"] / (found["model_flops"] / 4) < 2.0
    assert counts["kernels_not_counted"] == {}
    assert counts["loops_of_unknown_length"] == 0
    assert found["compiler_flops_loops_once"] < counts["flops"]
    assert counts["collectives"]


def test_what_no_chip_holds_is_status_1_and_no_traceback(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(TREE))
    large = {**MODEL, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 24}
    (tmp_path / "config.json").write_text(json.dumps(large))
    words = ["plan", str(tmp_path / "config.yaml"), "--topology", "v5e:2x2"]
    assert main([*words, "--architecture", str(tmp_path / "config.json")]) == 1
    assert "DOES NOT FIT v5e:2x2: the compiler refuses it" in capsys.readouterr().out


def test_names_that_the_compiler_does_not_know():
    for name in ("foo:2x2", "v5e:5x5"):
        with pytest.raises(ValueError, match=f"--topology {name} is no machine .*such as v5e:2x4"):
            describe_machine(name)


def test_chips_that_are_one_device_and_chips_that_are_two():
    assert len(describe_machine("v4:2x2x1").devices) == 4
    machine = describe_machine("tpu7x:2x2x1")
    assert len(machine.devices) == 4 * machine.chip.devices

"""A reference that moves, by kinds of runs: what a stage is made of, adapters, unpaired rows."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from spo_jax.config.choices import bound_loss
from spo_jax.config.parsing import ConfigError, read_tree
from spo_jax.config.validation import checked_config
from spo_jax.models import init_model
from spo_jax.objective.moving import Moving
from spo_jax.parallel.mesh import make_mesh, tree_shardings
from spo_jax.policies.loading import Policy, execution
from spo_jax.training.run import first_state, judge_start, train
from spo_jax.training.stage import make_stage, pair_objective
from spo_jax.training.trackers import read_metrics
from tests.runs import write_config
from tests.tiny import ARCHITECTURE
from tests.training import test_lora_runs, test_unpaired_runs
from tests.training.test_lora_runs import base, leaves_of, same  # noqa: F401

pytestmark = pytest.mark.slow


def moving(**options):
    return {"mode": "online", "moving": options}


def config_of(folder, name, **sections):
    tree = read_tree(write_config(folder, name, **sections))
    return checked_config({**tree, "output_dir": str(folder / name)})


def test_a_stage_trains_with_it_and_judges_with_the_frozen_one(tmp_path):
    """And its state begins with the policy, or with another reference: in buffers of its own."""
    config = config_of(tmp_path, "run", reference=moving(alpha=1, every=4))
    mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
    model = init_model({**ARCHITECTURE, "vocab_size": 64}, execution(config.model, mesh))
    args = (config, "preference", model, bound_loss(config.loss), mesh)
    stage = make_stage(*args, steps=24)
    assert stage.objective.moving == Moving(1.0, 4)
    heldout = pair_objective(*args, inner_data="chosen", steps=24, frozen=True)
    assert heldout.moving is None
    params, other = (model.init(jax.random.key(seed)) for seed in (0, 1))
    placed = tree_shardings(params, mesh)
    start = Policy(model, jax.device_put(params, placed), None, Path())
    other = jax.device_put(other, placed)
    kept = jax.tree.map(np.asarray, other)
    for given, wanted in ((None, start.params), (other, kept)):
        state = first_state(config, stage, start, mesh, donate=False, moving=given)
        reference = state.objective.reference.params
        assert same(reference, wanted)
        assert same(state.solver.params, start.params)
        for ref, own in zip(*map(jax.tree.leaves, (reference, state.solver.params)), strict=True):
            assert ref.sharding == own.sharding
            assert ref.dtype == own.dtype
            at = [x.addressable_shards[0].data.unsafe_buffer_pointer() for x in (ref, own)]
            assert at[0] != at[1]
    # Where nothing moves, there is none.
    still = dataclasses.replace(config.reference, moving={})
    plain = make_stage(dataclasses.replace(config, reference=still), *args[1:], steps=24)
    assert plain.objective.moving is None
    assert first_state(config, plain, start, mesh, donate=False).objective.reference == ()


@pytest.mark.long
def test_a_stage_too_short_for_it_is_refused_before_it_trains(tmp_path):
    sections = {"reference": moving(alpha=1, every=4), "train": {"steps": None, "epochs": 1.0}}
    with pytest.raises(ConfigError, match=r"every=4 would be ignored: the stage has \d updates"):
        train(config_of(tmp_path, "short", **sections))
    assert not (tmp_path / "short" / "checkpoints").exists()


@pytest.mark.long
def test_the_start_is_judged_against_itself(tmp_path):
    found = judge_start(config_of(tmp_path, "run", reference=moving(alpha=0.5, every=3)))
    assert abs(found["log_ratio/margin"]) < 1e-4
    assert found["loss"] > 0


@pytest.mark.long
def test_adapters_have_a_hard_one_on_the_same_base(base, tmp_path):  # noqa: F811
    loop = {"steps": 4, "batch_size": 8, "save_every": 1, "keep_checkpoints": 4}
    loss = {"name": "dpo", "beta": 0.1}
    tree = test_lora_runs.tree_of(base, tmp_path, reference=moving(alpha=1, every=3), train=loop)
    train(checked_config(tree | {"loss": loss}), mesh=test_lora_runs.two())
    folder = tmp_path / "preference"
    ends = [leaves_of(folder, step) for step in (2, 3, 4)]
    reference = [state["objective"]["reference"]["params"] for state in ends]
    assert same(reference[0], leaves_of(tmp_path / "sft", 3)["solver"]["params"])
    assert same(reference[1], ends[1]["solver"]["params"])
    assert same(reference[2], reference[1])
    assert not same(reference[2], ends[2]["solver"]["params"])
    lines = [line for line in read_metrics(folder) if "lr" in line]
    assert abs(lines[3]["rewards/margins"]) < 1e-4 < abs(lines[2]["rewards/margins"])
    assert abs(lines[3]["log_ratio/margin"]) > 1e-2


@pytest.mark.long
def test_unpaired_rows_have_one_too(tmp_path):
    asked = moving(alpha=1, every=3)
    assert test_unpaired_runs.train(tmp_path, test_unpaired_runs.ROWS, reference=asked) == 0
    steps, looks = test_unpaired_runs.lines_of(tmp_path)
    beta = test_unpaired_runs.KTO["beta"]
    for line in steps:
        as_before = np.isclose(line["rewards/margins"], beta * line["log_ratio/margin"], atol=1e-4)
        assert as_before == (line["step"] <= 3), line["step"]
    for line in looks:
        margin = beta * line["eval/log_ratio/margin"]
        np.testing.assert_allclose(line["eval/rewards/margins"], margin, atol=1e-4)

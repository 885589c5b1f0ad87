"""A plan from the command line to its record, on simulated CPU devices, compiled for real."""

import json
import math

import jax
import pytest
import yaml

from spo_jax.cli import main
from spo_jax.config.validation import checked_config
from spo_jax.models import init_model
from spo_jax.plan import CHIPS, describe_machine, plan_stage
from spo_jax.plan.compiled import DoesNotFit, Rows, default_lengths
from spo_jax.plan.counts import Unreadable
from spo_jax.plan.estimate import EFFICIENCY, count_parameters, model_flops, roofline
from tests.tiny import ARCHITECTURE

pytestmark = pytest.mark.eight_devices

MODEL = {**ARCHITECTURE, "vocab_size": 64}
DATA = {"train": "nowhere.jsonl", "max_prompt_length": 12, "max_completion_length": 8}
TREE = {
    "stages": ["sft", "preference"],
    "model": {"path": "nowhere/tiny", "remat": "full"},
    "data": DATA,
    "sft_data": {**DATA, "completion_buckets": [4, 16], "prompt_buckets": [8]},
    "train": {"steps": 7, "batch_size": 16, "gradient_accumulation": 2},
    "sft": {"epochs": 2.0, "batch_size": 8},
    "mesh": {"data": 2, "fsdp": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    (folder / "config.yaml").write_text(yaml.safe_dump(TREE))
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder


def arguments(folder, *more, topology="cpu:4"):
    """The command for the folder's configuration and model."""
    config, model = folder / "config.yaml", folder / "config.json"
    words = ["plan", str(config), "--topology", topology, "--architecture", str(model)]
    return [*words, *map(str, more)]


@pytest.fixture(scope="module")
def planned(folder):
    """Both stages planned once: status and record."""
    file = folder / "plan.json"
    status = main(arguments(folder, "--chip", "v5e", "--rows", 100, "--json", file))
    return status, json.loads(file.read_text())


@pytest.mark.long
def test_every_stage_is_planned_and_fits(planned):
    status, record = planned
    assert (status, record["fits"]) == (0, True)
    sft, preference = record["stages"]
    assert (sft["stage"], preference["stage"]) == ("sft", "preference")
    assert preference["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert record["machine"]["chip"]["name"] == "v5e"
    assert record["machine"]["stand_in"]
    assert record["versions"]["jax"] == jax.__version__


@pytest.mark.slow
def test_lengths_are_the_longest_of_each_data_set(planned):
    sft, preference = planned[1]["stages"]
    keys = ("level", "count", "branches", "prompt", "completion")
    (rows,) = ([r[k] for k in keys] for r in sft["batch"]["rows"])
    assert rows == ["sft", 8, 1, 8, 16]
    (rows,) = ([r[k] for k in keys] for r in preference["batch"]["rows"])
    assert rows == ["preference", 16, 2, 12, 8]
    assert preference["batch"]["tokens"] == 16 * (12 + 2 * 8)


@pytest.mark.slow
def test_bytes_of_parameters_and_moments(planned):
    groups = {g["name"]: g for g in planned[1]["stages"][1]["shardings"]}
    shapes = jax.tree.leaves(init_model(MODEL).abstract_params())
    whole = sum(4 * math.prod(leaf.shape) for leaf in shapes)
    assert groups["parameters"]["bytes"] == whole
    moments = groups["optimizer moments (outer)"]
    assert 2 * whole <= moments["bytes"] <= 2 * whole + 16
    held = [leaf["bytes_per_device"] for leaf in groups["parameters"]["leaves"]]
    assert sum(held) == groups["parameters"]["bytes_per_device"]
    assert whole / 2 <= sum(held) < 0.55 * whole  # fsdp=2 cuts all but the norms
    row = 12 * (4 + 1) + 2 * 8 * (4 + 1) + 4 + 2 * 4
    assert groups["batch"]["bytes_per_device"] == 16 // 4 * row


@pytest.mark.slow
def test_arguments_of_the_table_are_those_of_the_program(planned):
    for stage in planned[1]["stages"]:
        listed = sum(group["bytes_per_device"] for group in stage["shardings"])
        assert listed == pytest.approx(stage["memory"]["arguments"], abs=256)


@pytest.mark.slow
def test_work_of_the_program_covers_that_of_the_model(planned):
    for stage in planned[1]["stages"]:
        counts, model = stage["counts"], stage["model_flops"] / 4
        # remat computes the layers' forward pass again; scores above the diagonal are computed.
        assert 1.0 < counts["flops"] / model < 2.0
        assert counts["loops_of_unknown_length"] == 0
        assert counts["collectives"]
        assert counts["sent"] == sum(row["sent"] for row in counts["collectives"])
        assert all(row["group"] in (2, 4) for row in counts["collectives"])


@pytest.mark.slow
def test_hours_follow_from_the_estimate(planned):
    sft, preference = planned[1]["stages"]
    assert preference["run"]["updates"] == 7
    assert sft["run"]["updates"] == 2 * (100 // 8)
    for stage in (sft, preference):
        found, run = stage["estimate"], stage["run"]
        parts = [found[k] for k in ("compute", "memory", "interconnect")]
        assert (found["overlapped"], found["serial"]) == (max(parts), pytest.approx(sum(parts)))
        hours = [found[k] * run["updates"] / 3600 for k in ("overlapped", "serial")]
        assert run["hours"] == pytest.approx(hours)


@pytest.mark.slow
def test_a_machine_that_is_too_small_is_status_1(folder, capsys):
    status = main(arguments(folder, "--stage", "sft", "--hbm", "0.00001", "--full"))
    said = capsys.readouterr().out
    assert status == 1
    assert "DOES NOT FIT cpu:4" in said
    assert "every array" in said
    assert "no estimate of time" in said
    assert "(-, fsdp, -)" in said


@pytest.mark.slow
def test_a_refusal_of_the_compiler_is_a_result(folder, monkeypatch, capsys):
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (39.69G) exceeds available HBM (15.75G). HLO module: jit_f."
    )

    def refuse(*_):
        raise DoesNotFit(message)

    monkeypatch.setattr("spo_jax.plan.stage_plan.compile_assembled", refuse)
    file = folder / "refused.json"
    assert main(arguments(folder, "--stage", "preference", "--json", file)) == 1
    assert "DOES NOT FIT cpu:4: the compiler refuses it, 39.69 GiB of 15.75" in (
        capsys.readouterr().out
    )
    memory = json.loads(file.read_text())["stages"][0]["memory"]
    assert memory["needed"] == pytest.approx(39.69 * 2**30, abs=1)


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        ("Used 18.50G of 15.75G hbm. Exceeded hbm capacity by 2.75G", 18.5, 15.75),
        ("the total memory required for HLO temporaries (512.0M) exceeds available HBM (0.25G)",
         0.5, 0.25),
        ("RESOURCE_EXHAUSTED: something new", None, None),
    ],
)  # fmt: skip
def test_sizes_of_a_refusal(message, needed, available):
    refused = DoesNotFit(message)
    expected = [None if n is None else round(n * 2**30) for n in (needed, available)]
    assert [refused.needed, refused.available] == expected


@pytest.mark.slow
def test_a_program_that_cannot_be_read_still_has_its_memory(folder, monkeypatch, capsys):
    def fail(text):
        raise Unreadable("KeyError: 'new'")

    monkeypatch.setattr("spo_jax.plan.stage_plan.count", fail)
    assert main(arguments(folder, "--stage", "preference", "--chip", "v5e")) == 0
    said = capsys.readouterr().out
    assert "could not be read, so nothing is counted: KeyError: 'new'" in said
    assert "fits cpu:4" in said


# Search


@pytest.mark.long
def test_a_search_prints_what_it_tries_and_ends_with_keys(folder, capsys):
    file = folder / "search.json"
    words = ["--search", "--budget", 2, "--chip", "v5e", "--json", file]
    assert main(arguments(folder, *words)) == 0
    record = json.loads(file.read_text())["search"]
    assert len(record["tried"]) == 2
    said = capsys.readouterr().out
    keys = record["best"].split()
    assert record["best"] in said
    assert "budget of 2 compiles spent" in said
    assert main(arguments(folder, "--stage", "preference", "--chip", "v5e", *keys)) == 0


def test_a_search_of_what_cannot_fit_compiles_nothing(folder, capsys, monkeypatch):
    monkeypatch.setattr("spo_jax.plan.search.plan_stage", None)
    assert main(arguments(folder, "--search", "--hbm", "0.00001")) == 1
    said = capsys.readouterr().out
    assert "mesh 1 x 4 x 1 not compiled: arguments and a gradient alone are" in said
    assert "nothing that was tried fits" in said


# What is refused


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--stage", "baseline"], "has sft, preference; add it with --stages '[baseline]'"),
        (["--mesh.fsdp", "3"], "mesh.fsdp=3, mesh.tensor=1 does not fit 4 devices"),
        (["--train.batch_size", "18"], "train.batch_size=18 does not divide over 4 data shards"),
        (["--sft.batch_size", "6"], "sft.batch_size=6 does not divide over 4 data shards"),
        (["--budget", "3"], "--budget would be ignored: give --search too"),
        (["--search", "--full"], "--full would be ignored with --search"),
        (["--search"], "--search needs the memory of cpu:4"),
        (["--chip", "h900"], "--chip h900 is unknown: choose one of v4, v5e"),
        (["--prompt-length", "0"], "--prompt-length 0: expected a positive number"),
        (["--architecture", "no.json"], "--architecture no.json: there is no such file"),
        (["--learning", "1"], "unknown key learning"),
        (["--topology", "v5e-8"], "expected KIND:SHAPE, such as v5e:2x4"),
        (["--topology", "cpu:2x2"], "expected a number of devices, cpu:8 say"),
        (["--topology", "cpu:9"], "there are 8 simulated CPU devices"),
        (["--topology", "v5e:2x4", "--chip", "v5e"], "names its chips already"),
    ],
)
def test_wrong_input_is_status_2_and_one_line(folder, words, text, capsys):
    more = ["--stage", "sft"] if words[0] == "--sft.batch_size" else []
    if words[0] == "--train.batch_size":
        more = ["--stage", "preference"]
    assert main(arguments(folder, *more, *words)) == 2
    said = capsys.readouterr().err
    assert text in said
    assert said.count("\n") == 1


def test_a_search_without_a_mesh_says_what_to_change(folder, capsys):
    words = ["--search", "--hbm", "1", "--train.batch_size", "6", "--model.remat", "none"]
    status = main(arguments(folder, *words, "--train.gradient_accumulation", "1", topology="cpu:8"))
    assert status == 2
    assert "choose a multiple of 8 for train.batch_size" in capsys.readouterr().err


def test_an_unknown_chip_needs_its_memory(folder):
    config = checked_config({**TREE, "mesh": {"data": -1}})
    machine = describe_machine("cpu:2")._replace(stand_in=False, kind="Abacus")
    with pytest.raises(ValueError, match=r"'Abacus' is not in the table of chips.*--hbm GIB"):
        plan_stage(config, MODEL, machine, "preference")


# Arithmetic


def test_a_roofline_by_hand():
    chip = CHIPS["v5e"]
    found = roofline(flops=197 * 10**12, traffic=819 * 10**9, sent=100 * 10**9, chip=chip)
    assert found.compute == pytest.approx(1 / EFFICIENCY["compute"])
    assert found.memory == pytest.approx(1 / EFFICIENCY["memory"])
    # 400 GB/s both ways over two axes: 100 GB/s one way along one.
    assert found.interconnect == pytest.approx(1 / EFFICIENCY["interconnect"])
    assert found.overlapped == max(found[:3])
    assert found.serial == pytest.approx(sum(found[:3]))


def test_a_chip_of_two_devices_is_shared():
    chip = CHIPS["tpu7x"]
    whole = chip._replace(devices=1)
    assert chip.device_hbm == 96 * 2**30
    one, both = (roofline(flops=10**12, traffic=10**9, sent=10**9, chip=c) for c in (chip, whole))
    assert one == pytest.approx([2 * x for x in both])


def test_operations_of_the_model_by_hand():
    model = init_model(MODEL)
    rows = Rows("preference", 4, 2, 3, 5)
    layers = 16 * (16 + 8 + 8) + 16 * 16 + 3 * 16 * 32
    tokens, scored = 4 * (3 + 2 * 5), 4 * 2 * 5
    pairs = 4 * 2 * (8 * 9 // 2)
    attention = 2 * 4 * 16 * pairs
    forward = 2 * 2 * layers * tokens + 2 * 16 * 64 * scored + attention
    assert model_flops(model, [rows]) == 3 * forward
    assert model_flops(model, [rows], reference_rows=[rows]) == 4 * forward
    # Of adapters: no gradient of the base's matrices; of attention, which has none, all of it.
    matrices = forward - attention
    found = model_flops(model, [rows], adapters=10)
    assert found == 2 * matrices + 3 * attention + 6 * 10 * rows.tokens


def test_a_window_meets_fewer_keys():
    window = {"model_type": "mistral", "sliding_window": 2}
    plain, local = (init_model({**MODEL, "model_type": "mistral", **extra})
                    for extra in ({"sliding_window": None}, window))  # fmt: skip
    rows = [Rows("sft", 1, 1, 2, 3)]
    assert model_flops(plain, rows) - model_flops(local, rows) == 3 * 2 * 4 * 16 * (15 - 9)


def test_of_experts_those_are_counted_that_a_token_picks():
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    moe = init_model({**MODEL, "model_type": "mixtral", **sizes})
    dense = init_model({**MODEL, "model_type": "mistral", "sliding_window": None})
    rows = [Rows("sft", 1, 1, 2, 3)]
    router, one_more = 16 * 4, 3 * 16 * 32
    assert model_flops(moe, rows) - model_flops(dense, rows) == 3 * 2 * 2 * 5 * (router + one_more)
    extra = count_parameters(moe) - count_parameters(dense)
    assert extra == 2 * (router + 3 * one_more)


def test_default_lengths():
    config = checked_config(TREE)
    assert default_lengths(config.data) == (12, 8)
    assert default_lengths(config.sft_data) == (8, 16)

"""Probes of a stage: what is recorded, while training and from a run's checkpoints."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import yaml

from spo_jax.checkpoints.atomic import write_rows
from spo_jax.cli import main
from spo_jax.config.parsing import ConfigError, read_tree
from spo_jax.config.schema import BUILTIN_TASK, DataConfig, DynamicsConfig, ModelConfig
from spo_jax.config.validation import checked_config
from spo_jax.dynamics.law import with_completions
from spo_jax.dynamics.probes import Probes, probe_rhythm
from spo_jax.dynamics.row_choice import draw_rows, make_probe_set
from spo_jax.losses import make_preference_loss
from spo_jax.objective.levels import make_logprobs_fn, make_objective
from spo_jax.parallel.mesh import make_mesh, place_batch
from spo_jax.policies.loading import load_policy
from spo_jax.policies.rows import prepare_rows
from spo_jax.solvers import make_preference_only
from spo_jax.tasks import arithmetic
from spo_jax.training.trackers import read_lines
from spo_jax.training.update import init_state, jit_step, make_train_step, shard_state
from tests.tiny import ARCHITECTURE

LAW = {
    f"law/{name}"
    for name in (
        *("chosen_norm2", "rejected_norm2", "inner_product", "cosine", "chosen_coefficient"),
        *("rejected_coefficient", "chosen_rate", "rejected_rate"),
    )
}
SIDES = ("chosen", "rejected")
MEASURED = {f"update/{side}_measured" for side in SIDES}
PREDICTED = {f"update/{side}_predicted" for side in SIDES} | {
    f"own_step/{side}_{how}" for side in SIDES for how in ("predicted", "measured")
}
BRANCHES = ("chosen", "rejected", "greedy", "sampled")
MASS = {f"logprobs/{branch}" for branch in BRANCHES} | {
    f"{kind}/{branch}" for kind in ("entropy", "top_mass") for branch in ("chosen", "sampled")
}
RATIOS = {f"log_ratio/{branch}" for branch in BRANCHES}
TEXT = {"repetition", "distinct_1", "distinct_2", "distinct_3"}


def write_pairs(path, count=24):
    """Sums with a wrong last digit as rejected."""
    sizes = {"preference": 0, "test": 0, "validation": 0}
    problems = arithmetic.make_problems(digits=2, sft=count, **sizes, seed=3).sft
    rows = [
        {"prompt": p.prompt, "chosen": p.completion, "rejected": p.completion[:-1] + wrong}
        for p, wrong in zip(problems, "0123456789" * 3, strict=False)
        if not p.completion.endswith(wrong)
    ]
    write_rows(path, rows)
    return rows


# Without a trainer

DPO = make_preference_loss("dpo", beta=0.1)


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def make_bench(folder, mesh, learning_rate=0.05, **model):
    """Probes, a state and its update on ``mesh``: DPO by plain gradient descent."""
    section = ModelConfig(tokenizer=BUILTIN_TASK, init=ARCHITECTURE, **model)
    policy = load_policy(section, mesh, seed=0, work=folder / "model")
    write_pairs(folder / "pairs.jsonl")
    data = DataConfig(train=str(folder / "pairs.jsonl"), completion_buckets=(24,))
    rows = prepare_rows(data, "preference", policy.tokenizer, seed=0, name="data")
    objective = make_objective(make_logprobs_fn(policy.model, chunk_tokens=64), DPO)
    optimizer = optax.sgd(learning_rate)
    solver = make_preference_only(outer=optimizer)
    step = make_train_step(objective, solver, schedule=optax.constant_schedule(learning_rate))
    init = partial(init_state, solver, objective)
    state, shardings = shard_state(init, mesh, policy.params, jax.random.PRNGKey(0))
    settings = DynamicsConfig(every=1, pairs=5, samples=5, own_step_rate=1e-3)
    probe_set = make_probe_set(
        rows, None, pairs=settings.pairs, batch_size=8, sft_batch_size=8, seed=0
    )
    probes = Probes(
        settings,
        policy,
        DPO,
        probe_set,
        seed=0,
        mesh=mesh,
        chunk_tokens=64,
        frozen_in_batch=True,
        reference=lambda: policy.params,
    )
    return probes, state, jit_step(step, shardings), probe_set, rows


def values(record):
    return {name: np.array(x, float) for name, x in record["pairs"].items()}


@pytest.mark.long
def test_one_and_eight_devices_agree(tmp_path):
    found = []
    for mesh in (one_device(), make_mesh(data=2, fsdp=2, tensor=2)):
        probes, state, step, *_ = make_bench(tmp_path, mesh)
        state, _ = step(state, probes._update_batch)
        found.append(probes.record(state, step))
    one, eight = found
    for name, value in values(one).items():
        np.testing.assert_allclose(values(eight)[name], value, rtol=2e-3, atol=2e-4, err_msg=name)
    for key in ("samples", "row_ids", "settings"):
        assert one[key] == eight[key]
    # Something moved, so that the agreement is not that of zeros.
    assert np.abs(values(one)["update/chosen_measured"]).max() > 0.05
    assert np.abs(values(one)["log_ratio/chosen"]).max() > 0.05


@pytest.mark.long
def test_probing_changes_nothing_and_compiles_no_second_update(tmp_path):
    mesh = one_device()
    probes, state, step, probe_set, _ = make_bench(tmp_path, mesh)
    before = jax.tree.map(np.array, state)  # copies: a view would keep buffers from donation
    first = probes.record(state, step)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
    assert probes.record(state, step) == first
    # A batch of training is of the same shape, dtype and place.
    frozen = np.zeros((8, 2), np.float32)
    pairs = probe_set.batch.preference._replace(reference_logprobs=frozen)
    step(state, place_batch(probe_set.batch._replace(preference=pairs), mesh))
    assert step._cache_size() == 1


def test_text_is_counted_without_eos_and_padding(tmp_path):
    probes, *_, probe_set, _ = make_bench(tmp_path, one_device())
    eos, pad = 1, 0
    generated = np.full((5, 2, 4), pad)
    generated[:, 0, :2] = 4, eos
    generated[:, 1] = 5, 6, 7, 8  # cut short, so without its EOS
    pairs = jax.tree.map(jnp.asarray, probe_set.pairs)
    rows = probes._trimmed(
        jax.device_get(with_completions(pairs, jnp.asarray(generated), eos_id=eos))
    )
    assert [row["greedy"] for row in rows] == [[4]] * 5
    assert [row["sampled"] for row in rows] == [[5, 6, 7, 8]] * 5
    texts = [json.loads(x) for x in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    for row, index in zip(rows, probe_set.pairs.row_ids, strict=True):
        for name in ("prompt", "chosen", "rejected"):
            # This tokenizer makes a token of each character.
            assert len(row[name]) == len(texts[index][name])
            assert not {eos, pad} & set(row[name])


@pytest.mark.long
def test_predictions_hold(tmp_path):
    probes, state, step, *_ = make_bench(tmp_path, one_device(), learning_rate=1e-3)
    found = values(probes.record(state, step))
    for what in ("own_step", "update"):
        for side in SIDES:
            predicted, measured = (
                found[f"{what}/{side}_{how}"] for how in ("predicted", "measured")
            )
            assert np.abs(measured).max() > 1e-4
            np.testing.assert_allclose(predicted, measured, rtol=0.1, atol=2e-5)


@pytest.mark.long
def test_sixteen_bits(tmp_path):
    """What is stored and trained in 16 bits is measured in 32."""
    half = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16"}
    probes, state, step, *_ = make_bench(tmp_path, one_device(), **half)
    found = values(probes.record(state, step))
    assert set(found) == LAW | MEASURED | PREDICTED | MASS | RATIOS
    np.testing.assert_array_equal(found["log_ratio/sampled"], 0)
    for side in SIDES:
        own = (found[f"own_step/{side}_{how}"] for how in ("predicted", "measured"))
        np.testing.assert_allclose(*own, rtol=0.1, atol=2e-5)
        update = (found[f"update/{side}_{how}"] for how in ("predicted", "measured"))
        np.testing.assert_allclose(*update, rtol=0.3, atol=2e-2)


def test_rows_are_drawn_once_and_for_all(tmp_path):
    *_, probe_set, rows = make_bench(tmp_path, one_device())
    ids = probe_set.batch.preference.row_ids
    np.testing.assert_array_equal(ids[:5], probe_set.pairs.row_ids)
    assert len(set(ids.tolist())) == 8
    size = len(rows.train)
    whole = draw_rows(rows, size, seed=0)
    np.testing.assert_array_equal(whole[:8], ids)
    assert sorted(whole) == list(range(size))
    assert draw_rows(rows, size, seed=1).tolist() != whole.tolist()
    with pytest.raises(ValueError, match=rf"{size + 1} rows are wanted .* {size} training rows"):
        draw_rows(rows, size + 1, seed=0)


def test_rhythm():
    assert probe_rhythm(7, 100) == 7
    assert [probe_rhythm("auto", steps) for steps in (1, 25, 150, 1000)] == [1, 1, 8, 50]


# A run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of both stages of pairs, trained with probes on."""
    folder = tmp_path_factory.mktemp("probed")
    write_pairs(folder / "pairs.jsonl")
    tree = {
        "output_dir": str(folder / "run"),
        "stages": ["preference", "baseline"],
        "model": {"tokenizer": BUILTIN_TASK, "init": ARCHITECTURE},
        "data": {"train": str(folder / "pairs.jsonl"), "completion_buckets": [24]},
        "loss": {"name": "dpo", "beta": 0.1},
        "reference": {"cache_dir": str(folder / "cache")},
        "outer": {"learning_rate": 1e-3, "schedule": "constant"},
        "train": {"steps": 4, "batch_size": 8, "save_every": 2, "keep_checkpoints": 3},
        "dynamics": {"pairs": 5, "samples": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["dynamics", str(path)]) == 0
    return path, folder / "run"


def lines_of(folder, stage):
    return read_lines(folder / stage / "dynamics.jsonl")


@pytest.mark.long
def test_what_is_recorded(run, capsys):
    path, folder = run
    pairs = [json.loads(line) for line in (path.parent / "pairs.jsonl").read_text().splitlines()]
    found = {stage: lines_of(folder, stage) for stage in ("preference", "baseline")}
    for lines in found.values():
        assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
        for line in lines:
            assert set(line["pairs"]) == LAW | MEASURED | PREDICTED | MASS | RATIOS
            assert {len(x) for x in line["pairs"].values()} == {5}
            assert set(line["summary"]) == set(line["pairs"]) | TEXT
            for name, x in line["pairs"].items():
                np.testing.assert_allclose(line["summary"][name], np.mean(x), rtol=1e-5, atol=1e-8)
            assert len(line["row_ids"]) == 5
            assert len(line["samples"]) == 2
            for row, sample in zip(line["row_ids"], line["samples"], strict=False):
                assert set(sample) == {"prompt", *BRANCHES}
                assert {k: sample[k] for k in pairs[row]} == pairs[row]
        start = values(lines[0])
        for name in RATIOS:
            np.testing.assert_array_equal(start[name], 0)
        assert values(lines[-1])["log_ratio/chosen"].any()
    # Stages begin alike and part.
    start, end = ([values(found[stage][i]) for stage in found] for i in (0, -1))
    assert found["preference"][0]["row_ids"] == found["baseline"][0]["row_ids"]
    for name in LAW | MASS:
        np.testing.assert_array_equal(*(x[name] for x in start))
    assert (end[0]["logprobs/chosen"] != end[1]["logprobs/chosen"]).any()


@pytest.mark.slow
def test_the_same_row_draws_alike_while_the_policy_does_not_move(run):
    first, second = lines_of(run[1], "preference")[0], lines_of(run[1], "baseline")[0]
    assert first["samples"] == second["samples"]


@pytest.mark.slow
def test_log_ratios_are_counted_from_the_start(run):
    first, *_, last = (values(line) for line in lines_of(run[1], "preference"))
    for branch in ("chosen", "rejected"):
        moved = last[f"logprobs/{branch}"] - first[f"logprobs/{branch}"]
        assert np.abs(moved).max() > 1e-2
        np.testing.assert_allclose(last[f"log_ratio/{branch}"], moved, rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_training_does_not_notice(run, tmp_path):
    path, folder = run
    tree = read_tree(path)
    del tree["dynamics"]
    other = tmp_path / "config.yaml"
    other.write_text(yaml.safe_dump({**tree, "output_dir": str(tmp_path / "run")}))
    assert main(["train", str(other)]) == 0
    assert not list((tmp_path / "run").glob("*/dynamics.jsonl"))
    for stage in ("preference", "baseline"):
        states = [
            ocp.PyTreeCheckpointer().restore(root / stage / "checkpoints" / "4" / "state")
            for root in (folder, tmp_path / "run")
        ]
        jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.long
def test_a_run_is_probed_as_training_probed_it(run, tmp_path, capsys):
    """Moved, without the model it started from, and probed again: the same to the last bit."""
    _, folder = run
    copy = tmp_path / "moved"
    shutil.copytree(folder, copy)
    for stage in ("preference", "baseline"):
        (copy / stage / "dynamics.jsonl").unlink()
    assert main(["dynamics", str(copy)]) == 0
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith(f"Next: spo-jax report {copy}")
    for stage in ("preference", "baseline"):
        assert str(copy / stage / "dynamics.jsonl") in shown
        kept = [line for line in lines_of(folder, stage) if line["step"] in (2, 4)]
        assert lines_of(copy, stage) == kept
    # One stage alone, again, with more of the lines there: they stay.
    shutil.copy(folder / "baseline" / "dynamics.jsonl", copy / "baseline" / "dynamics.jsonl")
    assert main(["dynamics", str(copy / "baseline")]) == 0
    assert lines_of(copy, "baseline") == lines_of(folder, "baseline")
    assert main(["dynamics", str(copy / "baseline"), "--dynamics.pairs", "4"]) == 2
    assert "probings of another kind" in capsys.readouterr().err


@pytest.mark.long
def test_resuming_drops_what_is_done_again(run, tmp_path):
    _, folder = run
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "preference" / "checkpoints" / "4")
    file = copy / "preference" / "dynamics.jsonl"
    expected = lines_of(copy, "preference")
    # That of step 2 was not written before the end came; that of step 3 is half there.
    kept = [json.dumps(line) for line in expected]
    file.write_text("\n".join([kept[0], kept[1], kept[3], kept[4][:99]]) + "\n")
    config = tmp_path / "config.yaml"
    tree = {**read_tree(run[0]), "output_dir": str(copy), "stages": ["preference", "baseline"]}
    config.write_text(yaml.safe_dump(tree))
    assert main(["dynamics", str(config), "--resume"]) == 0
    assert lines_of(copy, "preference") == expected
    assert lines_of(copy, "baseline") == lines_of(folder, "baseline")


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        (
            {"reference.mode": "online", "dynamics.gradients": "head",
             "dynamics.max_new_tokens": 1},
            LAW | MEASURED | MASS | RATIOS,
        ),
        (
            {"loss": {"name": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5},
             "reference.mode": "none", "objective.inner_value": "running_min",
             "dynamics.gradients": "none"},
            MEASURED | MASS,
        ),
        (
            {"loss": {"name": "alphadpo", "beta": 2.0, "gamma_beta_ratio": 0.3, "alpha": 0.1},
             "objective.inner_data": "sft"},
            LAW | MEASURED | PREDICTED | MASS | RATIOS,
        ),
    ],
    ids=["online and head", "no reference and no gradients", "inner data of its own"],
)  # fmt: skip
@pytest.mark.long
def test_other_ways_to_train_are_probed(run, tmp_path, extra, names):
    tree = {**read_tree(run[0]), "output_dir": str(tmp_path / "run"), "stages": ["preference"]}
    if "reference.mode" in extra:
        tree["reference"] = {}
    if "objective.inner_data" in extra:
        tree["sft_data"] = {"train": tree["data"]["train"], "completion_buckets": [24]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**tree, "train": {"steps": 1, "batch_size": 8}}))
    arguments = [x for k, v in extra.items() for x in (f"--{k}", json.dumps(v))]
    assert main(["dynamics", str(path), *arguments]) == 0
    lines = read_lines(tmp_path / "run" / "dynamics.jsonl")
    assert [line["step"] for line in lines] == [0, 1]
    for line in lines:
        assert set(line["pairs"]) == names
        assert not any(v is None for x in line["pairs"].values() for v in x)
    assert values(lines[0])["update/chosen_measured"].any()
    if "dynamics.max_new_tokens" in extra:  # of one token, the greedy one is the likeliest
        found = values(lines[1])
        assert (found["logprobs/greedy"] >= found["logprobs/sampled"]).all()
        assert "repetition" not in lines[1]["summary"]
    (tmp_path / "run" / "dynamics.jsonl").unlink()
    assert main(["dynamics", str(tmp_path / "run"), *arguments]) == 0
    assert read_lines(tmp_path / "run" / "dynamics.jsonl") == lines[1:]


# Wrong input


def fails(arguments, capsys, *words):
    assert main(["dynamics", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for word in words:
        assert word in error, error


@pytest.mark.slow
def test_wrong_runs_are_one_clear_error(run, tmp_path, capsys):
    path, folder = run
    fails([tmp_path], capsys, str(tmp_path), "not the folder of a run", "output_dir")
    fails([folder, "--resume"], capsys, "--resume would be ignored")
    fails([folder, "--dynamics.every", 2], capsys, "dynamics.every would be ignored")
    fails([folder, "--dynamics.pair", 2], capsys, "dynamics.pair", "did you mean 'pairs'")
    fails([folder, "--dynamics.pairs", 99], capsys, "99 rows are wanted")
    fails([folder, "--dynamics.top_k", 99], capsys, "dynamics.top_k=99", "17 tokens")
    fails([folder, "--stages", "[sft]"], capsys, "no stage of pairs")
    fails([path, "--stages", "[sft]"], capsys, "no stage of pairs")
    copy = tmp_path / "copy"
    shutil.copytree(folder / "preference", copy / "preference")
    shutil.rmtree(copy / "preference" / "reference")
    fails([copy], capsys, str(copy / "preference" / "reference"), "is missing")
    shutil.move(copy / "preference", copy / "sft")
    fails([copy], capsys, str(copy), "no stage of pairs")


def test_wrong_configurations_are_one_clear_error(tmp_path, capsys):
    fails([tmp_path / "none.yaml"], capsys, "none.yaml", "no configuration")
    fails([tmp_path / "none"], capsys, "none", "no configuration and no run")
    fails([], capsys, "name a configuration")


BASE = {
    "model": {"path": "m"},
    "data": {"train": "d"},
    "train": {"steps": 1},
}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"pairs": 8}, "dynamics would be ignored: dynamics.every is not set"),
        ({"every": 0}, r"dynamics.every=0"),
        ({"every": "automatic"}, r"auto"),
        ({"every": 1, "pairs": 0}, "dynamics.pairs=0"),
        ({"every": 1, "samples": -1}, "dynamics.samples=-1"),
        ({"every": 1, "temperature": 0}, "temperature=0.0.*greedy completion is probed anyway"),
        ({"every": 1, "own_step_rate": float("inf")}, "own_step_rate=inf"),
        ({"every": 1, "max_new_tokens": 0}, "max_new_tokens=0"),
        ({"every": 1, "top_k": 0}, "top_k=0"),
        ({"every": 1, "gradients": "heads"}, "did you mean 'head'"),
        ({"every": 1, "gradients": "head", "own_step_rate": 1.0}, "own_step_rate would be ignored"),
    ],
)
def test_settings_that_cannot_be_are_refused(section, words):
    with pytest.raises(ConfigError, match=words):
        checked_config({**BASE, "dynamics": section})


def test_settings_that_can():
    assert checked_config(BASE).dynamics.every is None
    assert checked_config({**BASE, "dynamics": {"every": "auto"}}).dynamics.every == "auto"
    # Turned off on the command line, whatever else is set.
    off = checked_config({**BASE, "dynamics": {"every": 5, "pairs": 3}}, **{"dynamics.every": None})
    assert off.dynamics.every is None
    with pytest.raises(ConfigError, match="dynamics would be ignored: no stage is preference"):
        checked_config(
            {
                "model": {"path": "m"},
                "stages": ["sft"],
                "sft_data": {"train": "d"},
                "sft": {"steps": 1},
                "dynamics": {"every": 1},
            }
        )

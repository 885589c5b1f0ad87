"""Rounds of pairs and training: each from where the one before ended, gone on with, carried on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from spo_jax.cli import main
from spo_jax.config.parsing import ConfigError
from spo_jax.config.schema import ModelConfig
from spo_jax.parallel.mesh import make_mesh
from spo_jax.policies.loading import load_policy
from spo_jax.study import iterated
from spo_jax.study.iterated import (
    extrapolate,
    folder_of,
    policy_path,
    read_rounds,
    round_config,
    rounds_table,
    run_rounds,
)
from spo_jax.tasks import arithmetic
from tests.runs import finish, start_several
from tests.study.test_study import TREE
from tests.tiny import ARCHITECTURE

RUN = {
    **{key: TREE["run"][key] for key in ("model", "data", "task", "outer")},
    "answers": {"max_new_tokens": 12},
    "reference": {"mode": "online"},
    "train": {"steps": 2, "batch_size": 8},
}


OF_FILES = {
    **{key: RUN[key] for key in ("outer", "reference", "train")},
    "model": {"path": "start"},
    "data": {"max_completion_length": 16},
}


def written(folder, **keys):
    path = folder / "rounds.yaml"
    tree = {"output_dir": str(folder / "out"), "rounds": 2, "run": RUN, **keys}
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_policy_is_carried_on_as_its_log_probs_are(alpha):
    """pi ~ pi_new (pi_new / pi_old)^alpha, of policies that are log-linear in their parameters."""
    features = jax.random.normal(jax.random.key(0), (7, 3))
    new, old = (jax.random.normal(jax.random.key(i), (3,)) for i in (1, 2))

    def logprobs(params):
        return jax.nn.log_softmax(features @ params)

    expected = (1 + alpha) * logprobs(new) - alpha * logprobs(old)
    expected -= jax.nn.logsumexp(expected)
    found = logprobs(extrapolate({"w": new}, {"w": jnp.copy(old)}, alpha)["w"])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_sixteen_bits_are_carried_on_in_thirty_two():
    new, old = jnp.array([1.0, 3.0], jnp.bfloat16), jnp.array([1.0078125, 1.0], jnp.bfloat16)
    found = extrapolate([new], [jnp.copy(old)], 0.3)[0]
    assert found.dtype == jnp.bfloat16
    expected = np.array([1.0 - 0.3 * 0.0078125, 3.6], np.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_each_round_begins_where_the_one_before_ended(tmp_path):
    plan = read_rounds(written(tmp_path))
    first, second = (round_config(plan, number) for number in (1, 2))
    assert first.model.init == ARCHITECTURE
    assert (second.model.init, second.model.tokenizer) == (None, None)
    assert second.model.path == str(tmp_path / "out" / "round1")
    carried = read_rounds(written(tmp_path, extrapolation=0.3))
    assert round_config(carried, 2).model.path == str(tmp_path / "out" / "round1" / "policy")
    assert first.seed == second.seed  # the same prompts are held out
    assert first.data.train == second.data.train == "builtin:arithmetic"


def test_a_base_loses_what_rounds_have_no_use_for(tmp_path):
    run = {"base": "quickstart", "outer": {"learning_rate": 0.5}}
    config = round_config(read_rounds(written(tmp_path, run=run)), 1)
    assert (config.stages, config.outer.learning_rate) == (("preference",), 0.5)
    assert (config.task.digits, config.sft_data.train) == (3, None)
    own = {**run, "objective": {"inner_data": "sft"}}
    config = round_config(read_rounds(written(tmp_path, run=own)), 1)
    assert config.sft_data.train == "builtin:arithmetic"


def test_each_round_may_have_its_own_problems(tmp_path):
    pairs = {"data": ["a.jsonl", "b.jsonl"], "task": "gsm8k"}
    plan = read_rounds(written(tmp_path, run=OF_FILES, pairs=pairs))
    found = [iterated._pair_options(plan, number) for number in (1, 2)]
    assert [rows["data"] for rows, _ in found] == ["a.jsonl", "b.jsonl"]
    assert [settings.seed for _, settings in found] == [0, 1]
    assert round_config(plan, 2).data.train == str(tmp_path / "out" / "round2" / "pairs.jsonl")


PAIRS = {"data": "a.jsonl", "task": "gsm8k"}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"round": 2}, r"unknown key round \(did you mean 'rounds'"),
        ({"rounds": 0}, "rounds=0: expected a whole number"),
        ({"extrapolation": -1}, "extrapolation=-1"),
        ({"run": {**RUN, "stages": ["sft"]}}, "run.stages would be ignored"),
        ({"pairs": PAIRS}, "run.data.train would be ignored"),
        ({"run": {**RUN, "data": {}}}, "pairs is not set"),
        ({"run": OF_FILES, "pairs": {"task": "gsm8k"}}, "pairs.data is not set"),
        ({"run": {**OF_FILES, "model": RUN["model"]}, "pairs": PAIRS}, "run.model.path is not set"),
        (
            {"run": OF_FILES, "pairs": {**PAIRS, "data": ["a.jsonl"]}},
            "1 files for 2 rounds",
        ),
        (
            {"run": {**OF_FILES, "lora": {"rank": 4, "quantize": "nf4"}}, "pairs": PAIRS},
            "run.lora.quantize in rounds",
        ),
        ({"run": {**RUN, "train": {"steps": 2, "bach_size": 8}}}, "round 1: unknown key"),
    ],
)
def test_what_cannot_be_run_is_named(tmp_path, keys, said):
    with pytest.raises(ConfigError, match=said):
        read_rounds(written(tmp_path, **keys))


def test_a_table_has_what_was_measured():
    found = [
        {"round": 0, "accuracy": 0.5},
        {"round": 1, "pairs": 12, "accuracy": 0.625, "log_ratio/chosen": -0.2, "seconds": 3.0},
    ]
    assert rounds_table(found).splitlines() == [
        "| round | pairs | exact answers % | chosen log-ratio | seconds |",
        "|---|---|---|---|---|",
        "| start | – | 50.0 | – | – |",
        "| 1 | 12 | 62.5 | -0.20 | 3 |",
    ]


def params_of(path):
    mesh = make_mesh()
    policy = load_policy(ModelConfig(path=str(path)), mesh, seed=0, work=path / "look")
    return jax.tree.map(np.asarray, policy.params)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Two rounds that are carried on."""
    path = written(tmp_path_factory.mktemp("rounds"), extrapolation=0.5)
    assert main(["rounds", str(path)]) == 0
    return path


@pytest.mark.long
def test_rounds_are_carried_on_from_what_they_were_trained_to(done):
    plan = read_rounds(done)
    trained = [params_of(folder_of(plan, k)) for k in (1, 2)]
    carried = [params_of(folder_of(plan, k) / "policy") for k in (1, 2)]
    # The second from the first round's own result, not from where that was carried on to.
    expected = jax.tree.map(lambda new, old: new + 0.5 * (new - old), trained[1], trained[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), carried[1], expected
    )
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), carried[0], trained[0])
    assert max(jax.tree.leaves(moved)) > 1e-5
    saved = yaml.safe_load((folder_of(plan, 2) / "config.yaml").read_text())
    assert saved["model"]["path"] == policy_path(plan, 1)


@pytest.mark.long
@pytest.mark.parametrize("extrapolation", [0.0, 0.5])
def test_each_round_trains_adapters_on_what_the_one_before_left(done, tmp_path, extrapolation):
    model = {"path": policy_path(read_rounds(done), 1)}
    run = {**RUN, "model": model, "lora": {"rank": 2}, "outer": {"learning_rate": 1e-2}}
    path = written(tmp_path, run=run, extrapolation=extrapolation)
    assert main(["rounds", str(path)]) == 0
    plan = read_rounds(path)
    base = json.loads((folder_of(plan, 2) / "base.json").read_text())
    assert base["path"] == policy_path(plan, 1)
    one, two = (params_of(folder_of(plan, k)) for k in (1, 2))
    began = params_of(folder_of(plan, 1) / "policy") if extrapolation else one
    moved = jax.tree.map(lambda new, old: float(np.abs(new - old).max()), two, began)
    assert moved["embed"] == 0  # no adapter there
    assert max(jax.tree.leaves(moved)) > 1e-4
    if extrapolation:
        carried = params_of(folder_of(plan, 2) / "policy")
        expected = jax.tree.map(lambda new, old: new + 0.5 * (new - old), two, one)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), carried, expected
        )


@pytest.mark.long
def test_finished_rounds_are_kept_and_other_settings_named(done, capsys, monkeypatch):
    before = (done.parent / "out" / "table.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(iterated, "train", None)
        assert main(["rounds", str(done), "--resume"]) == 0  # as of a run: it goes on anyway
    assert (done.parent / "out" / "table.md").read_text() == before
    assert "exact answers %" in before
    assert "extrapolated %" in before
    capsys.readouterr()
    assert main(["rounds", str(done), "--run.outer.learning-rate", "0.1"]) == 2
    said = capsys.readouterr().err
    assert "round1 was run with other settings: outer.learning_rate: 0.001 -> 0.1" in said


def test_what_is_begun_is_not_gone_on_with_otherwise(tmp_path, monkeypatch):
    """Its pairs are of the settings it was begun with; the start is graded anew for others."""
    graded = []
    monkeypatch.setattr(iterated, "_graded", lambda config, policy: graded.append(1) or {})
    monkeypatch.setattr(iterated, "train", lambda config, resume: 1 / 0)
    path = written(tmp_path)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            run_rounds(read_rounds(path))
    assert len(graded) == 1
    for kept in sorted((tmp_path / "out").rglob("*.json")):  # as an older version wrote it
        result = json.loads(kept.read_text())
        del result["settings"]["run"]["train"]["max_skipped"]
        kept.write_text(json.dumps(result))
    with pytest.raises(ZeroDivisionError):
        run_rounds(read_rounds(path))
    assert len(graded) == 1
    with pytest.raises(ValueError, match=r"with other settings: train\.steps: 2 -> 3"):
        run_rounds(read_rounds(path, {"run.train.steps": 3}))
    assert len(graded) == 2


@pytest.mark.long
def test_a_round_that_stopped_goes_on_to_the_same_end(done, tmp_path):
    """Stopped behind its pairs and behind its training."""
    path = written(tmp_path, extrapolation=0.5)
    first = read_rounds(path, {"rounds": 1})
    run_rounds(first)
    (folder_of(first, 1) / "result.json").unlink()
    (folder_of(first, 1) / "policy" / "model.safetensors").unlink()
    assert main(["rounds", str(path)]) == 0
    one, other = read_rounds(done), read_rounds(path)
    for number in (1, 2):
        found = [params_of(folder_of(plan, number) / "policy") for plan in (one, other)]
        jax.tree.map(np.testing.assert_array_equal, *found)


def write_problems(folder):
    """Sums as a file, and the section ``pairs`` of it."""
    problems = [arithmetic.solve(a, b, 1) for a in range(4) for b in range(4)]
    file = folder / "problems.jsonl"
    lines = [json.dumps({"prompt": p.prompt, "completion": p.completion}) for p in problems]
    file.write_text("\n".join(lines))
    return {"data": str(file), "task": "arithmetic", "samples": 2, "max_new_tokens": 12,
            "cut_off": "keep"}  # fmt: skip


@pytest.mark.long
def test_pairs_of_a_file_are_made_anew_by_each_round(tmp_path):
    pairs, start = write_problems(tmp_path), tmp_path / "start"
    one = written(tmp_path)
    run_rounds(read_rounds(one, {"rounds": 1, "output_dir": str(start)}))
    run = {**OF_FILES, "model": {"path": str(start / "round1")}}
    path = written(tmp_path, run=run, pairs=pairs)
    assert main(["rounds", str(path)]) == 0
    files = [(tmp_path / "out" / f"round{k}" / "pairs.jsonl").read_text() for k in (1, 2)]
    assert all(text.count("\n") >= 8 for text in files)
    assert files[0] != files[1]


@pytest.mark.long
def test_two_processes_make_the_rounds_of_one(done, tmp_path):
    """Pairs of the built-in task and of a file, trained on and carried on."""
    options = {"command": "rounds", "log": tmp_path / "two"}

    def together(path, folder):
        found = finish(start_several(path, folder, 2, **options), 300)
        assert found == [0, 0], "\n".join(p.read_text() for p in tmp_path.glob("two.*.log"))
        assert not list(folder.rglob(".work_*"))

    two = tmp_path / "two"
    together(done, two)
    plan = read_rounds(done)
    for number in (1, 2):
        folders = [
            folder_of(x, number) for x in (plan, read_rounds(done, {"output_dir": str(two)}))
        ]
        one, other = (json.loads((x / "result.json").read_text())["figures"] for x in folders)
        assert set(one) == set(other)
        for name in set(one) - {"seconds", "tokens_per_second", "data_wait_share"}:
            np.testing.assert_allclose(other[name], one[name], rtol=2e-3, atol=2e-4, err_msg=name)
        found = [params_of(x / "policy") for x in folders]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *found)

    model = {"path": policy_path(plan, 1)}
    path = written(
        tmp_path, run={**OF_FILES, "model": model}, pairs=write_problems(tmp_path), rounds=1
    )
    assert main(["rounds", str(path)]) == 0
    together(path, tmp_path / "of_file")
    files = [tmp_path / name / "round1" / "pairs.jsonl" for name in ("out", "of_file")]
    assert files[0].read_text() == files[1].read_text()

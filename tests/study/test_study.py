"""The grid of a study: its cells, what is refused, running, resuming, failing, evidence."""

import json

import jax
import pytest
import yaml

from spo_jax.cli import main
from spo_jax.config.parsing import ConfigError
from spo_jax.study import read_evidence, read_study, run_study
from spo_jax.study.grid import resolved, run_cells, start_cells
from spo_jax.study.runner import _last_line, _shares, read_result
from spo_jax.study.worker import set_up
from tests.tiny import ARCHITECTURE

SHORT = {"max_completion_length": 16, "completion_buckets": [16]}
TREE = {
    "title": "tiny",
    "run": {
        "model": {"tokenizer": "builtin:arithmetic", "init": ARCHITECTURE},
        "sft_data": {"train": "builtin:arithmetic", **SHORT},
        "data": {"train": "builtin:arithmetic", **SHORT},
        "task": {
            "digits": 1,
            "sft_problems": 40,
            "preference_problems": 24,
            "test_problems": 8,
            "validation_problems": 6,
            "samples": 1,
        },
        "answers": {"every": 1, "max_new_tokens": 12},
        "sft_optimizer": {"learning_rate": 1e-2},
        "sft": {"steps": 2, "batch_size": 8},
        "outer": {"learning_rate": 1e-3},
        "train": {"steps": 2, "batch_size": 8, "eval_every": 1},
    },
    "seeds": [0, 3],
    "losses": {"DPO": {"name": "dpo", "beta": 0.1}},
    "variants": {
        "plain": {"solver": {"name": "preference_only"}},
        "SPO": {"solver": {"name": "penalty"}, "sweep": {"solver.penalty_weight": [1, 10]}},
    },
    "controls": {
        "SFT continued": {"solver": {"name": "inner_only"}, "inner": {"learning_rate": 1e-3}}
    },
}


def written(tmp_path, **keys):
    path = tmp_path / "study.yaml"
    tree = {**TREE, "output_dir": str(tmp_path / "out"), **keys}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_a_result_of_an_older_version_is_read_and_one_of_other_settings_is_not(tmp_path):
    """What it did not know was at its default; sections that a run ignores are of no account."""
    path = written(tmp_path)
    cell = start_cells(read_study(path))[0]
    config = resolved(cell)
    del config["sft_data"]["streaming"], config["sft"]["max_skipped"]
    cell.folder.mkdir(parents=True)
    (cell.folder / "result.json").write_text(json.dumps({"config": config, "metrics": {}}))

    def read(changes):
        return read_result(start_cells(read_study(path, changes))[0])

    assert read({})["config"] == config
    assert read({"run.outer.learning_rate": 0.1}) is not None
    with pytest.raises(ValueError, match=r"settings: sft\.max_skipped: 10 -> 5\. Choose"):
        read({"run.sft.max_skipped": 5})


def test_cells_of_the_grid(tmp_path):
    study = read_study(written(tmp_path))
    starts, runs = start_cells(study), run_cells(study)
    assert [cell.name for cell in starts] == ["SFT, seed 0", "SFT, seed 3"]
    assert [cell.name for cell in runs[:4]] == [
        "SFT continued, seed 0",
        "DPO, seed 0",
        "DPO + SPO (penalty_weight 1), seed 0",
        "DPO + SPO (penalty_weight 10), seed 0",
    ]
    assert len(runs) == 8
    assert len({cell.folder for cell in [*starts, *runs]}) == 10
    assert [dict(cell.point) for cell in runs[2:4]] == [
        {"solver.penalty_weight": 1},
        {"solver.penalty_weight": 10},
    ]


def test_runs_differ_in_nothing_but_what_the_grid_says(tmp_path):
    runs = run_cells(read_study(written(tmp_path)))
    plain, weak = resolved(runs[1]), resolved(runs[2])
    different = {k for k in {**plain, **weak} if plain.get(k) != weak.get(k)}
    assert different == {"solver", "output_dir"}
    assert weak["solver"] == {"name": "penalty", "penalty_weight": 1}
    assert plain["model"]["path"] == weak["model"]["path"]
    assert plain["data"]["train"] == weak["data"]["train"]


def test_a_start_has_its_own_keys_and_its_runs_too(tmp_path):
    starts = {"short": {"sft": {"steps": 1}}, "SFT": None}
    study = read_study(written(tmp_path, starts=starts))
    steps = {c.start: resolved(c)["sft"]["steps"] for c in start_cells(study)}
    assert steps == {"short": 1, "SFT": 2}
    short, usual = (next(c for c in run_cells(study) if c.start == name) for name in starts)
    assert resolved(short)["model"]["path"] != resolved(usual)["model"]["path"]
    assert short.name == "short: SFT continued, seed 0"


def test_a_variant_can_be_for_some_losses_only(tmp_path):
    losses = {**TREE["losses"], "IPO": {"name": "ipo", "tau": 0.1, "length_normalized": True}}
    variants = {
        "plain": {"solver": {"name": "preference_only"}},
        "SPO": {"solver": {"name": "penalty"}, "only": ["IPO"]},
    }
    runs = run_cells(read_study(written(tmp_path, losses=losses, variants=variants, seeds=[0])))
    assert [cell.row for cell in runs] == ["SFT continued", "DPO", "IPO", "IPO + SPO"]


def test_a_base_file_gives_what_runs_share(tmp_path):
    run = dict(TREE["run"])
    base = {**run, "output_dir": "runs/x", "stages": ["sft"], "seed": 5}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    path = written(tmp_path, run={"base": "base.yaml", "train": {"steps": 3}})
    study = read_study(path, {"run.train.eval_every": 1, "seeds": [1]})
    config = resolved(run_cells(study)[1])
    assert (config["train"]["steps"], config["train"]["batch_size"]) == (3, 8)
    assert config["seed"] == 1


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"sedes": [1]}, ["unknown key sedes", "did you mean 'seeds'"]),
        ({"baseline": "bare"}, ["baseline='bare'", "plain, SPO"]),
        ({"losses": {}}, ["set both"]),
        ({"seeds": []}, ["expected whole numbers"]),
        ({"controls": {"SFT": {"solver": {"name": "inner_only"}}}}, ["row of the starts"]),
        (
            {"losses": {"DPO": {"name": "dpo", "beta": 0.1}, "dpo": {"name": "dpo", "beta": 1.0}}},
            ["'DPO, seed 0' and 'dpo, seed 0'", "share the folder"],
        ),
        ({"seeds": [1, 1]}, ["named twice"]),
        ({"jobs": 0}, ["jobs=0"]),
        ({"keep_weights": "no"}, ["keep_weights='no'", "true or false"]),
        ({"controls": {"x": {"texts": {"max_rows": 2}}}}, ["texts in x", "incomparable"]),
        ({"run": {**TREE["run"], "seed": 3}}, ["run.seed would be ignored"]),
        ({"controls": {"x": {"task": {"digits": 2}}}}, ["task in x", "incomparable"]),
        ({"losses": {"DPO": {"name": "dpo"}}}, ["DPO, seed 0", "loss.beta"]),
        (
            {"variants": {"plain": {"solver": {"name": "preference_only"}, "only": ["DOP"]}}},
            ["variants.plain.only names 'DOP'", "did you mean 'DPO'"],
        ),
        ({"variants": [1]}, ["variants=[1]", "mapping"]),
        (
            {"variants": {"plain": {"solver": {"name": "preference_only"}, "inner": {}}}},
            ["DPO, seed 0", "inner would be ignored"],
        ),
        (
            {"variants": {"plain": {"sweep": {"train.steps": "many"}}}},
            ["variants.plain.sweep.train.steps='many'", "list of numbers"],
        ),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, keys, parts):
    with pytest.raises(ConfigError) as error:
        read_study(written(tmp_path, **keys))
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_cores_are_shared_evenly(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3, 4}, raising=False)
    assert _shares(2) == [(0, 2, 4), (1, 3)]
    assert _shares(6) == [None] * 6


def test_how_far_a_run_is_is_the_last_that_it_said(tmp_path):
    log = tmp_path / "log.txt"
    assert _last_line(log) == "begins"
    log.write_text("data: 8 rows\npreference 3/40  loss 0.5\n\n")
    assert _last_line(log) == "preference 3/40  loss 0.5"


def test_studies_may_share_compiled_programs(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        for told, used in ((None, tmp_path), (str(tmp_path / "all"), tmp_path / "all")):
            jax.config.update("jax_compilation_cache_dir", told)
            set_up(None, tmp_path)
            assert jax.config.jax_compilation_cache_dir == str(used)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study run to its end, one run after the other."""
    folder = tmp_path_factory.mktemp("study")
    path = written(folder, seeds=[0])
    assert main(["study", str(path)]) == 0
    return path


@pytest.mark.long
class TestRun:
    def test_every_run_has_its_result(self, finished):
        study = read_study(finished)
        evidence = read_evidence(study, command="spo-jax study x")
        assert [record.row for record in evidence.records] == [
            "SFT",
            "SFT continued",
            "DPO",
            "DPO + SPO (penalty_weight 1)",
            "DPO + SPO (penalty_weight 10)",
        ]
        for record in evidence.records:
            assert len(record.right) == 8
            assert record.metrics["accuracy"] == sum(record.right) / 8
            assert {"logprobs/accuracies", "log_ratio/chosen"} <= set(record.metrics)
        start = evidence.records[0]
        assert abs(start.metrics["log_ratio/chosen"]) < 1e-4
        assert evidence.records[2].metrics["log_ratio/chosen"] != 0

    def test_pairs_are_made_once_for_all_runs(self, finished):
        folder = read_study(finished).output_dir
        pairs = [path for path in (finished.parent / "out").rglob("pairs.jsonl")]
        assert [str(p) for p in pairs] == [f"{folder}/starts/sft/seed0/pairs.jsonl"]

    def test_answers_are_graded_on_the_way(self, finished):
        lines = finished.parent / "out" / "runs" / "sft" / "dpo" / "seed0" / "metrics.jsonl"
        lines = [json.loads(line) for line in lines.read_text().splitlines()]
        assert [x["step"] for x in lines if "eval/accuracy" in x] == [0, 1, 2]

    def test_a_page_and_a_table_are_written(self, finished):
        out = finished.parent / "out"
        assert "DPO + SPO (penalty_weight 10)" in (out / "table.md").read_text()
        assert (out / "study.html").is_file()

    def test_the_same_command_again_runs_nothing(self, finished, capsys):
        study = read_study(finished)
        before = [read_result(cell) for cell in run_cells(study)]
        said = []
        assert run_study(study, say=said.append) == []
        assert said == ["tiny: 5 runs, 5 of them done; 1 at a time"]
        assert [read_result(cell) for cell in run_cells(study)] == before

    def test_results_of_other_settings_are_refused(self, finished):
        study = read_study(finished, {"run.outer.learning_rate": 1e-2})
        with pytest.raises(ValueError, match=r"outer\.learning_rate: 0\.001 -> 0\.01.*output-dir"):
            run_study(study, say=lambda text: None)

    def test_validation_problems_are_others(self, finished, tmp_path):
        study = read_study(
            finished,
            {"run.answers.split": "validation", "output_dir": str(tmp_path), "seeds": [0]},
        )
        cell = start_cells(study)[0]
        from spo_jax.study.worker import run_cell

        run_cell(study, cell)
        lines = (cell.folder / "answers.jsonl").read_text().splitlines()
        test = finished.parent / "out" / "starts" / "sft" / "seed0" / "answers.jsonl"
        asked = {json.loads(line)["prompt"] for line in lines}
        assert len(asked) == 6
        assert not asked & {json.loads(line)["prompt"] for line in test.read_text().splitlines()}

    def test_weights_of_finished_runs_need_not_be_kept(self, tmp_path):
        path = written(tmp_path, seeds=[0], losses={}, variants={}, keep_weights=False)
        assert run_study(read_study(path), say=lambda text: None) == []
        study = read_study(path)
        (start,), (run,) = start_cells(study), run_cells(study)
        kept = {"checkpoints", "reference"}
        assert not kept & {path.name for path in run.folder.iterdir()}
        assert (start.folder / "checkpoints").is_dir()
        assert read_result(run)["metrics"]["answer_tokens"] > 0
        assert run_study(study, say=lambda text: None) == []

    def test_a_failing_run_does_not_stop_the_others_and_is_retried(self, finished, tmp_path):
        variants = {"plain": {"solver": {"name": "preference_only"}}}
        path = written(tmp_path, seeds=[0], variants=variants, jobs=2)
        study = read_study(path)
        broken = next(c for c in run_cells(study) if c.row == "DPO")
        broken.folder.mkdir(parents=True)
        (broken.folder / "metrics.jsonl").mkdir()  # no run can write its metrics here
        said = []
        failed = run_study(study, say=said.append)
        assert len(failed) == 1
        assert failed[0].startswith("DPO, seed 0: ")
        assert str(broken.folder / "log.txt") in failed[0]
        assert "Traceback" in (broken.folder / "log.txt").read_text()
        evidence = read_evidence(study, command="")
        assert [r.row for r in evidence.records] == ["SFT", "SFT continued"]
        (broken.folder / "metrics.jsonl").rmdir()
        assert run_study(study, say=said.append) == []
        assert read_result(broken) is not None

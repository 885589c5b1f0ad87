"""Pairs that would displace: listed before training, left out of it, the same ones on resume."""

import json
import shutil

import jax
import numpy as np
import pytest
import yaml

from spo_jax.cli import main
from spo_jax.config.parsing import ConfigError
from spo_jax.config.validation import checked_config
from spo_jax.plan.inputs import count_rows
from spo_jax.training import dropped_pairs, material
from spo_jax.training.run import train
from tests.policies.test_pair_scores import ALIKE, pairs
from tests.runs import metrics_of, state_of, write_config

SHARE = len(ALIKE) / len(pairs())


def make_config(folder, **sections):
    """A run of ``pairs``; ``sections`` as in ``write_config``."""
    few = {"mesh": {"data": 1, "fsdp": 4, "tensor": 2}, "train": {"steps": 4, "batch_size": 4}}
    path = write_config(folder, **few, **sections)
    rows = [*pairs()[:3], {"prompt": "", "chosen": "", "rejected": ""}, *pairs()[3:]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = yaml.safe_load(path.read_text())
    sizes = {"prompt_buckets": [4], "completion_buckets": [40], "on_bad_row": "skip"}
    tree["data"] = {"train": tree["data"]["train"], **sizes, **sections.get("data", {})}
    tree["output_dir"] = str(folder / "run")
    path.write_text(yaml.safe_dump(tree))
    return path


def scored(path, capsys, *arguments):
    """What ``score-pairs`` writes and prints."""
    assert main(["score-pairs", str(path), *arguments]) == 0
    printed = capsys.readouterr().out
    file = path.parent / "run" / "pair_scores.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()], printed


# Listed


@pytest.mark.long
def test_every_pair_is_listed_with_its_place_worst_first(tmp_path, capsys):
    lines, printed = scored(make_config(tmp_path), capsys, "--show", "4")
    assert sorted(line["row"] for line in lines) == list(range(10))
    assert {line["row"] for line in lines[:3]} == set(ALIKE)
    normalised = [line["normalised_ches"] for line in lines]
    assert normalised == sorted(normalised, reverse=True)
    file = (tmp_path / "pairs.jsonl").read_text().splitlines()
    for line in lines:
        # The bad row stands between the third and the fourth.
        assert line["record"] == line["row"] + (line["row"] >= 3)
        assert line["file"] == str(tmp_path / "pairs.jsonl")
        pair = json.loads(file[line["line"] - 1])
        assert pair == pairs()[line["row"]]
        lengths = line["chosen_tokens"], line["rejected_tokens"]
        assert lengths == (len(pair["chosen"]) + 1, len(pair["rejected"]) + 1)  # with EOS
        assert abs(line["ches"]) > abs(line["normalised_ches"])
    head, share, by_length, raw, _, *worst = printed.splitlines()
    assert head.startswith("10 training pairs under the policy at random")
    assert share.split() == ["percentile", "0", "5", "25", "50", "75", "95", "100"]
    assert by_length.split()[-1] == f"{normalised[0]:.4g}"
    assert raw.split()[1] == f"{min(line['ches'] for line in lines):.4g}"
    assert len(worst) == 4
    for line, text in zip(lines, worst, strict=False):
        assert f"pairs.jsonl:{line['line']}" in text
        row = pairs()[line["row"]]
        assert row["chosen"][-4:] in text
        assert row["rejected"][-4:] in text or line is lines[3]
    assert sorted(x.name for x in (tmp_path / "run").iterdir() if x.name[0] != ".") == [
        "pair_scores.jsonl"
    ]


@pytest.mark.long
def test_after_sft_the_policy_is_that_of_sft(tmp_path, capsys):
    sft = {"train": str(tmp_path / "pairs.jsonl"), "on_bad_row": "skip"}
    stages = {
        "stages": ["sft", "preference"],
        "sft": {"steps": 6, "batch_size": 4},
        "sft_optimizer": {"learning_rate": 0.03},
        "sft_data": {**sft, "prompt_buckets": [4], "completion_buckets": [40]},
    }
    path = make_config(tmp_path, **stages, data={"drop_displacing": SHARE})
    assert main(["score-pairs", str(path)]) == 2
    assert "train it first (spo-jax sft CONFIG)" in capsys.readouterr().err
    assert main(["sft", str(path)]) == 0
    lines, printed = scored(path, capsys)
    assert f"under {tmp_path / 'run' / 'sft'}" in printed
    # Another policy than that which SFT began with, and the one that training looks at.
    assert main(["train", str(path), "--resume"]) == 0
    found = json.loads((tmp_path / "run" / "dropped_pairs.json").read_text())["dropped"]
    shared = [{key: line[key] for key in found[0]} for line in lines[: len(found)]]
    assert found == shared
    assert len(found) == 3
    (tmp_path / "other").mkdir()
    before, _ = scored(make_config(tmp_path / "other"), capsys)
    scores = [{x["row"]: x["normalised_ches"] for x in some} for some in (lines, before)]
    assert min(abs(scores[0][row] - scores[1][row]) for row in range(10)) > 1e-4


def test_without_pairs_there_is_nothing_to_score(tmp_path, capsys):
    path = tmp_path / "sft.yaml"
    tree = {"stages": ["sft"], "model": {"path": "m"}, "sft_data": {"train": "d"}}
    path.write_text(yaml.safe_dump({**tree, "sft": {"steps": 1}}))
    assert main(["score-pairs", str(path)]) == 2
    assert "no stage of pairs to score" in capsys.readouterr().err
    assert main(["score-pairs", str(path), "--show", "-1"]) == 2
    assert "--show -1: expected 0 or more" in capsys.readouterr().err


def test_scores_that_cannot_be_written_leave_no_model_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("spo_jax.training.ranked_pairs.write_rows", full)
    with pytest.raises(OSError, match="no space"):
        main(["score-pairs", str(make_config(tmp_path))])
    assert (tmp_path / "run").is_dir()
    assert not list(tmp_path.rglob("*scored_model*"))


# Left out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run without the pairs of ``ALIKE``, and what it trained on."""
    folder = tmp_path_factory.mktemp("dropped")
    path = make_config(folder, data={"drop_displacing": SHARE})
    trained = []
    with pytest.MonkeyPatch.context() as patch:
        make = material.make_train_iterator

        def watched(rows, **options):
            trained.append(rows)
            return make(rows, **options)

        patch.setattr(material, "make_train_iterator", watched)
        assert main(["train", str(path)]) == 0
    return path, folder / "run", trained[0]


@pytest.mark.slow
def test_the_expected_ones_are_left_out(run, capsys):
    path, folder, rows = run
    found = json.loads((folder / "dropped_pairs.json").read_text())
    lines, _ = scored(path, capsys)
    assert len(lines) == 10  # also those that training leaves out
    assert {pair["row"] for pair in found["dropped"]} == set(ALIKE)
    assert found["dropped"] == [{k: x[k] for k in found["dropped"][0]} for x in lines[:3]]
    assert found["threshold"] == lines[2]["normalised_ches"]
    assert (found["share"], found["pairs"]) == (SHARE, 10)
    kept = [row + (row >= 3) for row in range(10) if row not in ALIKE]
    assert rows.source_rows.tolist() == kept


def resumed(run, tmp_path):
    """A copy of the run that stands at its second step."""
    path, folder, _ = run
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    tree = {**yaml.safe_load(path.read_text()), "output_dir": str(copy)}
    return copy, tree


@pytest.mark.long
def test_a_run_that_goes_on_leaves_out_the_same_and_scores_nothing(
    run, tmp_path, monkeypatch, capsys
):
    copy, tree = resumed(run, tmp_path)

    def never(*args, **options):
        raise AssertionError("scored again")

    monkeypatch.setattr(dropped_pairs, "score_pairs", never)
    train(checked_config(tree), resume=True)
    said = capsys.readouterr().err
    assert "data: 3 of 10 training pairs dropped, of length-normalised CHES" in said
    assert f"as when the run began ({copy / 'dropped_pairs.json'})" in said
    jax.tree.map(np.testing.assert_array_equal, state_of(copy, 4), state_of(run[1], 4))
    assert metrics_of(copy) == metrics_of(run[1])


@pytest.mark.long
def test_other_shares_and_pairs_are_refused_on_resume(run, tmp_path):
    copy, tree = resumed(run, tmp_path)
    before = (copy / "dropped_pairs.json").read_text()
    tree["data"]["drop_displacing"] = 0.4
    with pytest.raises(ValueError, match="another order of batches"):
        train(checked_config(tree), resume=True)
    changed = json.loads((copy / "dropped_pairs.json").read_text())
    assert len(changed["dropped"]) == 4
    # Insisted on, the data begin anew.
    train(checked_config(tree), resume=True, allow_changes=True)
    del tree["data"]["drop_displacing"]
    (copy / "dropped_pairs.json").write_text(before)
    shutil.rmtree(copy / "checkpoints" / "4")
    with pytest.raises(ValueError, match="another order of batches"):
        train(checked_config(tree), resume=True)


@pytest.mark.long
def test_a_file_left_by_an_attempt_that_saved_nothing_is_not_believed(run, tmp_path, capsys):
    copy, tree = resumed(run, tmp_path)
    shutil.rmtree(copy / "checkpoints")
    expected = (copy / "dropped_pairs.json").read_text()
    stale = json.loads(expected)
    stale["dropped"] = stale["dropped"][:1]
    (copy / "dropped_pairs.json").write_text(json.dumps(stale))
    train(checked_config(tree), resume=True)
    assert (copy / "dropped_pairs.json").read_text() == expected
    assert "under the policy it starts from" in capsys.readouterr().err


@pytest.mark.long
def test_probes_look_at_the_pairs_of_the_run(run, tmp_path, capsys):
    copy, _ = resumed(run, tmp_path)
    few = ["--dynamics.pairs", "7", "--dynamics.gradients", "none"]
    assert main(["dynamics", str(copy), *few]) == 0
    (line,) = (copy / "dynamics.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["row_ids"]) == list(range(7))
    assert main(["dynamics", str(copy), "--data.drop-displacing", "0.4"]) == 2
    assert "of other pairs or another share" in capsys.readouterr().err
    (copy / "dropped_pairs.json").unlink()
    assert main(["dynamics", str(copy), *few]) == 2
    assert "dropped_pairs.json is missing" in capsys.readouterr().err


# Wrong input


def tree_of(**data):
    return {
        "model": {"path": "m"},
        "data": {"train": "d", **data},
        "train": {"steps": 1},
    }


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(ConfigError, match=r"data\.drop_displacing=.* above 0 and below 1"):
        checked_config(tree_of(drop_displacing=share))


def test_sft_rows_have_no_such_key():
    tree = tree_of() | {"sft_data": {"train": "d", "drop_displacing": 0.1}}
    with pytest.raises(ConfigError, match=r"sft_data\.drop_displacing"):
        checked_config(tree)


def test_less_than_a_pair_is_refused(tmp_path, capsys):
    path = make_config(tmp_path, data={"drop_displacing": 0.05})
    assert main(["train", str(path)]) == 2
    said = capsys.readouterr().err
    assert "data.drop_displacing=0.05 of 10 training pairs is less than one" in said
    assert "at least 0.1" in said


def test_a_plan_counts_the_rows_that_are_left(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n' * 40)
    data = checked_config(tree_of(drop_displacing=0.1, train=str(file), eval_fraction=0.25)).data
    assert count_rows(data) == 27

"""A section of several data sets: each read by itself, held out once, told apart."""

import dataclasses
import json

import pytest
from datasets import IterableDataset

from spo_jax.config.parsing import ConfigError
from spo_jax.config.schema import DataConfig, MixedData
from spo_jax.config.validation import checked_config
from spo_jax.plan.inputs import count_rows
from spo_jax.policies import prepared
from spo_jax.policies.rows import prepare_rows
from tests.data.tiny_data import make_char_tokenizer
from tests.tiny import ARCHITECTURE


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """20 pairs, and 30 under other names, half of whose prompts are among the first."""
    ours = [{"prompt": f"q{i}", "chosen": f"a{i}", "rejected": "b"} for i in range(20)]
    theirs = [{"ask": f"q{i}", "chosen": f"c{i}", "rejected": "d", "x": i} for i in range(10, 40)]
    return write(tmp_path / "ours.jsonl", ours), write(tmp_path / "theirs.jsonl", theirs)


def section(files, **keys):
    theirs = MixedData(files[1], 0.5, columns={"prompt": "ask"}, ignore_columns=("x",))
    return DataConfig(mix=(MixedData(files[0], 2.0), theirs), **keys)


def prepare(data, kind="preference", **options):
    return prepare_rows(data, kind, make_char_tokenizer(), seed=0, name="data", **options)


def texts(rows):
    return [bytes(p).decode() for p in rows.prompts()]


def test_each_is_read_as_it_says_and_counted_by_itself(files, capsys):
    rows = prepare(section(files))
    assert len(rows.train) == 50
    assert rows.train.epoch_size == 40 + 15
    said = capsys.readouterr().err
    assert "data.mix.0: 20 of 20 rows kept" in said
    assert "data.mix.1: 30 of 30 rows kept" in said
    assert f"55 rows: 40 of {files[0]} (73%; 20 x 2), 15 of {files[1]} (27%; 30 x 0.5)" in said


def test_alone_and_unmixed_are_the_same(files):
    one = prepare(DataConfig(train=files[0]))
    other = prepare(DataConfig(mix=(MixedData(files[0]),)))
    assert one.train.fingerprint() == other.train.fingerprint()
    assert one.buckets == other.buckets


@pytest.mark.parametrize("seed", range(4))
def test_no_prompt_is_on_both_sides(files, seed):
    data = section(files, eval_fraction=0.3)
    rows = prepare_rows(data, "preference", make_char_tokenizer(), seed=seed, name="data")
    train, held = set(rows.train.prompts()), set(rows.heldout.prompts())
    assert not train & held
    assert len(rows.heldout) == 6 + 9
    assert rows.heldout.epoch_size == len(rows.heldout)  # each once, whatever its weight


def test_held_out_rows_may_be_a_data_set_of_their_own(files, tmp_path):
    data = section(
        files,
        eval=write(tmp_path / "held.jsonl", [{"prompt": "h", "chosen": "a", "rejected": "b"}]),
    )
    rows = prepare(data)
    assert (len(rows.train), len(rows.heldout)) == (50, 1)


def test_unpaired_rows_are_mixed_before_they_are_mismatched(files):
    rows = prepare(section(files), "unpaired")
    assert (len(rows.train), rows.train.num_completions, rows.train.epoch_size) == (100, 2, 110)


def test_a_second_start_reads_and_says_the_same(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepared, "WORTH_KEEPING", 0.0)
    data = section(files, eval_fraction=0.2)
    first = prepare(data, cache=str(tmp_path / "cache"))
    said = capsys.readouterr().err.splitlines()
    monkeypatch.setattr(prepared, "tokenize_records", None)
    # Another weight tokenizes nothing.
    for weight in (2.0, 4.0):
        ours = dataclasses.replace(data.mix[0], weight=weight)
        changed = dataclasses.replace(data, mix=(ours, data.mix[1]))
        second = prepare(changed, cache=str(tmp_path / "cache"))
        assert second.train.fingerprint() == first.train.fingerprint()
        assert second.train.source_rows.tolist() == first.train.source_rows.tolist()
        again = capsys.readouterr().err.splitlines()
        assert sum("as they were made before" in line for line in again) == 2
        if weight == 2.0:
            assert [line for line in again if "made before" not in line] == said


def test_a_plan_counts_the_rows_of_an_epoch(files):
    assert count_rows(section(files)) == 40 + 15
    assert count_rows(section(files, eval_fraction=0.5)) == 20 + round(0.5 * 15)
    assert count_rows(DataConfig(mix=(MixedData("org/name"),))) is None


def test_of_a_stream_no_more_is_read_than_is_used(files, tmp_path, monkeypatch, capsys):
    taken = []

    def rows():
        for i in range(5000):
            taken.append(i)
            yield {"prompt": f"s{i}", "chosen": "a", "rejected": "b"}

    def load(name, subset, *, split, streaming):
        assert streaming
        return IterableDataset.from_generator(rows)

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr(prepared, "WORTH_KEEPING", 0.0)
    large = MixedData("org/large", streaming=True, max_rows=30)
    data = DataConfig(mix=(MixedData(files[0]), large))
    for _ in range(2):  # content that cannot be told is not kept
        rows_of = prepare(data, cache=str(tmp_path / "cache"))
        assert len(rows_of.train) == 50
    assert len(taken) < 200
    assert capsys.readouterr().err.count("as they were made before") == 1


MODEL = {"tokenizer": "builtin:arithmetic", "init": ARCHITECTURE}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train": "a", "mix": [{"train": "b"}]}, "data.train=a would be ignored: data.mix is set"),
        ({"mix": [{"train": "a"}, {"weight": 2}]}, "data.mix.1.train is not set"),
        ({"mix": [{"train": "a", "weight": 0}]}, "data.mix.0.weight=0.0: expected above 0"),
        ({"mix": [{"train": "a", "weight": float("nan")}]}, "data.mix.0.weight=nan"),
        ({"mix": [{"train": "builtin:arithmetic"}]}, "is not mixed with others"),
        ({"mix": [{"train": "a", "wieght": 2}]}, "unknown key data.mix.0.wieght .*'weight'"),
        ({"mix": [{"train": "a", "weight": "x"}]}, "data.mix.0.weight='x': expected"),
        ({"mix": ["a"]}, "data.mix.0='a': expected a mapping"),
        ({"mix": []}, "data.train is not set"),
        ({"train": "a", "streaming": True}, "data.streaming without max_rows would fetch all of a"),
        ({"mix": [{"train": "a", "streaming": True}]}, "data.mix.0.streaming without max_rows"),
    ],
)
def test_what_cannot_be_mixed_is_named(data, said):
    tree = {"stages": ["preference"], "model": MODEL, "data": data, "train": {"steps": 1}}
    with pytest.raises(ConfigError, match=said):
        checked_config(tree)


def test_own_answers_lie_beside_one_file():
    tree = {"stages": ["preference"], "model": MODEL, "train": {"steps": 1}}
    tree |= {"data": {"mix": [{"train": "a"}]}, "objective": {"inner_data": "own"}}
    with pytest.raises(ConfigError, match="inner_data=own reads the answers"):
        checked_config(tree)

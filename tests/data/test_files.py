import gzip
import itertools
import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from spo_jax.data import load_records

ROWS = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d", "chosen": "e"}]


def fields(records):
    return [r.fields for r in records]


def write_lines(path, rows=ROWS):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_json_lines_keep_each_row_as_written(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*ROWS, {"prompt": 1, "more": [None]}])
    records = load_records(path)
    assert fields(records) == [*ROWS, {"prompt": 1, "more": [None]}]
    assert [r.row for r in records] == [1, 2, 3]
    assert {r.file for r in records} == {str(path)}


def test_gzip_lines(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(r) + "\n" for r in ROWS)
    assert fields(load_records(path)) == ROWS
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(ValueError, match="damaged gzip file"):
        list(load_records(path))


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array(tmp_path, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS, indent=indent))
    assert fields(load_records(path)) == ROWS


def test_json_array_of_strings_are_texts(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(["one", "two", 3]))
    records = list(load_records(path))
    assert fields(records) == [{"text": "one"}, {"text": "two"}, None]
    assert (records[2].row, records[2].reason) == (3, "not an object")


def test_cut_json_array_names_the_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS)[:-5])
    with pytest.raises(ValueError, match=r"a\.json: not a whole JSON array"):
        list(load_records(path))


def test_broken_lines_are_named_and_the_rest_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"text": "x\u2028y"}, ensure_ascii=False).encode()
    lines = [b"\xef\xbb\xbf" + good, b'{"text": ', b"", good, b'{"text": "\xff"}', b"7", good]
    path.write_bytes(b"\n".join(lines))
    records = list(load_records(path))
    assert [(r.row, r.reason) for r in records] == [
        (1, ""),
        (2, "broken JSON"),
        (4, ""),
        (5, "not UTF-8"),
        (6, "not an object"),
        (7, ""),
    ]
    assert records[0].fields == {"text": "x\u2028y"}


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": None}]
    Dataset.from_list(rows).to_parquet(path)
    records = list(load_records(path))
    assert [(r.row, r.fields) for r in records] == [(1, rows[0]), (2, rows[1])]
    path.write_text("no")
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable Parquet file"):
        list(load_records(path))


def test_folder_takes_the_files_of_the_split(tmp_path):
    write_lines(tmp_path / "train-00000-of-00002.jsonl", ROWS[:1])
    write_lines(tmp_path / "train-00001-of-00002.jsonl", ROWS[1:])
    write_lines(tmp_path / "test.jsonl", [{"text": "t"}])
    (tmp_path / "README.md").write_text("not data")
    assert fields(load_records(tmp_path)) == ROWS
    assert [r.row for r in load_records(tmp_path)] == [1, 1]
    assert fields(load_records(tmp_path, split="test")) == [{"text": "t"}]
    with pytest.raises(FileNotFoundError, match=r"no file for split 'dev'; it has test\.jsonl"):
        load_records(tmp_path, split="dev")


def test_folder_without_split_names_is_one_split(tmp_path):
    write_lines(tmp_path / "part1.jsonl", ROWS[:1])
    Dataset.from_list(ROWS[:1]).to_parquet(tmp_path / "part2.parquet")
    assert fields(load_records(tmp_path, split="test")) == [ROWS[0], ROWS[0]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no data file"):
        load_records(tmp_path / "empty")


def test_saved_to_disk(tmp_path):
    data = Dataset.from_list(ROWS[:1])
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data).save_to_disk(tmp_path / "many")
    assert fields(load_records(tmp_path / "one")) == ROWS[:1]
    assert fields(load_records(tmp_path / "many")) == ROWS[:1]
    with pytest.raises(FileNotFoundError, match=r"no split 'test'; it has \['train'\]"):
        load_records(tmp_path / "many", split="test")


def test_missing_paths_name_the_nearest(tmp_path):
    write_lines(tmp_path / "pairs.jsonl")
    with pytest.raises(FileNotFoundError, match=r"pair\.jsonl; did you mean .*pairs\.jsonl\?"):
        load_records(tmp_path / "pair.jsonl")
    with pytest.raises(FileNotFoundError, match="does not exist either"):
        load_records(tmp_path / "nowhere" / "pairs.jsonl")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match="unknown kind of file"):
        load_records(tmp_path / "a.csv")


def test_a_stream_is_read_as_far_as_it_is_asked_for(tmp_path, monkeypatch):
    taken = []

    def rows():
        for row in ROWS[:1] * 100:
            taken.append(1)
            yield row

    def load(name, subset, *, split, streaming):
        assert (name, subset, split, streaming) == ("org/large", None, "train", True)
        return IterableDataset.from_generator(rows)

    monkeypatch.setattr("datasets.load_dataset", load)
    records = load_records("org/large", streaming=True)
    assert records.count() is None
    assert [record.fields for record in itertools.islice(records, 3)] == ROWS[:1] * 3
    assert len(taken) < 10
    write_lines(tmp_path / "pairs.jsonl")
    with pytest.raises(ValueError, match="streaming is of hub data sets"):
        load_records(tmp_path / "pairs.jsonl", streaming=True)


def test_hub_name_offline():
    with pytest.raises(ConnectionError, match="'someone/some_data' is no local file or folder"):
        load_records("someone/some_data")

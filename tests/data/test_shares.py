"""Rows by chunks, cores and processes: the same rows, reports and errors as in one piece."""

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from spo_jax.data import (
    RowError,
    format_rows,
    load_records,
    make_chat_format,
    shares,
    split_by_prompt,
    tokenize_rows,
)
from spo_jax.data.shares import Recipe, tokenize_records
from spo_jax.parallel import cores
from spo_jax.parallel.processes import DistributedError
from tests.data.tiny_data import CHATML, make_char_tokenizer

LIMITS = {"max_prompt_length": 30, "max_completion_length": 12}
TOKENIZER = make_char_tokenizer(template=CHATML)
BAD = {
    5: {"prompt": "q", "chosen": "", "rejected": "b"},
    18: {"prompt": "q", "chosen": "a", "rejected": "a"},
    19: {"prompt": "q", "rejected": "a"},
    27: {"prompt": "q", "chosen": "c", "rejected": "c"},
}


def row(i):
    answers = {"chosen": "abcdefghij"[: 2 + i % 9] + "k" * (i % 4), "rejected": f"no {i}"}
    if i % 3 == 0:  # cut, these two are equal
        answers = {"chosen": "the same beginning, yes", "rejected": "the same beginning, no"}
    if i % 7 == 0:
        answers["chosen"] += "é"  # which the tokenizer cannot write
    asked = [{"role": "user", "content": "question " * (i % 5 + 1)}]
    said = {k: [{"role": "assistant", "content": v}] for k, v in answers.items()}
    return {"prompt": asked, **said, "score": i, **({"source_id": i} if i % 2 else {})}


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(shares, "CHUNK", 4)

    def write(bad=(), name="rows.jsonl", count=30):
        path = tmp_path / name
        rows = [BAD[i] if i in bad else row(i) for i in range(count)]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return load_records(path)

    return write


def in_one_piece(records, *, fraction=0.0, seed=0, **options):
    """What ``tokenize_records`` is made of, one after the other over all rows."""
    rows, report = format_rows(records, make_chat_format(TOKENIZER), kind="preference", **options)
    parts = split_by_prompt(rows, fraction=fraction, seed=seed) if fraction else (rows,)
    found = [tokenize_rows(part, TOKENIZER, **LIMITS) for part in parts]
    return [rows for rows, _ in found], [str(report), *(str(line) for _, line in found)]


def by_chunks(records, *, fraction=0.0, seed=0, **options):
    recipe = Recipe("preference", **LIMITS, eval_fraction=fraction, seed=seed, **options)
    found = tokenize_records(records, TOKENIZER, recipe)
    return list(found.parts), list(found.lines)


def assert_same(found, expected):
    parts, lines = found
    assert lines == expected[1]
    assert [part.fingerprint() for part in parts] == [part.fingerprint() for part in expected[0]]
    for part, other in zip(parts, expected[0], strict=True):
        np.testing.assert_array_equal(part.source_rows, other.source_rows)
        assert (part.pad_id, part.num_completions) == (other.pad_id, other.num_completions)
        assert part.prompt_ids.dtype == part.completion_ids.dtype == np.int32


OPTIONS = [
    {},
    {"fraction": 0.3, "seed": 1},
    {"on_bad_row": "skip", "fraction": 0.3},
    {"on_bad_row": "skip", "max_rows": 17},
    {"on_bad_row": "skip", "max_rows": 99, "ignore_columns": ("source_id", "nobody has it")},
    {"max_rows": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chunks_are_the_whole(write, options):
    records = write(BAD if "on_bad_row" in options else ())
    found = by_chunks(records, **options)
    assert_same(found, in_one_piece(records, **options))
    assert any("dropped whose completions are equal" in line for line in found[1])
    assert options.get("max_rows") == 3 or any("read back" in line for line in found[1])


def test_a_bad_row_is_said_with_all_that_stand_behind_it(write):
    records = write(BAD)
    with pytest.raises(RowError) as expected:
        in_one_piece(records)
    with pytest.raises(RowError, match=r"rows.jsonl:6: .*\(3 of the next 24 rows") as caught:
        by_chunks(records)
    assert str(caught.value) == str(expected.value)
    assert (caught.value.row, caught.value.reason) == (6, "empty chosen")


@pytest.mark.parametrize("bad", [range(30), [0, 1]])
def test_no_row_that_can_be_used_is_an_error(write, bad):
    records = write()
    records.sources[0].write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "a"}))
    with pytest.raises(ValueError, match="no row can be used"):
        by_chunks(records, on_bad_row="skip")


@pytest.mark.slow
def test_other_cores_make_the_same_rows_and_errors(write, monkeypatch):
    monkeypatch.setattr(cores, "PATIENCE", 0.0)
    monkeypatch.setattr(shares, "number_of_cores", lambda: 2)
    options = {"on_bad_row": "skip", "fraction": 0.2}
    records = write(BAD)
    expected = in_one_piece(records, **options)

    def here(self, chunk):
        raise AssertionError("done here")

    def wait(crew):
        if crew._starting and not crew._idle:
            cores.wait(crew._starting)
        return ready(crew)

    ready = cores._Crew.is_ready
    monkeypatch.setattr(cores._Crew, "is_ready", wait)
    monkeypatch.setattr(shares.RecordTask, "__call__", here)
    assert_same(by_chunks(records, **options), expected)
    with pytest.raises(RowError, match=r"rows.jsonl:6: .*\(3 of the next 24 rows"):
        by_chunks(records)


class Together:
    """Several processes of a run as threads, which exchange through a list."""

    def __init__(self, monkeypatch, count):
        self.count, self.me = count, threading.local()
        self.barrier, self.put = threading.Barrier(count, timeout=20), [None] * count
        process = {"process_index": lambda: self.me.index, "process_count": lambda: count}
        monkeypatch.setattr(shares, "jax", SimpleNamespace(**process))
        monkeypatch.setattr(shares, "exchanged", self.exchange)
        monkeypatch.setattr(shares, "gathered", lambda x: np.concatenate(self.exchange(x)))
        monkeypatch.setattr(shares, "processes_of_host", lambda: [self.me.index])

    def exchange(self, value):
        self.put[self.me.index] = value
        self.barrier.wait()
        found = list(self.put)
        self.barrier.wait()
        return found

    def run(self, function):
        """``function(index)`` of each; what it returned or raised."""
        found = [None] * self.count

        def process(index):
            self.me.index = index
            try:
                found[index] = function(index)
            except Exception as error:
                found[index] = error

        threads = [threading.Thread(target=process, args=(i,)) for i in range(self.count)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("count", [2, 3])
def test_each_process_tokenizes_its_share_and_has_all_rows(write, monkeypatch, count, options):
    records = write(BAD if "on_bad_row" in options else ())
    expected = in_one_piece(records, **options)
    done = [0] * count
    options = dict(options)
    fraction = options.pop("fraction", 0.0)
    recipe = Recipe(
        "preference", **LIMITS, eval_fraction=fraction, seed=options.pop("seed", 0), **options
    )

    def process(index):
        def progress(rows):
            done[index] += rows

        return tokenize_records(records, TOKENIZER, recipe, progress=progress)

    for found in Together(monkeypatch, count).run(process):
        assert_same((list(found.parts), list(found.lines)), expected)
    if "max_rows" not in options:
        assert sum(done) == 30
        assert max(done) <= -(-8 // count) * 4  # 8 chunks of 4 rows, and less


@pytest.mark.parametrize("count", [2, 3])
def test_a_bad_row_of_one_process_is_an_error_of_all(write, monkeypatch, count):
    records = write(BAD)
    found = Together(monkeypatch, count).run(lambda index: by_chunks(records))
    assert {type(error) for error in found} == {RowError}
    (text,) = {str(error) for error in found}
    assert "rows.jsonl:6: empty chosen" in text
    assert "(3 of the next 24 rows" in text


def test_other_files_are_an_error_of_all(write, monkeypatch):
    sources = [write(name="a.jsonl"), write(name="b.jsonl", count=20)]
    found = Together(monkeypatch, 2).run(lambda index: by_chunks(sources[index]))
    assert {type(error) for error in found} == {DistributedError}
    assert "(4 times 8, 5, about)" in str(found[0])

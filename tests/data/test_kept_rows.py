"""Token rows on disk: the same when read, damage is seen, another fingerprint for other rows."""

import dataclasses
import json
import os

import numpy as np
import pytest

from spo_jax.data import kept_rows, load_records, load_tokenizer
from spo_jax.data.kept_rows import load_rows, rows_fingerprint, save_rows
from spo_jax.data.shares import Prepared, Recipe
from tests.data.tiny_data import CHATML, make_char_tokenizer, make_rows

PAIRS = [([1, 2], [[3, 4], [5]]), ([6], [[7, 8, 9], [10, 12]])]
PREPARED = Prepared((make_rows(PAIRS), make_rows(PAIRS[1:])), ("all", "train: ä", "held out"), 9)


def assert_same(found, expected):
    assert (found.lines, found.read) == (expected.lines, expected.read)
    for rows, other in zip(found.parts, expected.parts, strict=True):
        assert rows.fingerprint() == other.fingerprint()
        for field in dataclasses.fields(rows):
            one, two = getattr(rows, field.name), getattr(other, field.name)
            np.testing.assert_array_equal(one, two)
            if isinstance(two, np.ndarray):
                assert one.dtype == two.dtype


def test_what_is_written_is_read(tmp_path):
    save_rows(tmp_path / "rows.npz", PREPARED)
    assert_same(load_rows(tmp_path / "rows.npz"), PREPARED)
    judged = dataclasses.replace(PREPARED.parts[0], desirable=np.array([True, False]))
    judged = PREPARED._replace(parts=(judged, *PREPARED.parts[1:]))
    save_rows(tmp_path / "rows.npz", judged)
    assert_same(load_rows(tmp_path / "rows.npz"), judged)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npz"]
    with pytest.raises(FileNotFoundError):
        load_rows(tmp_path / "other.npz")


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, -1])
def test_a_file_cut_short_is_damaged(tmp_path, kept):
    path = tmp_path / "rows.npz"
    save_rows(path, PREPARED)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match="is damaged"):
        load_rows(path)


def test_no_flipped_byte_changes_a_row(tmp_path):
    """Of names, times and the like in the frame of the file not all matter."""
    path = tmp_path / "rows.npz"
    save_rows(path, PREPARED)
    data, seen = path.read_bytes(), 0
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            found = load_rows(path)
        except ValueError:
            seen += 1
        else:
            assert_same(found, PREPARED)
    assert seen > 100


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(kept_rows.np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        save_rows(tmp_path / "rows.npz", PREPARED)
    assert not list(tmp_path.iterdir())


# Fingerprints

RECIPE = Recipe("preference", 16, 16)


@pytest.fixture
def of(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))

    def of(path=path, recipe=RECIPE, tokenizer=None, today="2026-01-01"):
        tokenizer = make_char_tokenizer(template=CHATML) if tokenizer is None else tokenizer
        return rows_fingerprint(load_records(path), tokenizer, recipe, today=today)

    of.path = path
    return of


def test_the_same_has_the_same_fingerprint(of, tmp_path):
    assert of() == of()
    assert of(today="2026-01-02") == of()  # nobody asks for the day
    # Wherever the tokenizer lies: every run has a copy of its own.
    copies = []
    for name in ("one", "two"):
        make_char_tokenizer(template=CHATML).save_pretrained(tmp_path / name)
        copies.append(of(tokenizer=load_tokenizer(tmp_path / name)))
    assert copies[0] == copies[1]


def test_a_file_of_the_same_size_and_time_is_another_by_its_content(of):
    before, times = of(), os.stat(of.path)
    of.path.write_text(of.path.read_text().replace("b", "d"))
    os.utime(of.path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert of.path.stat().st_size == times.st_size
    assert of() != before


def test_another_name_or_one_more_file_is_another(of, tmp_path):
    found = {of()}
    other = tmp_path / "b.jsonl"
    other.write_text(of.path.read_text())
    found |= {of(other), of(tmp_path)}
    assert len(found) == 3


OTHER = {
    "kind": "sft",
    "max_prompt_length": 15,
    "max_completion_length": 15,
    "on_bad_row": "skip",
    "max_rows": 1,
    "columns": (("prompt", "question"),),
    "ignore_columns": ("id",),
    "split_special_tokens": True,
    "chat_template": "{{ messages }}",
    "date": "2026-02-02",
    "eval_fraction": 0.5,
    "seed": 1,
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Recipe)])
def test_every_option_counts(of, name):
    template = "{{ strftime_now('%d') }}" + CHATML if name == "date" else CHATML
    tokenizer = make_char_tokenizer(template=template)
    other = dataclasses.replace(RECIPE, **{name: OTHER[name]})
    assert of(recipe=other, tokenizer=tokenizer) != of(tokenizer=tokenizer)


def test_a_template_that_asks_for_the_day_is_told_todays(of):
    tokenizer = make_char_tokenizer(template="{{ strftime_now('%d') }}" + CHATML)
    assert of(tokenizer=tokenizer) != of(tokenizer=tokenizer, today="2026-01-02")
    told = dataclasses.replace(RECIPE, date="2026-01-01")
    assert of(recipe=told, tokenizer=tokenizer, today="2026-01-02") == of(tokenizer=tokenizer)


def test_another_tokenizer_is_another(of):
    tokenizers = [
        make_char_tokenizer(template=CHATML),
        make_char_tokenizer(),
        make_char_tokenizer(template=CHATML + " "),
        make_char_tokenizer(template=CHATML, bos=True),
        make_char_tokenizer(template=CHATML, eos="<|im_end|>"),
        make_char_tokenizer(template=CHATML, pad=None),
    ]
    more = make_char_tokenizer(template=CHATML)
    more.add_tokens(["question"])
    found = [of(tokenizer=tokenizer) for tokenizer in (*tokenizers, more)]
    assert len(set(found)) == len(found)


def test_other_code_or_another_library_is_another(of, monkeypatch):
    found = {of()}
    version = kept_rows.importlib.metadata.version
    with monkeypatch.context() as patch:
        patch.setattr(kept_rows.importlib.metadata, "version", lambda name: version(name) + ".1")
        found.add(of())
    whole = kept_rows._of_file
    monkeypatch.setattr(
        kept_rows, "_of_file", lambda path: whole(path) + "#" * (path.name == "turns.py")
    )
    found.add(of())
    assert len(found) == 3


def test_tables_by_their_files_and_what_was_done_to_them(of, tmp_path):
    import datasets

    rows = [{"prompt": "a", "chosen": "b", "rejected": f"c{i}"} for i in range(4)]
    table = datasets.Dataset.from_list(rows)
    saved = tmp_path / "saved"
    table.save_to_disk(saved)
    assert of(saved) == of(saved)
    table.select([0, 1]).save_to_disk(tmp_path / "fewer")
    assert of(tmp_path / "fewer") != of(saved)
    records = load_records(saved)
    (loaded,) = records.sources
    fewer = dataclasses.replace(records, sources=(loaded.select([0, 1]),))
    tokenizer = make_char_tokenizer(template=CHATML)
    assert rows_fingerprint(fewer, tokenizer, RECIPE, today="") != of(saved)
    # Of a table in memory nothing says that it is the same.
    fewer = dataclasses.replace(records, sources=(table,))
    assert rows_fingerprint(fewer, tokenizer, RECIPE, today="") is None

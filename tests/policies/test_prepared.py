"""Rows of a data set from the user's cache: when, what is said again, and what is not trusted."""

import json
import os
import stat

import pytest

from spo_jax.config.schema import DataConfig
from spo_jax.policies import prepared, progress
from spo_jax.policies.rows import prepare_rows
from tests.data.tiny_data import make_char_tokenizer


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The user's cache, in which everything is worth keeping."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(prepared, "WORTH_KEEPING", 0.0)
    return tmp_path / "home" / "spo_jax" / "rows"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write(path, [*({"prompt": f"q{i}", "chosen": "a" * 9, "rejected": "b"} for i in range(20)), {}])
    return DataConfig(
        train=str(path), eval_fraction=0.2, on_bad_row="skip", max_completion_length=6
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(data, cache=True, **options):
    tokenizer = make_char_tokenizer()
    return prepare_rows(data, "preference", tokenizer, seed=0, name="data", cache=cache, **options)


def fingerprints(rows):
    return [part.fingerprint() for part in (rows.train, rows.heldout) if part is not None]


@pytest.fixture
def made(monkeypatch):
    """The data sets that were tokenized."""
    found, tokenize = [], prepared.tokenize_records

    def count(records, *args, **options):
        found.append(records.name)
        return tokenize(records, *args, **options)

    monkeypatch.setattr(prepared, "tokenize_records", count)
    return found


def test_a_second_start_reads_and_says_the_same(cache, data, made, capsys):
    first = prepare(data)
    said = capsys.readouterr().err.splitlines()
    assert any("20 of 21 rows kept" in line and "skipped: 1 x" in line for line in said)
    assert any("completions cut on the right" in line for line in said)
    (file,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    second = prepare(data)
    news, *again = capsys.readouterr().err.splitlines()
    assert news == f"data: token rows as they were made before ({file})"
    assert again == said
    assert made == [data.train]
    assert fingerprints(second) == fingerprints(first)
    assert second.buckets == first.buckets


def test_held_out_rows_of_their_own_file_have_their_own(cache, data, made, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    write(other, [{"prompt": "x", "chosen": "yes", "rejected": "no"}] * 3)
    data = DataConfig(train=data.train, eval=str(other), on_bad_row="skip")
    first = prepare(data)
    said = [x for x in capsys.readouterr().err.splitlines() if "as they were" not in x]
    second = prepare(data)
    assert [x for x in capsys.readouterr().err.splitlines() if "as they were" not in x] == said
    assert [line.partition(": ")[0] for line in said] == [
        "data", "data train", "data.eval", "data held out"
    ]  # fmt: skip
    assert fingerprints(first) == fingerprints(second)
    write(other, [{"prompt": "y", "chosen": "yes", "rejected": "no"}] * 3)
    prepare(data)
    assert made == [data.train, data.eval, data.eval]


def test_changed_files_and_options_are_never_read_from_it(cache, data, made, tmp_path):
    path = tmp_path / "pairs.jsonl"
    before, times = fingerprints(prepare(data)), path.stat()
    path.write_text(path.read_text().replace("q7", "q8"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprints(prepare(data)) != before
    template = tmp_path / "template.jinja"
    for text in ("{{ messages[0] }}", "{{ messages[1] }}"):  # the same name, another text
        template.write_text(text)
        prepare(DataConfig(train=str(path), on_bad_row="skip", chat_template=str(template)))
    assert len(made) == 4


def test_a_damaged_file_is_said_and_made_anew(cache, data, made, capsys):
    before = fingerprints(prepare(data))
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-200])
    capsys.readouterr()
    assert fingerprints(prepare(data)) == before
    said = capsys.readouterr().err
    assert f"WARNING {file} is damaged" in said
    assert "the rows are tokenized anew" in said
    prepare(data)
    assert len(made) == 2
    assert "WARNING" not in capsys.readouterr().err


def test_turned_off_in_a_folder_of_its_own_and_where_it_is_not_worth_it(
    cache, data, made, tmp_path, monkeypatch
):
    prepare(data, cache=False)
    prepare(data, cache=str(tmp_path / "own"))
    assert not cache.exists()
    assert len(list((tmp_path / "own").iterdir())) == 1
    prepare(data, cache=str(tmp_path / "own"))
    assert len(made) == 2
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    prepare(data)  # within a moment
    assert not cache.exists()


def test_what_cannot_be_kept_is_said(cache, data, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    prepare(data, cache=str(tmp_path / "file"))
    said = capsys.readouterr().err
    assert "WARNING data: token rows are not kept" in said
    assert "rows_cache" in said
    monkeypatch.setattr(prepared, "MOST_BYTES", 10)
    prepare(data)
    assert "WARNING data: token rows are not kept" in capsys.readouterr().err


def test_those_read_longest_ago_make_room(cache, data, monkeypatch):
    sizes = [DataConfig(**{**vars(data), "max_rows": n}) for n in (17, 18, 19)]
    files = []
    for age, section in enumerate(sizes[:2]):
        prepare(section)
        (file,) = set(cache.iterdir()) - set(files)
        os.utime(file, (1e9 + age, 1e9 + age))
        files.append(file)
    prepare(sizes[0])  # now it is the other that was read longest ago
    monkeypatch.setattr(prepared, "MOST_BYTES", int(1.5 * files[0].stat().st_size))
    prepare(sizes[2])
    left = set(cache.iterdir())
    assert files[0] in left
    assert files[1] not in left
    assert len(left) == 2


def test_without_a_terminal_a_line_now_and_then(cache, data, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_RHYTHM", 0.0)
    prepare(data, cache=False)
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("data: 21 of 21 rows to ids, ")
    monkeypatch.setattr(progress, "_RHYTHM", 30.0)
    prepare(data, cache=False)
    assert "rows to ids" not in capsys.readouterr().err

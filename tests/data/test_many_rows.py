"""The benchmark of many rows, with few: what it writes is read, and what it measures is printed."""

import importlib.util
import re
from pathlib import Path

import pytest

from spo_jax.data import format_rows, load_records, render_plain
from spo_jax.data.chat import ChatFormat
from tests.data.tiny_data import CHATML, make_char_tokenizer

PATH = Path(__file__).parents[2] / "benchmarks" / "many_rows.py"


@pytest.fixture(scope="module")
def many_rows():
    spec = importlib.util.spec_from_file_location("many_rows", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pairs_are_of_the_kind_they_say(many_rows, tmp_path):
    many_rows.write_pairs(tmp_path / "pairs.jsonl", 200)
    records = load_records(tmp_path / "pairs.jsonl")
    rows, report = format_rows(records, ChatFormat(render_plain, "</s>"), kind="preference")
    assert len(rows) == 200
    assert "messages (says again what is read)" in str(report)
    words = [len(row.chosen.split()) for row in rows]
    assert 100 < sorted(words)[100] < 220
    assert max(words) > 500


@pytest.mark.long
def test_both_starts_are_measured(many_rows, tmp_path, capsys):
    make_char_tokenizer(template=CHATML).save_pretrained(tmp_path / "tokenizer")
    tokenizer = str(tmp_path / "tokenizer")
    many_rows.main([tokenizer, "--rows=64", "--steps=3", "--step=0.01", f"--folder={tmp_path}"])
    first, second = capsys.readouterr().out.splitlines()
    for line, name in ((first, "first"), (second, "second")):
        found = re.fullmatch(
            rf"{name} start: ([\d.]+) s, ([\d,]+) rows/s; held (-?[\d.]+) times the (\d+) MiB of "
            r"ids, at most ([\d.]+) times; waiting for data ([\d.]+)% of the time",
            line,
        )
        assert found, line
        assert 0 <= float(found[6]) < 100

"""docs/row.md and docs/data.md keep to the code: names, ids, the picture, what is read."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from spo_jax.data import format_rows, load_records, load_tokenizer, make_chat_format, tokenize_rows
from spo_jax.data.layouts import LAYOUTS
from spo_jax.data.messages import REASONING_KEYS, ROLES, TRAINED_KEYS
from spo_jax.tasks import arithmetic

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "row.md").read_text()
NAMES = sorted(set(re.findall(r"`(spo_jax(?:\.\w+)+)", PAGE)))


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one, to any depth."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def test_every_name_of_the_page_exists():
    assert len(NAMES) >= 20
    assert not [name for name in NAMES if not exists(name)]


def test_ids_of_the_page_are_those_of_its_rows(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])
    arithmetic.write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    records = load_records(tmp_path / "pairs.jsonl")
    rows, _ = format_rows(records, make_chat_format(tokenizer), kind="preference")
    assert [arithmetic.is_correct(rows[0].prompt, text) for text in rows[0][1:]] == [True, False]
    found, _ = tokenize_rows(rows, tokenizer, max_prompt_length=64, max_completion_length=64)
    ids = [found.prompt_ids[:8], found.completion_ids[:32], found.completion_ids[32:54]]
    shown = re.findall(r"^(?:prompt|chosen|rejected)  +(\d.*?)   +\d+ ids$", PAGE, re.MULTILINE)
    assert shown == [" ".join(map(str, some)) for some in ids]


def test_the_picture_has_every_room():
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "benchmarks" / "rooms.py")
    rooms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rooms)
    assert rooms.PICTURE.is_file()
    assert f"({rooms.PICTURE.relative_to(ROOT / 'docs')})" in PAGE
    packages = {path.parent.name for path in (ROOT / "spo_jax").glob("*/__init__.py")}
    found = rooms.read_imports()
    assert set(found) - {"__main__"} == packages | {"types"}
    assert set(found) <= set(rooms.read_words())
    assert "solvers" in found["training"]
    assert not found["types"]


def test_what_is_read_of_rows_is_written_down():
    page = (ROOT / "docs" / "data.md").read_text()
    columns = {n for kind in LAYOUTS.values() for of in kind.values()
               for name in (*of.needed, *of.optional) for n in name.split("|")}  # fmt: skip
    keys = {"role", "content", "from", "value", "name", "tool_calls", "tool_call_id"}
    for name in (*columns, *keys, *REASONING_KEYS, *TRAINED_KEYS, *ROLES):
        assert f"`{name}`" in page, name

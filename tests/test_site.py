"""The documents' site: every public name and key on its page, and messages that exist."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import spo_jax
from spo_jax.config.choices import choices
from spo_jax.config.schema import Config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spo_jax"


@pytest.fixture(scope="module")
def site():
    """``docs/pages.py`` and ``docs/reference.py``, which need no Sphinx."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        yield importlib.import_module("pages"), importlib.import_module("reference")
    finally:
        sys.path.remove(str(ROOT / "docs"))


# The names


def test_every_room_is_in_one_group(site):
    _, reference = site
    grouped = [room for _, rooms in reference.GROUPS.values() for room in rooms.split()]
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {"types"}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) | reference.WITHOUT_NAMES == rooms


def test_every_public_name_is_on_one_page(site):
    _, reference = site
    text = "\n".join(reference.api_page(t, rooms.split()) for t, rooms in reference.GROUPS.values())
    found, module = [], None
    for line in text.splitlines():
        if line.startswith(".. currentmodule:: "):
            module = line.split()[-1]
        elif match := re.match(r"\.\. (?:auto|py:)(?:class|function|data):: (\w+)", line):
            found.append(f"{module}.{match[1]}")
    assert len(found) == len(set(found))
    front = {f"spo_jax.{name}" for name in spo_jax.__all__ if name != "__version__"}
    assert front <= set(found)
    for path in PACKAGE.glob("*/__init__.py"):
        room = importlib.import_module(f"spo_jax.{path.parent.name}")
        own = {f"{room.__name__}.{name}" for name in getattr(room, "__all__", [])}
        own -= {f"{room.__name__}.{name}" for name in spo_jax.__all__}
        assert own <= set(found)


def test_annotations_stand_as_in_the_source(site):
    _, reference = site
    arguments, result = reference.source_signature(spo_jax.token_logprobs)
    assert "hidden: Float[Array, 'B n C D']" in arguments
    assert "chunk_tokens: int = 2048" in arguments
    assert result == "Float[Array, 'B n C']"
    arguments, result = reference.source_signature(spo_jax.PairLogprobs)
    assert "chosen: Float[Array, 'B']" in arguments
    assert result is None


# The keys


def test_every_key_is_on_the_configuration_page(site):
    page = site[1].configuration_page()
    for field in fields(Config):
        section = getattr(Config(), field.name)
        if field.name in ("loss", "solver"):
            keys = [f"{field.name}.name", *choices()[field.name]]
        elif hasattr(section, "__dataclass_fields__"):
            keys = [f"{field.name}.{key.name}" for key in fields(section)]
            assert f"## {field.name}\n" in page
        else:
            keys = [field.name]
        for key in keys:
            assert page.count(f"| `{key}` |") == 1, key


def test_types_and_defaults_are_those_of_yaml(site):
    page = site[1].configuration_page()
    assert "| `outer.learning_rate` | number | `1e-06` | peak learning rate |" in page
    assert "| `data.packing` | `auto`, true, false | `auto` | several examples" in page
    assert "| `lora.targets` | list of text | `[*_proj]` |" in page
    assert "| `dpo` | `beta`, `label_smoothing: 0.0`" in page


# The pages


def test_pages_have_each_section_of_readme_once(site):
    pages, _ = site
    made = [name for page in pages.PAGES.values() if page.source == "README.md"
            for name in page.sections]  # fmt: skip
    readme = (ROOT / "README.md").read_text()
    there = re.findall(r"^## (.*)", readme, re.MULTILINE)
    wanted = sorted(["", *there[: there.index("Licence")]])
    assert sorted(made) == wanted, "enter the section into docs/pages.py, PAGES"


def test_links_lead_to_the_pages(site):
    pages, _ = site
    text = "[a](docs/data.md#files) [b](CONTRIBUTING.md) [c](setup.cfg) `[d](e)` [f](#as-a-library)"
    assert pages.relink(text, "README.md", "docs/site/overview.md") == (
        "[a](../data.md#files) [b](contributing.md) c `[d](e)` [f](library.md#as-a-library)"
    )
    assert pages.relink("![p](images/p.png)", "docs/a.md", "docs/a.md") == "p"  # not there
    assert pages.relink("[k](../spo_jax/config/schema.py)", "docs/a.md", "docs/a.md") == (
        "[k](site/configuration.md)"
    )


def test_the_index_has_every_document():
    index = (ROOT / "docs" / "index.md").read_text()
    documents = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    missing = {name for name in documents if f"({name})" not in index}
    assert not missing, "enter the document into docs/index.md"


@pytest.mark.parametrize(
    "document",
    [
        *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tpu/README.md"),
        *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    ],
)
def test_links_lead_to_files_too(site, document):
    """As a Git host follows them; Sphinx looks at the anchors."""
    text = site[0].without_code((ROOT / document).read_text())
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^()\s]+)\)", text)]
    for link in links:
        local = link and not re.match(r"[a-z]+:", link)
        assert not local or ((ROOT / document).parent / link).exists(), link


# The messages


def literals() -> list[str]:
    """Every text of the code but docstrings; what an f-string puts in is ``…``."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        comments = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", None) for part in node.values]
                text = "".join(p if isinstance(p, str) else "…" for p in parts)
                found.append(re.sub("…+", "…", text))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += [node.value] if id(node) not in comments else []
    return found


TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text()


def test_every_quoted_message_is_in_the_code():
    quoted = re.findall(r"^> `(.*)`$", TROUBLE, re.MULTILINE)
    assert len(quoted) > 40
    assert len(quoted) == TROUBLE.count("\n> ")
    texts = literals()
    assert "A whole run." not in texts
    for message in quoted:
        assert any(message in text for text in texts), message


def test_every_trouble_has_a_cause_and_a_mend():
    entries = re.split(r"^### ", TROUBLE, flags=re.MULTILINE)[1:]
    assert len(entries) > 20
    for entry in entries:
        assert (entry.count("*Cause:*"), entry.count("*Mend:*")) == (1, 1), entry


def test_every_key_that_a_mend_names_exists():
    sections = {field.name: getattr(Config(), field.name) for field in fields(Config)}
    named = re.findall(r"`([a-z_]+)\.([a-z_]+)(?:: [^`]*)?`", TROUBLE)
    for section, key in named:
        if section in ("solver", "loss"):
            assert any(key in options for options in choices()[section].values()), key
        elif (section, key) not in (("metrics", "jsonl"), ("skipped", "jsonl"), ("config", "json"),
                                    ("tokenizer_config", "json")):  # fmt: skip
            assert hasattr(sections[section], key), f"{section}.{key}"

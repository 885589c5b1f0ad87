"""Documents of the repository as pages of the site: what stands outside of ``docs/``, and links.

A link leads to a file of the repository, so that it works on a Git host; here it becomes one to the
page that the site makes of that file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SITE = "docs/site"
"""Where pages are made; not kept in Git."""


class Page(NamedTuple):
    """A page made of ``source``: of some of its sections under a title, or of all of it."""

    source: str
    title: str = ""
    sections: tuple[str, ...] = ()


PAGES = {
    "overview": Page("README.md", "Overview", ("", "What is inside", "What SPO does")),
    "quickstart": Page("README.md", "Quick start", ("Quick start", "Your own data and model")),
    "library": Page("README.md", "As a library", ("As a library",)),
    "clusters": Page("tpu/README.md"),
    "contributing": Page("CONTRIBUTING.md"),
    "changelog": Page("CHANGELOG.md"),
}
GENERATED = {"spo_jax/config/schema.py": "configuration", "spo_jax/__init__.py": "api"}
"""Files of code -> the page that is made of them."""

_LINK = re.compile(r"(!?\[[^\]]*\])\(([^()\s]+)\)")
_CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def document(page: Page) -> str:
    """The text of a page, its links as they are in the source."""
    text = (ROOT / page.source).read_text()
    if not page.sections:
        return text
    parts = {}
    for part in re.split(r"^(?=## )", text, flags=re.MULTILINE):
        first, _, rest = part.partition("\n")
        parts[first[3:] if first.startswith("## ") else ""] = rest.strip()
    wanted = []
    for name in page.sections:
        head = "" if name in ("", page.title) else f"## {name}\n\n"
        wanted.append(head + parts[name])
    return f"# {page.title}\n\n" + "\n\n".join(wanted) + "\n"


def without_code(text: str) -> str:
    """``text`` without blocks of code and inline code."""
    return _CODE.sub("", text)


def relink(text: str, source: str, target: str) -> str:
    """``text`` of the file ``source`` with links as the page ``target`` has to have them.

    Both are paths in the repository. Of a file that is on no page only the words stay.
    """

    def replaced(match: re.Match) -> str:
        label, link = match.groups()
        if re.match(r"[a-z]+:", link):
            return match[0]
        path, _, anchor = link.partition("#")
        file = os.path.normpath(os.path.join(os.path.dirname(source), path)) if path else source
        found = page_of(file, anchor)
        if found is None:
            return label.lstrip("![").rstrip("]")
        if found == target and anchor:
            return f"{label}(#{anchor})"
        shown = os.path.relpath(found, os.path.dirname(target))
        return f"{label}({shown}{'#' + anchor if anchor else ''})"

    kept = []
    hidden = _CODE.sub(lambda match: kept.append(match[0]) or f"\0{len(kept) - 1}\0", text)
    linked = _LINK.sub(replaced, hidden)
    return re.sub(r"\0(\d+)\0", lambda match: kept[int(match[1])], linked)


def page_of(file: str, anchor: str) -> str | None:
    """The page or picture that the site has of a file of the repository."""
    if file in GENERATED:
        return f"{SITE}/{GENERATED[file]}.md"
    names = [name for name, page in PAGES.items() if page.source == file]
    for name in names:
        slugs = {re.sub(r"\W+", "-", section.lower()) for section in PAGES[name].sections}
        if len(names) == 1 or anchor in slugs:
            return f"{SITE}/{name}.md"
    if names:
        return f"{SITE}/{names[0]}.md"
    return file if file.startswith("docs/") and (ROOT / file).is_file() else None


def table_of_contents(index: str) -> str:
    """A hidden table of contents for each section of the index, of the links in it."""
    parts = []
    for section in re.split(r"^## ", index, flags=re.MULTILINE)[1:]:
        caption, _, text = section.partition("\n")
        listed = "\n".join(
            f"{label[1:-1]} <{link.partition('.md')[0]}>" for label, link in _LINK.findall(text)
        )
        parts.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n")
    return "\n".join(parts)

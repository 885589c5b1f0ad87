"""One HTML page by itself: pictures inside, no network, no script."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

_LONGEST = 1500
"""Characters of a sample that are shown."""

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 760px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid #ccc; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p.lead { color: #555; margin-top: .3rem; }
figure { margin: 0 0 1.8rem; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: #444; font-size: .92rem; margin-top: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0;
         border-bottom: 1px solid #e2e2e2; }
thead th { border-bottom: 1.5px solid #888; }
tbody th { font-weight: normal; color: #555; white-space: nowrap; }
table.runs td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
table.grid { font-size: .82rem; }
table.grid td { font-variant-numeric: tabular-nums; white-space: pre-line; }
table.grid tbody th { color: #222; white-space: pre-line; }
p.note { color: #555; font-size: .85rem; margin-top: .4rem; }
table.texts { table-layout: fixed; font-size: .8rem; }
table.texts td { font-family: ui-monospace, monospace; white-space: pre-wrap;
                 overflow-wrap: anywhere; }
@media print {
  body { margin: 0; max-width: none; font-size: 11pt; }
  figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .wide { overflow: visible; }
}
"""


class Picture(NamedTuple):
    """A figure on the page: its title, which is read aloud in its place, PNG and caption."""

    title: str
    png: bytes
    caption: str


class Samples(NamedTuple):
    """Answers to a few prompts: one mapping a prompt, of the ``columns`` to texts."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Mapping[str, str]]


class Grid(NamedTuple):
    """A table of texts: rows as long as ``columns``, the first cell naming the row."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


class Section(NamedTuple):
    """A heading with its tables, its pictures, then tables of answers."""

    heading: str
    pictures: Sequence[Picture]
    samples: Sequence[Samples] = ()
    grids: Sequence[Grid] = ()


def make_page(
    title: str,
    lead: str,
    columns: Sequence[str],
    facts: Sequence[tuple[str, Sequence[str]]],
    sections: Sequence[Section],
    notes: Sequence[str] = (),
) -> str:
    """The page as HTML; every text is escaped.

    ``facts`` is the table of runs: rows of a name and a value for each of ``columns``; without
    columns, of a name and one value on everything.
    """
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    head = f"<thead><tr><td></td>{head}</tr></thead>" if columns else ""
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(value)}</td>" for value in values)
        + "</tr>"
        for name, values in facts
    )
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style></head>",
        "<body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(lead)}</p>',
        '<div class="wide"><table class="runs">',
        f"{head}<tbody>\n{rows}\n</tbody></table></div>",
        *(f'<p class="lead">{escape(note)}</p>' for note in notes),
        *(_section(section) for section in sections),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _section(section: Section) -> str:
    parts = [f"<section><h2>{escape(section.heading)}</h2>"]
    parts += [_grid(grid) for grid in section.grids]
    for picture in section.pictures:
        data = base64.b64encode(picture.png).decode("ascii")
        parts.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(picture.title)}">\n'
            f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        )
    parts += [_texts(samples) for samples in section.samples]
    return "\n".join([*parts, "</section>"])


def _grid(grid: Grid) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in grid.columns)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in grid.rows
    )
    heading = f"<h3>{escape(grid.heading)}</h3>\n" if grid.heading else ""
    note = f'\n<p class="note">{escape(grid.note)}</p>' if grid.note else ""
    return (
        f'{heading}<div class="wide"><table class="grid">'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>{note}"
    )


def _texts(samples: Samples) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in samples.columns)
    rows = "\n".join(
        "<tr>"
        + "".join(f"<td>{escape(_cut(row.get(c, '')))}</td>" for c in samples.columns)
        + "</tr>"
        for row in samples.rows
    )
    return (
        f'<h3>{escape(samples.heading)}</h3>\n<div class="wide"><table class="texts">'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _cut(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]} … ({len(text) - _LONGEST} more characters)"

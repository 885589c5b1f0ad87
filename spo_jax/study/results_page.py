"""A study's evidence on disk: one HTML page, the table as Markdown and JSON, the pictures."""

from __future__ import annotations

from pathlib import Path

from spo_jax.checkpoints.atomic import replace_bytes
from spo_jax.report.figures import figure_to_png
from spo_jax.report.page import Grid, Picture, Section, make_page
from spo_jax.study.claims import check_claims, claims_to_grid
from spo_jax.study.over_updates import read_curves
from spo_jax.study.pictures import FIGURES, draw
from spo_jax.study.records import Study
from spo_jax.study.table import (
    Table,
    grid_to_markdown,
    summarize,
    table_to_grids,
    table_to_json,
    table_to_markdown,
)


def make_study_page(study: Study, out_dir: str | Path) -> Path:
    """Write ``study.html``, ``table.md``, ``table.json`` and ``figures/*.png``; the page's path.

    A study that is still running is shown as far as it went. Each file is replaced in one piece,
    the page last; pictures that have no data any more go.

    Raises:
        ValueError: records that do not fit together; see ``check_study``.
        OSError: a folder that cannot be written.
    """
    out = Path(out_dir)
    table, claims = summarize(study), check_claims(study)
    verdicts = claims_to_grid(claims)
    pictures = _pictures(study)
    markdown = table_to_markdown(table) + "\n" + grid_to_markdown(verdicts) + "\n"
    files = {f"figures/{name}.png": picture.png for name, picture in pictures.items()}
    files |= {
        "table.json": table_to_json(table, claims).encode(),
        "table.md": markdown.encode(),
        "study.html": _page(study, table, verdicts, list(pictures.values())).encode(),
    }
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        for name in FIGURES.keys() - pictures.keys():
            (out / "figures" / f"{name}.png").unlink(missing_ok=True)
        for name, data in files.items():
            replace_bytes(out / name, data)
    except OSError as error:
        raise OSError(f"cannot write the study to {out} ({error}): choose another folder") from None
    return out / "study.html"


def _pictures(study: Study) -> dict[str, Picture]:
    curves, pictures = read_curves(study), {}
    for name, drawing in FIGURES.items():
        figure = draw(name, study, curves)
        if figure is not None:
            png = figure_to_png(figure)
            pictures[name] = Picture(figure.get_suptitle(), png, drawing.caption)
    return pictures


def _page(study: Study, table: Table, verdicts: Grid, pictures: list[Picture]) -> str:
    runs = f"{table.finished} of {table.planned} runs"
    left = table.planned - table.finished
    done = runs if not left else f"{runs}: {left} to go, every number and verdict is preliminary"
    facts = [("command", [study.command])]
    facts += [(name, [text]) for name, text in study.facts.items()]
    sections = [
        Section("Do the claims hold?", [], grids=[verdicts._replace(heading="")]),
        Section("Table", [], grids=table_to_grids(table)),
    ]
    if pictures:
        sections.append(Section("Pictures", pictures))
    return make_page(study.title, f"{done}.", [], facts, sections)

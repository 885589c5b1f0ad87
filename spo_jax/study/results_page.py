"""A study's evidence on disk: one HTML page, the table as Markdown and JSON, the pictures."""

from __future__ import annotations

from pathlib import Path

from spo_jax.checkpoints.atomic import replace_bytes
from spo_jax.parallel.processes import say
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
    the page last; pictures that have no data any more go. A picture that cannot be drawn costs
    nothing else: the page and the standard error say which, and why.

    Raises:
        ValueError: records that do not fit together; see ``check_study``.
        OSError: a folder that cannot be written.
    """
    out = Path(out_dir)
    table, claims = summarize(study), check_claims(study)
    verdicts = claims_to_grid(claims)
    pictures, failed = _pictures(study)
    markdown = table_to_markdown(table) + "\n" + grid_to_markdown(verdicts) + "\n"
    files = {f"figures/{name}.png": picture.png for name, picture in pictures.items()}
    files |= {
        "table.json": table_to_json(table, claims).encode(),
        "table.md": markdown.encode(),
        "study.html": _page(study, table, verdicts, list(pictures.values()), failed).encode(),
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


def _pictures(study: Study) -> tuple[dict[str, Picture], list[str]]:
    """The pictures by name; and in words those that could not be drawn."""
    pictures: dict[str, Picture] = {}
    failed: list[str] = []
    try:
        curves = read_curves(study)
    except Exception as error:
        curves = {}
        failed.append(_failure("all curves over updates", error))
    for name, drawing in FIGURES.items():
        try:
            figure = draw(name, study, curves)
            if figure is not None:
                png = figure_to_png(figure)
                pictures[name] = Picture(figure.get_suptitle(), png, drawing.caption)
        except Exception as error:  # whatever it is, the tables are worth more
            failed.append(_failure(name, error))
    return pictures, failed


def _failure(name: str, error: Exception) -> str:
    said = f"{name} ({type(error).__name__}: {error})"
    say(f"WARNING a picture could not be drawn: {said}. The tables are whole; please report it")
    return said


def _page(
    study: Study, table: Table, verdicts: Grid, pictures: list[Picture], failed: list[str]
) -> str:
    runs = f"{table.finished} of {table.planned} runs"
    left = table.planned - table.finished
    done = runs if not left else f"{runs}: {left} to go, every number and verdict is preliminary"
    facts = [("command", [study.command])]
    facts += [(name, [text]) for name, text in study.facts.items()]
    if failed:
        facts.append(("pictures that could not be drawn", ["; ".join(failed)]))
    sections = [
        Section("Do the claims hold?", [], grids=[verdicts._replace(heading="")]),
        Section("Table", [], grids=table_to_grids(table)),
    ]
    if pictures:
        sections.append(Section("Pictures", pictures))
    return make_page(study.title, f"{done}.", [], facts, sections)

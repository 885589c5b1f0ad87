"""Run folders -> pictures and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spo_jax.checkpoints.atomic import replace_bytes
from spo_jax.config.schema import MIXTURE
from spo_jax.report.figures import FIGURES, GROUPS, RunCurves, draw, figure_to_png
from spo_jax.report.page import Picture, Samples, Section, make_page
from spo_jax.report.runs import (
    STAGES,
    StageRun,
    find_stages,
    read_description,
    read_stage,
    solver_of,
)

__all__ = ["make_report"]


def make_report(
    runs: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    labels: Sequence[str] | None = None,
) -> Path:
    """Write one HTML page on some runs, beside it a folder of its PNG files; returns its path.

    A run of several stages counts as two runs, its preference stage and its baseline. A run
    that is still going is shown as far as it went. ``out`` defaults to ``report.html`` in the
    run's folder, or in the current folder for several runs; ``labels`` name the runs.

    Raises:
        FileNotFoundError: no run at a path.
        ValueError: no run given, nothing usable in one, or labels of another number.
    """
    if not runs:
        raise ValueError("no run given: name at least one folder of a run")
    if labels is not None and len(labels) != len(runs):
        raise ValueError(
            f"{len(labels)} labels ({', '.join(labels)}) for {len(runs)} runs: give one label a "
            "run, a run of several stages counting as one"
        )
    if out is None:
        out = (Path(runs[0]) if len(runs) == 1 else Path()) / "report.html"
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"{out} is a folder: name a file for the page, as {out / 'report.html'}")

    names, found = [], []
    for number, run in enumerate(runs):
        stages = find_stages(run)
        own = labels[number] if labels is not None else None
        for folder in stages:
            config, stage = read_description(folder)
            names.append(_label(Path(run), stage, config, own, len(stages) > 1, len(runs) > 1))
            found.append((folder, stage, config))
    read = [
        read_stage(folder, stage, config, label=label)
        for (folder, stage, config), label in zip(found, _distinct(names), strict=True)
    ]
    pictures = _pictures([run.curves for run in read])
    title = "Report: " + (Path(runs[0]).resolve().name if len(runs) == 1 else f"{len(runs)} runs")
    page = _page(title, read, pictures)
    _write(out, page, {name: picture.png for name, picture in pictures.items()})
    return out


def _label(
    run: Path, stage: str, config: dict[str, Any], own: str | None, staged: bool, several: bool
) -> str:
    """What a run is called in the figures."""
    folder = run.resolve()
    name = folder.name if folder.name not in STAGES else f"{folder.parent.name}/{folder.name}"
    name = own or name
    if not staged:
        return name
    loss = config.get("loss") or {}
    loss = MIXTURE if isinstance(loss, list) else loss.get("name", "")
    solver = f" + {solver_of(stage, config).get('name', '')}" if stage == "preference" else ""
    said = f"{stage} ({loss}{solver})" if loss else stage
    return f"{name}: {said}" if several or own else said


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, equal ones numbered."""
    found: list[str] = []
    for name in names:
        number, label = 1, name
        while label in found:
            number += 1
            label = f"{name} ({number})"
        found.append(label)
    return found


def _pictures(runs: Sequence[RunCurves]) -> dict[str, Picture]:
    pictures = {}
    for name, drawing in FIGURES.items():
        figure = draw(name, runs)
        if figure is not None:
            title = f"{figure.get_suptitle()} ({', '.join(run.label for run in runs)})"
            pictures[name] = Picture(title, figure_to_png(figure), drawing.caption)
    return pictures


def _page(title: str, read: Sequence[StageRun], pictures: dict[str, Picture]) -> str:
    sections = []
    for group in GROUPS:
        shown = [pictures[name] for name in pictures if FIGURES[name].group == group]
        samples = [_samples(run) for run in read if run.samples] if group == GROUPS[-1] else []
        if shown or samples:
            sections.append(Section(group, shown, samples))
    facts = [(name, [value(run) for run in read]) for name, value in _FACTS.items()]
    facts = [row for row in facts if set(row[1]) != {"–"}]
    lead = (
        "In the figures of one quantity over updates, faint lines are single updates, strong "
        "ones their running mean, hollow markers held-out rows."
    )
    notes = [
        "From preference accuracy to gap: the last held-out evaluation; with an asterisk, where "
        "there was none, the mean over the last tenth of the training updates."
    ]
    if any(_moving(run) != "–" for run in read):
        notes.append(
            "Where the reference follows the policy, loss, rewards, margin and preference accuracy "
            "of training updates are against it, and fall back whenever it has followed; "
            "log-ratios, the gap and all held-out figures are counted from where it began."
        )
    return make_page(title, lead, [run.curves.label for run in read], facts, sections, notes)


def _moving(run: StageRun) -> str:
    moving = (run.config.get("reference") or {}).get("moving")
    if not moving or run.stage == "sft":
        return "–"
    return f"follows the policy (alpha={moving['alpha']:g}, every={moving['every']} updates)"


def _samples(run: StageRun) -> Samples:
    step, rows = run.samples
    columns = ["prompt", "chosen", "rejected", "greedy", "sampled"]
    columns = [c for c in columns if any(row.get(c) for row in rows)]
    texts = [{c: str(row.get(c) or "") for c in columns} for row in rows]
    return Samples(f"{run.curves.label}: answers after update {step}", columns, texts)


def _options(section: Any) -> str:
    if isinstance(section, list):  # a mixture of losses
        return " + ".join(map(_options, section))
    rest = ", ".join(f"{k}={v}" for k, v in section.items() if k != "name")
    return f"{section.get('name', '–')}" + (f" ({rest})" if rest else "")


def _last(key: str, form: str, scale: float = 1.0):
    """The last held-out value; without one, the mean over the last tenth of training, marked."""

    def value(run: StageRun) -> str:
        if key in run.curves.heldout:
            return form.format(scale * run.curves.heldout[key].values[-1])
        if key in run.curves.train:
            values = run.curves.train[key].values
            return form.format(scale * values[-max(1, len(values) // 10) :].mean()) + " *"
        return "–"

    return value


def _updates(run: StageRun) -> str:
    curves = [*run.curves.train.values(), *run.curves.heldout.values()]
    return f"{int(max(curve.steps.max() for curve in curves))}"


def _throughput(run: StageRun) -> str:
    curve = run.curves.train.get("tokens_per_second")
    return "–" if curve is None else f"{curve.values[-1]:,.0f} tokens/s"


_FACTS = {
    "folder": lambda run: str(run.folder),
    "stage": lambda run: run.stage,
    "loss": lambda run: "–" if run.stage == "sft" else _options(run.config.get("loss") or {}),
    "solver": lambda run: _options(solver_of(run.stage, run.config)),
    "reference": _moving,
    "seed": lambda run: str(run.config.get("seed", "–")),
    "updates done": _updates,
    "preference accuracy": _last("rewards/accuracies", "{:.1f} %", 100.0),
    "margin": _last("rewards/margins", "{:+.3f}"),
    "chosen log-ratio": _last("log_ratio/chosen", "{:+.2f} nats"),
    "rejected log-ratio": _last("log_ratio/rejected", "{:+.2f} nats"),
    "SFT loss": _last("inner_loss", "{:.4f} nats per token"),
    "gap": _last("gap", "{:+.4f} nats per token"),
    "tolerance": lambda run: "–" if run.stage == "sft" else f"{run.curves.tolerance:g}",
    "throughput": _throughput,
    "probes": lambda run: run.probing or "–",
}


def _write(out: Path, page: str, pngs: dict[str, bytes]) -> None:
    """Pictures first, the page last, each in one piece; pictures of an older report go."""
    folder = out.parent / f"{out.stem}_figures"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FIGURES.keys() - pngs.keys():
            (folder / f"{name}.png").unlink(missing_ok=True)
        for path, data in (
            *((folder / f"{name}.png", png) for name, png in pngs.items()),
            (out, page.encode("utf-8")),
        ):
            replace_bytes(path, data)
    except OSError as error:
        raise OSError(f"cannot write the report to {out} ({error}): give --out another") from None

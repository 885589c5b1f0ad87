"""The table of a study: means over seeds and paired differences, as data, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from spo_jax.evaluation.heldout import wilson_interval
from spo_jax.evaluation.texts import TEXTS
from spo_jax.report.page import Grid
from spo_jax.study.records import (
    Record,
    Study,
    baseline_row,
    by_seed,
    check_study,
    controls_of,
    finished_runs,
    planned_runs,
    seeds_of,
    starts_of,
    value,
)
from spo_jax.study.statistics import (
    Difference,
    Interval,
    Mean,
    mean_over_seeds,
    paired_difference,
)

ACCURACY = "accuracy"
PREFERENCES = ("rewards/accuracies", "logprobs/accuracies")
METRICS = (
    ACCURACY, "unanswered", "cut_off", *PREFERENCES, "rewards/margins",
    "log_ratio/chosen", "log_ratio/rejected", "inner_loss", "gap", "answer_tokens",
)  # fmt: skip
MISSING = "–"

_OUTCOMES = {
    "rewards/accuracies": ("preference accuracy %", 100.0, "{:.1f}"),
    "logprobs/accuracies": ("chosen likelier %", 100.0, "{:.1f}"),
    "log_ratio/chosen": ("chosen log-ratio", 1.0, "{:+.2f}"),
    "log_ratio/rejected": ("rejected log-ratio", 1.0, "{:+.2f}"),
    "unanswered": ("unanswered %", 100.0, "{:.1f}"),
    "cut_off": ("cut off %", 100.0, "{:.1f}"),
    "answer_tokens": ("tokens of an answer", 1.0, "{:.1f}"),
}


class Line(NamedTuple):
    """A row of the table from one start; without finished runs, what is known of it is empty.

    ``accuracy_interval`` is Wilson's over the test problems, of a row with a single seed.
    """

    start: str
    row: str
    loss: str | None
    variant: str | None
    point: Mapping[str, float]
    seeds: tuple[int, ...]
    means: Mapping[str, Mean]
    differences: tuple[Difference, ...]
    accuracy_interval: Interval | None = None

    def difference(self, metric: str, role: str, to: str | None = None) -> Difference | None:
        """The difference of a metric to the row of that role (and name)."""
        for found in self.differences:
            if (found.metric, found.role) == (metric, role) and to in (None, found.to):
                return found
        return None


class Table(NamedTuple):
    """All rows of all starts, those without a finished run among them."""

    title: str
    baseline: str
    start_row: str
    controls: tuple[str, ...]
    seeds: tuple[int, ...]
    lines: tuple[Line, ...]
    finished: int
    planned: int


def summarize(study: Study) -> Table:
    """Means, standard errors and paired differences of every row, from whatever has finished.

    Raises:
        ValueError: records that do not fit together; see ``check_study``.
    """
    check_study(study)
    lines = [_line(study, start, row) for start in starts_of(study) for row in study.rows]
    return Table(
        study.title, study.baseline, study.start_row, controls_of(study), seeds_of(study),
        tuple(lines), finished_runs(study), planned_runs(study),
    )  # fmt: skip


def _line(study: Study, start: str, row: str) -> Line:
    known = [r for r in study.records if (r.start, r.row) == (start, row)]
    if not known:
        return Line(start, row, None, None, {}, (), {}, ())
    runs = by_seed(study, start, row)
    means = {}
    for metric in (*METRICS, *_texts(known)):
        values = [v for v in (value(r, metric) for r in runs.values()) if v is not None]
        if mean := mean_over_seeds(values):
            means[metric] = mean
    differences = tuple(_differences(study, start, row, known[0]))
    first = known[0]
    return Line(
        start, row, first.loss, first.variant, dict(first.point), tuple(runs), means, differences,
        _interval(list(runs.values())),
    )  # fmt: skip


def _interval(runs: Sequence[Record]) -> Interval | None:
    if len(runs) != 1 or not runs[0].right:
        return None
    return Interval(*wilson_interval(sum(runs[0].right), len(runs[0].right)))


def _texts(records: Sequence[Record]) -> tuple[str, ...]:
    """The metrics of texts that nothing was trained on, whatever their names."""
    found = (key for record in records for key in record.metrics if key.startswith(TEXTS))
    return tuple(dict.fromkeys(found))


def _differences(study: Study, start: str, row: str, record: Record) -> Iterator[Difference]:
    others = [("baseline", baseline_row(study, record)), ("start", study.start_row)]
    others += [("control", control) for control in controls_of(study)]
    ours = by_seed(study, start, row)
    for role, other in others:
        if other in (None, row) or row == study.start_row:
            continue
        theirs = by_seed(study, start, other)
        for metric in (ACCURACY, *PREFERENCES):
            found = paired_difference(ours, theirs, metric=metric, role=role, to=other)
            if found is not None:
                yield found


# As text


def table_to_grids(table: Table) -> list[Grid]:
    """Two grids of texts a start: the accuracies, and what else happened."""
    grids = []
    starts = dict.fromkeys(line.start for line in table.lines)
    for start in starts:
        lines = [line for line in table.lines if line.start == start]
        of = f" (start: {start})" if len(starts) > 1 else ""
        others = _others(lines, f"Preferences and likelihoods{of}")
        if others is None or any(ACCURACY in line.means for line in lines):
            grids.append(_accuracies(table, lines, f"Exact answers{of}"))
        if others is not None:
            grids.append(others)
    return grids


def _accuracies(table: Table, lines: list[Line], heading: str) -> Grid:
    roles = [("baseline", None, f"vs {table.baseline}"), ("start", None, f"vs {table.start_row}")]
    roles += [("control", name, f"vs {name}") for name in table.controls]
    rows = []
    for line in lines:
        found = [line.difference(ACCURACY, role, name) for role, name, _ in roles]
        seeds = f"{len(line.seeds)}" if line.seeds else MISSING
        accuracy = _mean(line, ACCURACY, 100.0, "{:.1f}")
        if line.accuracy_interval is not None:
            low, high = line.accuracy_interval
            accuracy += f"\n{{{100 * low:.1f}, {100 * high:.1f}}}"
        rows.append([line.row, seeds, accuracy, *map(_difference, found)])
    columns = ["", "seeds", "accuracy %", *(name for *_, name in roles)]
    return Grid(heading, columns, rows, _note(table, lines))


def _note(table: Table, lines: list[Line]) -> str:
    """What the cells hold, as far as they hold it."""
    found = [d for line in lines for d in line.differences if d.metric == ACCURACY]
    said = ["accuracy: share of the test problems answered exactly"]
    if any(line.means.get(ACCURACY, Mean(1, 0.0, None)).n > 1 for line in lines):
        said[0] += ", mean over seeds ± its standard error"
    if any(line.accuracy_interval is not None for line in lines):
        said[0] += ", of a single seed { } Wilson's 95 % interval over the test problems"
    if found:
        said.append(f"vs: mean paired difference in points; {table.baseline} is the same loss' own")
    if any(d.over_seeds for d in found):
        said.append("[ ]: its 95 % interval by Student's t over the seeds")
    if any(d.over_problems for d in found):
        said.append(
            "{ }: its 95 % normal interval over the test problems, problem by problem, for "
            "these trained models (it leaves out how much another seed would change)"
        )
    return "; ".join(said) + f". {MISSING}: no finished run."


def _others(lines: list[Line], heading: str) -> Grid | None:
    texts = dict.fromkeys(m for line in lines for m in line.means if m.startswith(TEXTS))
    looks = {m: (f"loss on {m.removeprefix(TEXTS)}", 1.0, "{:.3f}") for m in texts}
    shown = {
        metric: look
        for metric, look in {**_OUTCOMES, **looks}.items()
        if any(metric in line.means for line in lines)
    }
    if not shown:
        return None
    rows = [
        [line.row, *(_mean(line, metric, *look[1:]) for metric, look in shown.items())]
        for line in lines
    ]
    said = {
        "rewards/accuracies": "preference accuracy: held-out pairs whose chosen has the higher "
        "reward, as the method scores it",
        "logprobs/accuracies": "chosen likelier: held-out pairs whose chosen has the higher "
        "log-prob under the policy",
        "log_ratio/chosen": "log-ratios: nats, against the start; a chosen one below 0 is the "
        "shift",
        "unanswered": "unanswered: outputs without a final answer",
        "cut_off": "cut off: outputs that reached the length limit",
        "answer_tokens": "tokens of an answer: its mean length",
    }
    notes = [text for metric, text in said.items() if metric in shown]
    if texts:
        notes.append("loss on: nats per token of texts that nothing was trained on")
    note = "; ".join(notes) + "."
    return Grid(heading, ["", *(look[0] for look in shown.values())], rows, note)


def _mean(line: Line, metric: str, scale: float, form: str) -> str:
    found = line.means.get(metric)
    if found is None:
        return MISSING
    text = form.format(scale * found.mean)
    if found.error is not None:
        text += f" ± {form.replace('+', '').format(scale * found.error)}"
    return text if found.n == len(line.seeds) else f"{text} (n = {found.n})"


def _difference(found: Difference | None) -> str:
    if found is None:
        return MISSING
    lines = [f"{100 * found.mean:+.1f}"]
    for interval, (left, right) in ((found.over_seeds, "[]"), (found.over_problems, "{}")):
        if interval is not None:
            lines.append(f"{left}{100 * interval.low:+.1f}, {100 * interval.high:+.1f}{right}")
    return "\n".join(lines)


def table_to_markdown(table: Table) -> str:
    """The table in GitHub's Markdown, with how many runs it stands on."""
    parts = [f"## {table.title}", f"{table.finished} of {table.planned} runs."]
    parts += [grid_to_markdown(grid) for grid in table_to_grids(table)]
    return "\n\n".join(parts) + "\n"


def grid_to_markdown(grid: Grid) -> str:
    """One grid with its heading and note."""
    lines = ["| " + " | ".join(map(_cell, grid.columns)) + " |"]
    lines.append("|---" * len(grid.columns) + "|")
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in grid.rows]
    return f"### {grid.heading}\n\n" + "\n".join(lines) + (f"\n\n{grid.note}" if grid.note else "")


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")


def table_to_json(table: Table, claims: Sequence[tuple] = ()) -> str:
    """Everything the table (and ``check_claims``) knows, unrounded; shares stay shares (0 to 1)."""
    tree = {**_plain(table), "claims": [_plain(claim) for claim in claims]}
    return json.dumps(tree, indent=1, allow_nan=False) + "\n"


def _plain(item: object) -> object:
    if isinstance(item, Mapping):
        return {key: _plain(v) for key, v in item.items()}
    if isinstance(item, Interval):
        return list(item)
    if hasattr(item, "_asdict"):
        return _plain(item._asdict())
    return [_plain(v) for v in item] if isinstance(item, tuple) else item

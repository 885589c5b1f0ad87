"""Where metrics go: JSON lines, boards, a progress bar; and the displacement alarm."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spo_jax.checkpoints.atomic import replace_text, to_json, without_nan
from spo_jax.dynamics.probes import DYNAMICS_FILE, Probes
from spo_jax.parallel.processes import by_first
from spo_jax.training.boards import Board, open_boards
from spo_jax.types import TrainState


class StepLines:
    """A file of JSON lines, one or more a step; one process of a run writes (``active``).

    Lines of a step that a resumed run does again, from ``first_step`` on, are dropped first.
    ``steps`` are those of the lines kept.
    """

    def __init__(self, path: Path, *, first_step: int = 0, active: bool = True):
        self._file = None
        kept = _lines_before(path, first_step) if path.exists() else []
        self.steps = frozenset(step for step, _ in kept)
        if active and path.exists():
            replace_text(path, "".join(line for _, line in kept))
        if active:
            self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line, at once on the disk; a number that is none is null, so that it stays JSON."""
        if self._file is not None:
            line, _ = without_nan({"step": step, **values})
            self._file.write(to_json(line, "a line of metrics") + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


SKIPPED_FILE = "skipped.jsonl"
"""Inside a run: the updates that were not applied, with their rows."""


class MetricsWriter:
    """``RUN/metrics.jsonl`` and the ``boards`` by name; one process of a run writes.

    Lines of a step that a resumed run does again are dropped first, so that the file
    has each step once. ``evaluated`` are the steps whose evaluation is among those kept.
    ``config`` is what services show as the run's settings.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int = 0,
        active: bool = True,
        boards: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ):
        self.skipped_file = folder / SKIPPED_FILE
        self.evaluated: set[int] = set()
        self._lines = self._skipped = None
        self._boards: list[Board] = []
        self._first_step = first_step
        if not active:
            return
        self._lines = StepLines(folder / "metrics.jsonl", first_step=first_step)
        self._boards = open_boards(boards, folder, config=config or {}, first_step=first_step)
        if self.skipped_file.exists():
            self._open_skipped()
        self.evaluated = {
            line["step"]
            for line in read_metrics(folder)
            if any(key.startswith("eval/") for key in line)
        }

    def _open_skipped(self) -> StepLines:
        if self._skipped is None:
            self._skipped = StepLines(self.skipped_file, first_step=self._first_step)
        return self._skipped

    def write_skipped(self, step: int, found: Mapping[str, Any]) -> None:
        """One line of ``skipped.jsonl``: an update that was not applied, and why."""
        if self._lines is not None:
            self._open_skipped().write(step, found)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line; values that are not finite (a level that was not computed) are left out."""
        if self._lines is None:
            return
        finite = {k: float(v) for k, v in metrics.items() if math.isfinite(float(v))}
        self._lines.write(step, finite)
        for board in self._boards:
            board.log(step, finite)

    def close(self) -> None:
        """Flush and close all."""
        if self._lines is not None:
            self._lines.close()
        for board in self._boards:
            board.close()
        if self._skipped is not None:
            self._skipped.close()


def _lines_before(path: Path, first_step: int) -> list[tuple[int, str]]:
    """The lines of steps before ``first_step``, each behind its step."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError):
            continue  # a line cut short by a crash
        if step < first_step:
            kept.append((step, line + "\n"))
    return kept


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_metrics(folder: Path) -> list[dict[str, float | int]]:
    """The lines of ``metrics.jsonl``."""
    return read_lines(folder / "metrics.jsonl")


class ProbeWriter:
    """``(step, state)``: probe and write a line of ``dynamics.jsonl``, unless that step has one.

    Lines of steps that a resumed run does again, from ``first_step`` on, are dropped first; one
    process of a run writes.
    """

    def __init__(
        self, probes: Probes, folder: Path, step_fn: Any, *, first_step: int, active: bool
    ):
        self._probes, self._step_fn = probes, step_fn
        self._lines = StepLines(folder / DYNAMICS_FILE, first_step=first_step, active=active)

    def __call__(self, step: int, state: TrainState) -> None:
        """Probe ``state``, which is that after ``step`` updates."""
        if by_first(lambda: step not in self._lines.steps):
            self._lines.write(step, self._probes.record(state, self._step_fn))


class Progress:
    """One line with step, loss, gap, tokens/s and time left.

    Without a terminal plain lines: of the first update, of every tenth of the steps, and of the
    first that is done ``seconds`` after the line before.
    """

    def __init__(
        self, name: str, total: int, start: int = 0, active: bool = True, *, seconds: float = 60.0
    ):
        self._name, self._total, self._active = name, total, active
        self._first, self._seconds, self._said = start + 1, seconds, time.monotonic()
        self._timed: tuple[int, float] | None = None
        self._live = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=name,
            disable=not (active and self._live),
            dynamic_ncols=True,
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| [{elapsed}<{remaining}]{postfix}",
        )
        self._every = max(1, total // 10)

    def update(self, step: int, metrics: Mapping[str, float], tokens_per_second: float) -> None:
        """Show the state after ``step`` updates."""
        shown = [f"{short} {metrics[key]:.4g}" for key, short in _SHOWN if _is_number(metrics, key)]
        if tokens_per_second:  # not known before the second update
            shown.append(f"{tokens_per_second:,.0f} tok/s")
        waiting = metrics.get("data_wait_share", 0.0)
        if waiting >= _MUCH_WAITING:
            shown.append(f"{waiting:.0%} waiting for data")
        self._bar.set_postfix_str("  ".join(shown), refresh=False)
        self._bar.update(step - self._bar.n)
        if self._active and not self._live and self._is_due(step):
            shown += self._time_left(step)
            print(f"{self._name} {step}/{self._total}  " + "  ".join(shown), file=sys.stderr)

    def _is_due(self, step: int) -> bool:
        now = time.monotonic()
        due = step in (self._first, self._total) or step % self._every == 0
        if due or now - self._said >= self._seconds:
            self._said = now
            return True
        return False

    def _time_left(self, step: int) -> list[str]:
        """By the updates behind the first, which was compiled; nothing where it is short."""
        now = time.monotonic()
        if self._timed is None:
            self._timed = (step, now)
            return []
        first, began = self._timed
        left = (self._total - step) * (now - began) / max(step - first, 1) / 60
        return [f"about {left:.0f} min left"] if left >= 1 else []

    def say(self, text: str) -> None:
        """A line of text that does not break the bar."""
        if self._active:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


_MUCH_WAITING = 0.05
"""Share of the time from which on it is shown."""

_SHOWN = (
    ("loss", "loss"),
    ("inner_loss", "inner"),
    ("gap", "gap"),
    ("log_ratio/chosen", "chosen"),
)


def _is_number(metrics: Mapping[str, float], key: str) -> bool:
    return key in metrics and not math.isnan(float(metrics[key]))


class MovementAlarm:
    """Warns once when the first updates leave nearly all weights as they were.

    Looks at the mean of ``moved_share`` over the first ``window`` updates that are applied.
    """

    def __init__(self, threshold: float = 0.1, window: int = 10):
        self._threshold, self._window = threshold, window
        self._shares: list[float] = []
        self._gradient = False

    def update(self, metrics: Mapping[str, float], *, last: bool) -> str | None:
        """The warning's text when the window is full, or the ``last`` update done, else None."""
        if "moved_share" not in metrics or len(self._shares) == self._window:
            return None
        shares = [float(metrics.get(k, 0.0)) for k in ("moved_share", "inner_moved_share")]
        self._shares.append(max(shares))
        self._gradient |= float(metrics["grad_norm"]) > 0
        mean = sum(self._shares) / len(self._shares)
        if (len(self._shares) < self._window and not last) or mean >= self._threshold:
            return None
        if not self._gradient:
            return (
                f"WARNING the gradient of the first {len(self._shares)} updates is 0: the loss "
                "has nothing to learn from these rows. Look at the pairs, and at beta"
            )
        return (
            f"WARNING the first {len(self._shares)} updates changed {100 * mean:.2g} % of the "
            "weights that have a gradient (moved_share): the others' steps are rounded away in the "
            "dtype of the weights. Raise the learning rate, or set model.param_dtype: float32"
        )


class DisplacementAlarm:
    """Warns when the chosen lose probability while the margin grows (METHOD section 2).

    Looks at exponential averages over about ``window`` updates, so that one odd batch
    raises nothing, and warns again only after the log-ratio has recovered.
    """

    def __init__(self, threshold: float, window: int = 10):
        self.threshold = threshold
        self._decay = 1 - 1 / window
        self._chosen = self._margin = self._weight = 0.0
        self._best_margin = -math.inf
        self._raised = False

    def get_state(self) -> dict[str, Any]:
        """The averages, as JSON values."""
        best = self._best_margin if math.isfinite(self._best_margin) else None
        return {
            "averages": [self._chosen, self._margin, self._weight],
            "best_margin": best,
            "raised": self._raised,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from averages that ``get_state`` gave."""
        self._chosen, self._margin, self._weight = state["averages"]
        best = state["best_margin"]
        self._best_margin = -math.inf if best is None else best
        self._raised = state["raised"]

    def update(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """The warning's text when the alarm goes off at this step, else None."""
        if not all(_is_number(metrics, k) for k in ("log_ratio/chosen", "log_ratio/margin")):
            return None
        d = self._decay
        self._weight = d * self._weight + (1 - d)
        self._chosen = d * self._chosen + (1 - d) * float(metrics["log_ratio/chosen"])
        self._margin = d * self._margin + (1 - d) * float(metrics["log_ratio/margin"])
        chosen, margin = self._chosen / self._weight, self._margin / self._weight
        growing = margin >= self._best_margin and margin > 0
        self._best_margin = max(self._best_margin, margin)
        if chosen > self.threshold / 2:
            self._raised = False
        if chosen >= self.threshold or not growing or self._raised:
            return None
        self._raised = True
        return (
            f"WARNING displacement at step {step}: the chosen completions have lost "
            f"{-chosen:.2f} nats against the reference (alarm at {-self.threshold:g}) while the "
            f"margin grew to {margin:.2f}. Probability leaks to answers in neither column; "
            "raise solver.penalty_weight, or use solver penalty if this is preference_only."
        )

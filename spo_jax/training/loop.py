"""The training loop: dispatch, look back one step, evaluate, save, stop in good order."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from spo_jax.checkpoints import CheckpointError, Checkpoints
from spo_jax.config.schema import LoopConfig
from spo_jax.parallel.processes import Vote, by_first
from spo_jax.training.batches import Batches, positions
from spo_jax.training.stopping import (
    Diverged,
    Interrupted,
    Stopped,
    check_learnt,
    stop_signals,
)
from spo_jax.training.trackers import DisplacementAlarm, MetricsWriter, MovementAlarm, Progress
from spo_jax.training.update import of_level_taken
from spo_jax.types import BilevelBatch, TrainState


class Throughput:
    """Real tokens per second over the last steps, without compiling, evaluating and saving.

    ``data_wait_share`` is the share of that time in which the next batch was not there yet.
    """

    def __init__(self, window: int = 20):
        self._spans: list[tuple[int, float, float]] = []
        self._window = window
        self._last: float | None = None
        self._waited = 0.0

    def pause(self) -> None:
        """What happens until the next ``add`` is not training."""
        self._last = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside is waiting for data."""
        begun = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begun

    def add(self, tokens: int) -> float:
        """Count the tokens of a finished step; returns tokens per second (0: not known yet)."""
        now = time.perf_counter()
        if self._last is not None:
            span = (tokens, now - self._last, self._waited)
            self._spans = [*self._spans[1 - self._window :], span]
        self._last, self._waited = now, 0.0
        seconds = sum(s for _, s, _ in self._spans)
        return sum(t for t, _, _ in self._spans) / seconds if seconds else 0.0

    @property
    def data_wait_share(self) -> float:
        """Of the time that ``add`` has counted."""
        seconds = sum(s for _, s, _ in self._spans)
        return sum(w for _, _, w in self._spans) / seconds if seconds else 0.0


@dataclass
class Counters:
    """What a run has counted so far; saved with it, so that a resumed run counts on.

    ``skipped`` updates were not applied, the last ``in_a_row`` of them without a good one
    behind; ``still`` ones were applied and changed no weight; ``tokens`` are real ones, of both
    levels.
    """

    skipped: int = 0
    in_a_row: int = 0
    tokens: int = 0
    still: int = 0


class _Pending(NamedTuple):
    """A step that is dispatched and not yet looked at."""

    step: int
    positions: int
    ids: dict[str, np.ndarray]
    metrics: Any
    vote: Any


def run_loop(
    step_fn: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]],
    state: TrainState,
    batches: Batches,
    **options: Any,
) -> TrainState:
    """Go on from ``state.step`` to ``steps`` updates; saves at the end and when stopped.

    The options are the fields of ``Loop``.

    Raises:
        Stopped: SIGINT or SIGTERM came, to any process; the state is saved.
        Diverged: ``loop.max_skipped`` updates in a row were not applied, and the state is saved;
            or a step of the optimizer was not finite, and it is not.
        NothingLearnt: every update is done, and none has changed a weight.
        CheckpointError: the last checkpoint could not be written. One that fails on the way
            is a warning, and the next one tries again.
    """
    return Loop(step_fn, state, batches, **options).run()


@dataclass
class Loop:
    """One life of a stage's training.

    ``evaluate(state, check=...)`` calls ``check`` between batches, which gives up when the run
    is to stop. ``probe(step, state)`` is called every ``probe_every`` updates, where it starts
    and at the end; it must leave the state as it is. ``counters`` and ``alarm`` go on from where
    the life before left them.

    Metrics of a step are read after the next one is dispatched, so that the device
    never waits for the host.
    """

    step_fn: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
    state: TrainState
    batches: Batches
    name: str
    steps: int
    loop: LoopConfig
    place: Callable[[BilevelBatch], BilevelBatch]
    evaluate: Callable[..., dict[str, float]] | None
    writer: MetricsWriter
    checkpoints: Checkpoints
    progress: Progress
    vote: Vote
    counters: Counters = field(default_factory=Counters)
    alarm: DisplacementAlarm | None = None
    probe: Callable[[int, TrainState], None] | None = None
    probe_every: int = 1

    def __post_init__(self):
        self._done = int(self.state.step)
        self._throughput = Throughput()
        self._shapes: set[Any] = set()
        self._pending: _Pending | None = None
        self._received: list[int] = []
        self._stop = self._broken = 0
        # Of a resumed run the first updates may be the small ones at the end of a schedule.
        self._movement = MovementAlarm() if self._done == 0 else None

    def run(self) -> TrainState:
        """As ``run_loop``."""
        start = self._done
        with stop_signals() as self._received:
            try:
                if self._is_due(self.loop.eval_every) and not self._looked(start):
                    self._look(start)
                self._probe_if_due()
                while self._done < self.steps and not self._asked_to_stop():
                    self._advance()
                    if self._given_up():
                        break
                self._report()
                if self._given_up():
                    self._give_up()
                self._save_last()
            finally:
                self.progress.close()
        if self._done < self.steps:
            raise Stopped(self._done, self._stop)
        if self._done > start:
            self._look(self.steps, to_the_end=True)
            self._probe_if_due()
        counted, log = self.counters, str(self.writer.skipped_file)
        check_learnt(self.name, self.steps, skipped=counted.skipped, still=counted.still, log=log)
        return self.state

    def _advance(self) -> None:
        """One update, and what is due behind it."""
        with self._throughput.waiting():
            host = next(self.batches)
        shape = tuple(np.shape(x) for x in jax.tree.leaves(host))
        self.state, metrics = self.step_fn(self.state, self.place(host))
        self._done += 1
        vote = self.vote.ask(self._received[0] if self._received else 0)
        self._report()
        if shape not in self._shapes:  # it was compiled just now
            self._shapes.add(shape)
            self._throughput.pause()
        ids = {
            name: np.asarray(part.row_ids)
            for name, part in host._asdict().items()
            if part is not None
        }
        self._pending = _Pending(self._done, positions(host), ids, metrics, vote)
        if self._done == self.steps:
            return
        if self._is_due(self.loop.eval_every):
            self._report()
            self._look(self._done)
            self._throughput.pause()
        if self._is_due(self.loop.save_every):
            self._report()
            self._try_to_save()
            self._throughput.pause()
        if not self._asked_to_stop():
            self._probe_if_due()

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self._done % every == 0

    def _asked_to_stop(self) -> bool:
        """Whether to stop here; all processes say the same, from a vote they all have read."""
        if jax.process_count() == 1 and self._received:
            self._stop = self._received[0]
        return bool(self._stop)

    def _check(self) -> None:
        """Give up an evaluation when any process has been asked to stop."""
        self._stop = self._stop or int(self.vote.ask(self._received[0] if self._received else 0))
        if self._stop:
            raise Interrupted

    def _report(self) -> None:
        """Read the metrics of the step before; the device is busy with the next."""
        if self._pending is None:
            return
        step, room, ids, metrics, vote = self._pending
        self._pending = None
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        self._stop = self._stop or int(vote)
        tokens = int(metrics.pop("tokens"))
        skipped = bool(metrics.pop("skipped"))
        self.counters.tokens += tokens
        self.counters.skipped += skipped
        self.counters.in_a_row = self.counters.in_a_row + 1 if skipped else 0
        moved = [metrics[k] for k in ("moved_share", "inner_moved_share") if k in metrics]
        self.counters.still += bool(moved) and not skipped and max(moved) == 0
        speed = self._throughput.add(tokens)
        metrics["padding_share"] = 1 - tokens / (room * jax.process_count())
        metrics |= {"tokens_seen": self.counters.tokens, "skipped": self.counters.skipped}
        if speed:
            metrics["tokens_per_second"] = speed
            metrics["data_wait_share"] = self._throughput.data_wait_share
        if step % self.loop.log_every == 0 or step == self.steps or skipped:
            self.writer.write(step, metrics)
        self.progress.update(step, metrics, speed)
        if not skipped and not np.isfinite(metrics.get("update_norm", 0.0)):
            self._refuse_state(step)
        if skipped:
            self._tell_skipped(step, ids, metrics)
        warnings = [self.alarm.update(step, metrics) if self.alarm is not None else None]
        if self._movement is not None and not skipped:
            warnings.append(self._movement.update(metrics, last=step == self.steps))
        for warning in filter(None, warnings):
            self.progress.say(warning)

    def _refuse_state(self, step: int) -> None:
        """A step of an optimizer that is no number has spoiled the weights: none is saved."""
        with contextlib.suppress(CheckpointError):  # one may still be on its way to the disk
            self.checkpoints.wait()
        last = self.checkpoints.latest_step()
        section = "sft_optimizer" if self.name == "sft" else "outer"
        saved = "Nothing was saved before: start again with"
        if last is not None:
            saved = f"Step {last} is saved before it: go on from there with --resume and"
        raise Diverged(
            f"{self.name}: what the optimizer made of update {step} is not finite, though its "
            f"loss and gradient are: the weights in memory are spoiled and are not saved. {saved} "
            f"other {section}.options, or a smaller learning rate"
        )

    def _tell_skipped(
        self, step: int, ids: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        # A solver that takes one level an update has no numbers of the other: they broke nothing.
        looked_at = of_level_taken(metrics) if "level" in metrics else metrics
        broken = sorted(k for k in looked_at if not np.isfinite(metrics[k]))
        broken = broken or ["new weights or optimizer state"]
        records = self.batches.records(ids)
        self.writer.write_skipped(step, {"not_finite": broken, "records": records})
        if self.counters.in_a_row == 1:
            self.progress.say(
                f"WARNING step {step}: the loss, the gradient or what the update makes of it is "
                f"not finite ({', '.join(broken[:3])}). The update is not applied; its rows stand "
                f"in {self.writer.skipped_file}"
            )
        self._broken = max(self._broken, self.counters.in_a_row)

    def _given_up(self) -> bool:
        return self._broken >= self.loop.max_skipped

    def _give_up(self) -> None:
        """Save the last good state, behind the rows that broke it, and stop."""
        count, section = self._broken, "sft" if self.name == "sft" else "train"
        self.counters.in_a_row = 0
        self._save_last()
        raise Diverged(
            f"{self.name}: {count} updates in a row had a loss, a gradient or new weights that are "
            f"not finite and were not applied ({section}.max_skipped). The state before them is "
            f"saved as step {self._done}; their rows stand in {self.writer.skipped_file}. Look at "
            "these rows, then go on behind them with --resume, or start again with a smaller "
            "learning rate"
        )

    def _run_state(self) -> dict[str, Any]:
        found = {"stage": self.name, "steps": self.steps, "counters": asdict(self.counters)}
        return found if self.alarm is None else {**found, "alarm": self.alarm.get_state()}

    def _save(self) -> None:
        position = self.batches.get_state()
        self.checkpoints.save(self._done, self.state, position, self._run_state())

    def _try_to_save(self) -> None:
        # Dying here would lose the steps since the last checkpoint: train on and try again.
        # The save before is still written in the background: its failure is not this one's.
        for attempt in (self.checkpoints.wait, self._save):
            try:
                attempt()
            except CheckpointError as error:
                self.progress.say(f"WARNING {error}. Training goes on; the next save tries again")

    def _save_last(self) -> None:
        if self.checkpoints.latest_step() != self._done:
            try:
                self.checkpoints.wait()
            except CheckpointError as error:
                self.progress.say(f"WARNING {error}. Step {self._done} is saved now")
            self._save()
        self.checkpoints.wait()

    def _looked(self, step: int) -> bool:
        """Whether the evaluation of a step was done before the run was stopped there."""
        return by_first(lambda: step in self.writer.evaluated)

    def _look(self, step: int, *, to_the_end: bool = False) -> None:
        if self.evaluate is None:
            return
        check = (lambda: None) if to_the_end else self._check
        # Given up when the run is to stop: there may be little time to save.
        with contextlib.suppress(Interrupted):
            found = self.evaluate(self.state, check=check)
            broken = [k for k, v in found.items() if not np.isfinite(v)]
            if broken:
                self.progress.say(
                    f"WARNING step {step}: of the held-out rows {', '.join(broken)} is no number "
                    "(NaN or infinite): left out of metrics.jsonl"
                )
            self.writer.write(step, {f"eval/{k}": v for k, v in found.items()})

    def _probe_if_due(self) -> None:
        if self.probe is None:
            return
        if self._done % self.probe_every == 0 or self._done == self.steps:
            self._report()
            self.probe(self._done, self.state)
            self._throughput.pause()

"""The training loop: dispatch, look back one step, evaluate, save, stop in good order."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from spo_jax.checkpoints import CheckpointError, Checkpoints
from spo_jax.config import LoopConfig
from spo_jax.trackers import DisplacementAlarm, MetricsWriter, Progress
from spo_jax.types import BilevelBatch, TrainState


class Stopped(Exception):
    """Training ended by a signal after saving; ``step`` updates are done."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name} at step {step}")
        self.step, self.signal_number = step, signal_number


class Batches:
    """Batches of both levels, step by step, with one state for the position of both."""

    def __init__(self, preference: Any = None, sft: Any = None):
        self._iterators = {"preference": preference, "sft": sft}
        self._iterators = {k: v for k, v in self._iterators.items() if v is not None}

    def __iter__(self) -> Iterator[BilevelBatch]:
        return self

    def __next__(self) -> BilevelBatch:
        return BilevelBatch(**{name: next(it) for name, it in self._iterators.items()})

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON values."""
        return {name: it.get_state() for name, it in self._iterators.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position that ``get_state`` gave."""
        for name, it in self._iterators.items():
            it.set_state(state[name])


class TokenCount(NamedTuple):
    """Tokens of one batch of this process: real ones, and positions computed."""

    real: int
    computed: int

    @classmethod
    def of(cls, batch: BilevelBatch) -> TokenCount:
        """Count a batch of numpy arrays, both levels."""
        real = computed = 0
        for part in batch:
            if part is not None:
                real += int(part.prompt_mask.sum() + part.completion_mask.sum())
                computed += part.prompt_tokens.size + part.completion_tokens.size
        return cls(real, computed)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second one does kill."""
    received: list[int] = []

    def note(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: the caller handles signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Throughput:
    """Real tokens per second over the last steps, without compiling, evaluating and saving."""

    def __init__(self, window: int = 20):
        self._spans: list[tuple[int, float]] = []
        self._window = window
        self._last: float | None = None

    def pause(self) -> None:
        """What happens until the next ``add`` is not training."""
        self._last = None

    def add(self, tokens: int) -> float:
        """Count the tokens of a finished step; returns tokens per second (0: not known yet)."""
        now = time.perf_counter()
        if self._last is not None:
            self._spans = [*self._spans[1 - self._window :], (tokens, now - self._last)]
        self._last = now
        seconds = sum(s for _, s in self._spans)
        return sum(t for t, _ in self._spans) / seconds if seconds else 0.0


def run_loop(
    step_fn: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]],
    state: TrainState,
    batches: Batches,
    *,
    name: str,
    steps: int,
    loop: LoopConfig,
    place: Callable[[BilevelBatch], BilevelBatch],
    evaluate: Callable[[TrainState], dict[str, float]] | None,
    writer: MetricsWriter,
    checkpoints: Checkpoints,
    progress: Progress,
    alarm: DisplacementAlarm | None = None,
    probe: Callable[[int, TrainState], None] | None = None,
    probe_every: int = 1,
) -> TrainState:
    """Go on from ``state.step`` to ``steps`` updates; saves at the end and when stopped.

    ``probe(step, state)`` is called every ``probe_every`` updates, where it starts and at the
    end; it must leave the state as it is.

    Metrics of a step are read after the next one is dispatched, so that the device
    never waits for the host.

    Raises:
        Stopped: SIGINT or SIGTERM came; the state is saved.
        CheckpointError: the last checkpoint could not be written. One that fails on the way
            is a warning, and the next one tries again.
    """
    throughput = Throughput()
    shapes: set[Any] = set()
    done = int(state.step)
    pending: tuple[int, TokenCount, Any] | None = None
    diverged: list[int] = []

    def report() -> None:
        nonlocal pending
        if pending is None:
            return
        step, tokens, metrics = pending
        pending = None
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        speed = throughput.add(tokens.real * jax.process_count())
        metrics["padding_share"] = 1 - tokens.real / tokens.computed
        if speed:
            metrics["tokens_per_second"] = speed
        if step % loop.log_every == 0 or step == steps:
            writer.write(step, metrics)
        progress.update(step, metrics, speed)
        if not math.isfinite(metrics.get("grad_norm", 0.0)) and not diverged:
            diverged.append(step)
            progress.say(
                f"WARNING the gradient of step {step} is not finite: the parameters are lost from "
                "here on. Stop, and start again with a smaller learning rate"
            )
        warning = alarm.update(step, metrics) if alarm is not None else None
        if warning:
            progress.say(warning)

    def save() -> None:
        checkpoints.save(done, state, batches.get_state(), {"stage": name, "steps": steps})

    def try_to_save() -> None:
        # Dying here would lose the steps since the last checkpoint: train on and try again.
        # The save before is still written in the background: its failure is not this one's.
        for attempt in (checkpoints.wait, save):
            try:
                attempt()
            except CheckpointError as error:
                progress.say(f"WARNING {error}. Training goes on; the next save tries again")

    def save_last() -> None:
        if checkpoints.latest_step() != done:
            try:
                checkpoints.wait()
            except CheckpointError as error:
                progress.say(f"WARNING {error}. Step {done} is saved now")
            save()
        checkpoints.wait()

    def look(step: int) -> None:
        if evaluate is not None:
            writer.write(step, {f"eval/{k}": v for k, v in evaluate(state).items()})

    def probe_if_due() -> None:
        if probe is not None and (done % probe_every == 0 or done == steps):
            report()
            probe(done, state)
            throughput.pause()

    if done == 0 and loop.eval_every:
        look(0)
    probe_if_due()
    with stop_signals() as received:
        try:
            while done < steps and not received:
                host = next(batches)
                tokens = TokenCount.of(host)
                shape = tuple(np.shape(x) for x in jax.tree.leaves(host))
                state, metrics = step_fn(state, place(host))
                done += 1
                report()
                if shape not in shapes:  # it was compiled just now
                    shapes.add(shape)
                    throughput.pause()
                pending = (done, tokens, metrics)
                last = done == steps
                if loop.eval_every and done % loop.eval_every == 0 and not last:
                    report()
                    look(done)
                    throughput.pause()
                if loop.save_every and done % loop.save_every == 0 and not last:
                    report()
                    try_to_save()
                    throughput.pause()
                if not last and not received:
                    probe_if_due()
            report()
            save_last()
        finally:
            progress.close()
        if received and done < steps:
            raise Stopped(done, received[0])
    look(steps)
    probe_if_due()
    return state

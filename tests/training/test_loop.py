"""The loop with a toy step: what is written when, how it stops, how it goes on."""

import errno
import json
import os
import signal
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from spo_jax.checkpoints import CheckpointError, Checkpoints
from spo_jax.config.schema import LoopConfig
from spo_jax.parallel.mesh import make_mesh
from spo_jax.parallel.processes import Vote
from spo_jax.training.batches import Batches, positions
from spo_jax.training.loop import Counters, Throughput, run_loop
from spo_jax.training.stopping import Diverged, NothingLearnt, Stopped, stop_signals
from spo_jax.training.trackers import DisplacementAlarm, MetricsWriter, Progress, read_metrics
from spo_jax.types import BilevelBatch, CompletionBatch, TrainState
from tests.runs import TIMINGS


def batch_of(number, rows=2, branches=2):
    return CompletionBatch(
        prompt_tokens=np.zeros((rows, 3), np.int32),
        prompt_mask=np.ones((rows, 3), bool),
        completion_tokens=np.zeros((rows, branches, 4), np.int32),
        completion_mask=np.arange(4) < np.full((rows, branches, 1), 2),
        row_ids=np.full(rows, number, np.int32),
    )


SOURCES = np.arange(100, 200)
"""Row ``i`` was record ``100 + i`` of its file."""


class Source:
    """Batches 0, 1, 2, ... with a position, like the data's iterators."""

    def __init__(self):
        self.next = 0

    def __next__(self):
        self.next += 1
        return batch_of(self.next - 1)

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


def step_fn(state, batch):
    """The state adds up what it has seen: a lost or repeated batch shows."""
    seen = batch.preference.row_ids[0]
    total = state.solver["total"] * 3 + seen
    metrics = {"loss": 1 / (1 + state.step), "seen": jnp.asarray(seen, jnp.float32)}
    # 2 rows: 3 prompt tokens and 2 completions with 2 of 4 positions real.
    metrics |= {"tokens": 14, "skipped": False}
    return state._replace(step=state.step + 1, solver={"total": total}), metrics


def start():
    return TrainState(
        jnp.zeros((), jnp.int32), {"total": jnp.zeros((), jnp.int32)}, (), jnp.zeros(2, jnp.uint32)
    )


def total_after(steps):
    total = np.int32(0)
    for number in range(steps):
        total = np.int32(total * 3 + number)
    return int(total)


def run(
    folder, steps=7, step_fn=step_fn, evaluate=None, resume=False, keep=10, alarm=None,
    probe=None, probe_every=1, source=Source, **loop,
):  # fmt: skip
    """One start of a run in ``folder``, assembled as the trainer does it."""
    checkpoints = Checkpoints(folder, keep=keep, keep_every=loop.get("keep_every"))
    state, batches = start(), Batches(source(), sources={"preference": SOURCES})
    counters = Counters()
    if resume:
        state, position, kept = checkpoints.restore(state)
        batches.set_state(position)
        counters = Counters(**kept["counters"])
    done = int(state.step)
    writer = MetricsWriter(folder, first_step=done + 1)
    try:
        return run_loop(
            step_fn,
            state,
            batches,
            name="preference",
            steps=steps,
            loop=LoopConfig(steps=steps, **loop),
            place=lambda batch: batch,
            evaluate=evaluate,
            writer=writer,
            checkpoints=checkpoints,
            progress=Progress("preference", steps, done),
            vote=Vote(make_mesh()),
            counters=counters,
            alarm=alarm,
            probe=probe,
            probe_every=probe_every,
        )
    finally:
        writer.close()


def saved(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def training_lines(folder):
    return [line for line in read_metrics(folder) if "loss" in line]


def looked(folder):
    return [(r["step"], r["eval/loss"]) for r in read_metrics(folder) if "eval/loss" in r]


def held_out(state, check):
    return {"loss": float(state.step) / 2}


def test_every_step_is_written_once(tmp_path):
    state = run(tmp_path)
    assert int(state.step) == 7
    assert int(state.solver["total"]) == total_after(7)
    found = training_lines(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["seen"] for line in found] == [0, 1, 2, 3, 4, 5, 6]
    assert found[0]["padding_share"] == pytest.approx(1 - 14 / 22)
    assert found[-1]["tokens_per_second"] > 0
    assert saved(tmp_path) == [7]
    assert looked(tmp_path) == []


def test_the_rhythm_of_lines_evaluations_and_checkpoints(tmp_path):
    state = run(tmp_path, evaluate=held_out, log_every=3, eval_every=2, save_every=3)
    assert int(state.step) == 7
    assert [line["step"] for line in training_lines(tmp_path)] == [3, 6, 7]
    assert looked(tmp_path) == [(0, 0.0), (2, 1.0), (4, 2.0), (6, 3.0), (7, 3.5)]
    assert saved(tmp_path) == [3, 6, 7]


def test_rhythms_that_meet_the_end_do_not_repeat_it(tmp_path):
    run(tmp_path, steps=4, evaluate=held_out, eval_every=2, save_every=2, keep=1)
    assert looked(tmp_path) == [(0, 0.0), (2, 1.0), (4, 2.0)]
    assert saved(tmp_path) == [4]
    # Without eval_every the end is looked at all the same.
    run(tmp_path / "other", steps=2, evaluate=held_out)
    assert looked(tmp_path / "other") == [(2, 1.0)]


class Probe:
    """Notes what it was shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, step, state):
        self.seen.append((step, int(state.step), int(state.solver["total"])))

    @property
    def steps(self):
        assert all(step == own for step, own, _ in self.seen)
        assert all(total == total_after(step) for step, _, total in self.seen)
        return [step for step, _, _ in self.seen]


def test_the_rhythm_of_probes(tmp_path):
    probe = Probe()
    run(tmp_path / "a", probe=probe, probe_every=3)
    assert probe.steps == [0, 3, 6, 7]
    probe = Probe()
    run(tmp_path / "b", steps=4, probe=probe, probe_every=2)
    assert probe.steps == [0, 2, 4]
    probe = Probe()
    run(tmp_path / "c", steps=2, probe=probe, probe_every=100)
    assert probe.steps == [0, 2]


def test_a_signal_is_not_kept_waiting_by_a_probe(tmp_path):
    """What it left out is done where the run goes on."""
    probe = Probe()
    with pytest.raises(Stopped, match="at step 4"):
        run(tmp_path, step_fn=stopping(3, signal.SIGTERM), probe=probe, probe_every=2)
    assert probe.steps == [0, 2]
    probe = Probe()
    run(tmp_path, resume=True, probe=probe, probe_every=2)
    assert probe.steps == [4, 6, 7]


def test_probing_is_no_training_time(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr("spo_jax.training.loop.time", clock)

    def a_second(state, batch):
        clock.now += 1
        return step_fn(state, batch)

    def slow(step, state):
        clock.now += 1000

    run(tmp_path, steps=12, step_fn=a_second, probe=slow, probe_every=5)
    speeds = [line.get("tokens_per_second") for line in training_lines(tmp_path)]
    # 14 real tokens a second; that of the first, compiled step is not known.
    assert min(speeds[4:]) > 10


def stopping(at, number):
    def step(state, batch):
        if int(state.step) == at:
            os.kill(os.getpid(), number)
        return step_fn(state, batch)

    return step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on(tmp_path, number):
    before = signal.getsignal(number)
    # The signal comes in the fourth update; that update is finished and saved.
    with pytest.raises(Stopped) as caught:
        run(tmp_path, step_fn=stopping(3, number), evaluate=held_out, eval_every=100)
    assert (caught.value.step, caught.value.signal_number) == (4, number)
    assert str(caught.value) == f"stopped by {number.name} at step 4"
    assert signal.getsignal(number) is before
    assert saved(tmp_path) == [4]
    assert [line["step"] for line in training_lines(tmp_path)] == [1, 2, 3, 4]

    state = run(tmp_path, resume=True, evaluate=held_out, eval_every=100)
    assert int(state.step) == 7
    assert int(state.solver["total"]) == total_after(7)
    assert [line["step"] for line in training_lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert looked(tmp_path) == [(0, 0.0), (7, 3.5)]


def test_a_signal_in_the_last_update_stops_nothing(tmp_path):
    assert int(run(tmp_path, step_fn=stopping(6, signal.SIGTERM)).step) == 7


def test_a_signal_at_a_checkpoint(tmp_path):
    with pytest.raises(Stopped, match="at step 4"):
        run(tmp_path, step_fn=stopping(3, signal.SIGTERM), save_every=2)
    assert saved(tmp_path) == [2, 4]


def test_a_second_signal_does_kill():
    with stop_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def failing_saves(monkeypatch, *steps):
    """Checkpoints of these steps meet a full disk as their writing begins."""
    original = ocp.CheckpointManager.save

    def save(self, step, *args, **kwargs):
        if step in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, step, *args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)


def failing_in_the_background(monkeypatch, *steps):
    original = ocp.JsonCheckpointHandler._save_fn

    async def save(self, item, directory):
        if any(f"{step}." in str(directory) for step in steps):
            raise OSError(errno.ENOSPC, "No space left on device")
        return await original(self, item, directory)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", save)


def test_a_failing_checkpoint_on_the_way_is_a_warning(tmp_path, monkeypatch, capsys):
    failing_saves(monkeypatch, 2)
    state = run(tmp_path, save_every=2)
    assert int(state.solver["total"]) == total_after(7)
    assert saved(tmp_path) == [4, 6, 7]
    shown = capsys.readouterr().err
    assert shown.count("WARNING checkpoint 2 could not be written") == 1
    assert "Training goes on" in shown


@pytest.mark.parametrize("failing", [2, 6])
def test_a_failure_in_the_background_costs_only_that_checkpoint(
    tmp_path, monkeypatch, capsys, failing
):
    """It is seen at the next save, which must be tried all the same: the last one, too."""
    failing_in_the_background(monkeypatch, failing)
    state = run(tmp_path, save_every=2)
    assert int(state.step) == 7
    assert saved(tmp_path) == [step for step in (2, 4, 6, 7) if step != failing]
    assert capsys.readouterr().err.count("WARNING the checkpoint could not be written") == 1


def test_a_failing_last_checkpoint_is_an_error(tmp_path, monkeypatch):
    failing_saves(monkeypatch, 7)
    with pytest.raises(CheckpointError, match=r"checkpoint 7 .* Step 6 is safe"):
        run(tmp_path, save_every=2)
    assert len(training_lines(tmp_path)) == 7


def test_a_last_checkpoint_that_fails_in_the_background_is_an_error(tmp_path, monkeypatch):
    failing_in_the_background(monkeypatch, 7)
    with pytest.raises(CheckpointError, match="the disk is full"):
        run(tmp_path)


def test_the_alarm_is_heard(tmp_path, capsys):
    def displaced(state, batch):
        state, metrics = step_fn(state, batch)
        return state, metrics | {
            "log_ratio/chosen": -3.0 * jnp.ones(()),
            "log_ratio/margin": jnp.asarray(state.step, jnp.float32),
        }

    run(tmp_path, steps=3, step_fn=displaced, alarm=DisplacementAlarm(-2.5))
    assert capsys.readouterr().err.count("WARNING displacement at step 1") == 1


def test_counting_positions_of_both_levels():
    pairs, sft = batch_of(0), batch_of(0, rows=1, branches=1)
    assert positions(BilevelBatch(pairs)) == 2 * 3 + 2 * 2 * 4
    assert positions(BilevelBatch(pairs, sft)) == 22 + 3 + 4
    assert positions(BilevelBatch(sft=sft)) == 7


def test_throughput_leaves_pauses_out(monkeypatch):
    clock = iter([0.0, 2.0, 100.0, 101.0])
    fake = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr("spo_jax.training.loop.time", fake)
    throughput = Throughput()
    assert throughput.add(50) == 0.0
    assert throughput.add(10) == 5.0
    throughput.pause()
    assert throughput.add(7) == 5.0
    assert throughput.add(20) == 10.0


def test_waiting_for_data_is_a_share_of_the_time(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr("spo_jax.training.loop.time", clock)

    def three_seconds(state, batch):
        clock.now += 3
        return step_fn(state, batch)

    class Slow(Source):
        def __next__(self):
            # The first is not there at once; that is not a part of any step counted.
            clock.now += 1 if self.next else 1000
            return super().__next__()

    run(tmp_path, steps=6, step_fn=three_seconds, source=Slow)
    shares = [line.get("data_wait_share") for line in training_lines(tmp_path)]
    assert shares == [None, *[0.25] * 5]


def test_one_position_for_both_levels():
    batches = Batches(Source(), Source())
    next(batches)
    assert batches.get_state() == {"preference": {"next": 1}, "sft": {"next": 1}}
    other = Batches(Source(), Source())
    other.set_state(batches.get_state())
    found = next(other)
    assert (found.preference.row_ids[0], found.sft.row_ids[0]) == (1, 1)
    only_sft = next(Batches(sft=Source()))
    assert only_sft.preference is None


def breaking(*at):
    """Updates that meet these batches are not applied, as the step of a stage has it."""

    def step(state, batch):
        new, metrics = step_fn(state, batch)
        if int(batch.preference.row_ids[0]) not in at:
            return new, metrics
        broken = {"loss": np.nan, "grad_norm": np.inf, "skipped": True}
        return new._replace(solver=state.solver), metrics | broken

    return step


def skipped_lines(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def test_a_skipped_update_is_counted_and_its_rows_are_written_down(tmp_path, capsys):
    state = run(tmp_path, step_fn=breaking(2, 3, 5), log_every=100)
    assert int(state.step) == 7
    found = read_metrics(tmp_path)
    assert [(line["step"], line["skipped"]) for line in found] == [(3, 1), (4, 2), (6, 3), (7, 3)]
    assert ["loss" in line for line in found] == [False, False, False, True]
    assert skipped_lines(tmp_path) == [
        {
            "step": i + 1,
            "not_finite": ["grad_norm", "loss"],
            "records": {"preference": [100 + i] * 2},
        }
        for i in (2, 3, 5)
    ]
    # Once for each row of them, not for each update.
    assert capsys.readouterr().err.count("is not finite") == 2


def test_of_a_solver_that_takes_one_level_the_other_is_not_named(tmp_path):
    def step(state, batch):
        new, metrics = breaking(2)(state, batch)
        outer = {"level": 0, "inner_loss": np.nan, "gap": np.nan}
        return new, metrics | outer

    run(tmp_path, step_fn=step, log_every=100)
    assert skipped_lines(tmp_path)[0]["not_finite"] == ["grad_norm", "loss"]


def test_too_many_skipped_in_a_row_stop_the_run_with_the_last_good_state(tmp_path):
    broken = (2, 4, 5, 6, 7, 8)
    step = breaking(*broken)
    # Three are enough; the fourth was under way when they were seen.
    with pytest.raises(Diverged, match="4 updates in a row") as caught:
        run(tmp_path, steps=12, step_fn=step, max_skipped=3)
    for part in ("train.max_skipped", "saved as step 8", "skipped.jsonl", "--resume"):
        assert part in str(caught.value)
    # Behind them the count begins anew: one more does not stop it.
    state = run(tmp_path, steps=12, step_fn=step, max_skipped=3, resume=True)
    expected = np.int32(0)
    for number in range(12):
        expected = expected if number in broken else np.int32(expected * 3 + number)
    assert int(state.solver["total"]) == int(expected)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert (lines[-1]["skipped"], lines[-1]["tokens_seen"]) == (6, 12 * 14)


@pytest.mark.parametrize(("at", "left"), [(4, [2, 4]), (1, [])])
def test_a_step_that_is_no_number_spoils_the_state_which_is_not_saved(tmp_path, at, left):
    def step(state, batch):
        new, metrics = step_fn(state, batch)
        spoiled = int(batch.preference.row_ids[0]) == at
        return new, metrics | {"update_norm": np.inf if spoiled else 1.0}

    with pytest.raises(Diverged, match=f"update {at + 1} is not finite") as caught:
        run(tmp_path, step_fn=step, save_every=2)
    assert saved(tmp_path) == left
    expected = "Step 4 is saved before it" if left else "Nothing was saved before"
    assert expected in str(caught.value)
    assert "other outer.options, or a smaller learning rate" in str(caught.value)


def test_counters_go_on_where_they_were(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path / "a", step_fn=lambda s, b: stopping(3, signal.SIGTERM)(*(s, b)))
    run(tmp_path / "a", resume=True)
    run(tmp_path / "b")
    lines = [
        [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(x)]
        for x in (tmp_path / "a", tmp_path / "b")
    ]
    assert lines[0] == lines[1]
    assert lines[0][-1]["tokens_seen"] == 7 * 14


def test_an_evaluation_is_given_up_for_a_signal_and_made_up_for(tmp_path):
    """A signal during a long evaluation saves at once; the resumed run evaluates there first."""
    batches = []

    def long(state, check):
        for number in range(3):
            check()
            batches.append((int(state.step), number))
            if (int(state.step), number, len(batches)) == (2, 1, 5):
                os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": float(state.step) / 2}

    with pytest.raises(Stopped, match="at step 2"):
        run(tmp_path, evaluate=long, eval_every=2)
    assert batches[-1] == (2, 1)
    assert saved(tmp_path) == [2]
    assert looked(tmp_path) == [(0, 0.0)]
    run(tmp_path, evaluate=long, eval_every=2, resume=True)
    assert looked(tmp_path) == [(0, 0.0), (2, 1.0), (4, 2.0), (6, 3.0), (7, 3.5)]


def test_checkpoints_kept_for_good(tmp_path):
    run(tmp_path, steps=11, save_every=1, keep=2, keep_every=4)
    assert saved(tmp_path) == [4, 8, 10, 11]


def test_held_out_figures_that_are_no_number_are_named(tmp_path, capsys):
    found = {"loss": float("nan"), "gap": float("inf"), "inner_loss": 1.0}
    run(tmp_path, evaluate=lambda state, check: found)
    shown = capsys.readouterr().err
    assert "WARNING step 7: of the held-out rows loss, gap is no number" in shown
    assert "eval/loss" not in read_metrics(tmp_path)[-1]
    assert read_metrics(tmp_path)[-1]["eval/inner_loss"] == 1.0


def moving(*shares, grad_norm=1.0):
    """A step with ``moved_share`` as given, one update after the other."""

    def step(state, batch):
        state, metrics = step_fn(state, batch)
        share = shares[min(int(state.step), len(shares)) - 1]
        return state, metrics | {"moved_share": share, "grad_norm": grad_norm}

    return step


def test_steps_that_move_next_to_nothing_are_said_once(tmp_path, capsys):
    run(tmp_path / "a", steps=25, step_fn=moving(0.0, 0.01))
    shown = capsys.readouterr().err
    assert shown.count("WARNING the first 10 updates changed 0.9 % of the weights") == 1
    run(tmp_path / "b", steps=25, step_fn=moving(*[0.5] * 10, 0.0))
    assert "WARNING" not in capsys.readouterr().err
    # The small steps at the end of a schedule, seen by a run that is resumed there.
    with pytest.raises(Stopped):
        run(tmp_path / "c", steps=12, step_fn=stopping(7, signal.SIGTERM))
    run(tmp_path / "c", steps=12, step_fn=moving(0.01), resume=True)
    assert "WARNING" not in capsys.readouterr().err


def test_a_run_that_moved_nothing_is_an_error_behind_its_last_look(tmp_path, capsys):
    with pytest.raises(NothingLearnt, match="7 of 7 updates were applied and changed no weight"):
        run(tmp_path, step_fn=moving(0.0, grad_norm=0.0), evaluate=held_out)
    assert saved(tmp_path) == [7]
    assert looked(tmp_path) == [(7, 3.5)]
    assert "the gradient of the first 7 updates is 0" in capsys.readouterr().err
    # One that moved something is none, also when it is resumed.
    run(tmp_path / "b", step_fn=moving(0.0, 0.1, 0.0))
    with pytest.raises(Stopped):
        run(tmp_path / "c", step_fn=stopping(3, signal.SIGTERM))
    run(tmp_path / "c", step_fn=moving(0.0), resume=True)


def test_skipped_updates_alone_are_an_error(tmp_path):
    with pytest.raises(NothingLearnt, match="none of the 7 updates was applied"):
        run(tmp_path, step_fn=breaking(*range(7)))
    assert saved(tmp_path) == [7]

"""Metrics on disk, once a step; the progress line; and when the displacement alarm goes off."""

import json
import math
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from spo_jax.training.trackers import DisplacementAlarm, MetricsWriter, Progress, read_metrics


def lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def events(folder):
    """``(tag, step, value)`` of every scalar in the event files: TFRecords of ``Event``."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            data = data[16 + length :]
    return found


def test_a_line_a_step_and_the_same_in_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path, first_step=1)
    writer.write(1, {"loss": 0.5, "gap": float("nan"), "lr": 1e-7})
    assert len(lines(tmp_path)) == 1, "a line is there as soon as it is written"
    writer.write(2, {"loss": 0.25})
    writer.close()
    assert [json.loads(line) for line in lines(tmp_path)] == [
        {"step": 1, "loss": 0.5, "lr": 1e-7},
        {"step": 2, "loss": 0.25},
    ]
    assert read_metrics(tmp_path)[1] == {"step": 2, "loss": 0.25}
    assert events(tmp_path) == [("loss", 1, 0.5), ("lr", 1, pytest.approx(1e-7)), ("loss", 2, 0.25)]


def test_a_resumed_run_has_each_step_once(tmp_path):
    writer = MetricsWriter(tmp_path, first_step=1)
    for step in (1, 2, 3, 4):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "los')  # the run died here

    writer = MetricsWriter(tmp_path, first_step=3)
    for step in (3, 4, 5):
        writer.write(step, {"loss": 10.0 * step})
    writer.close()
    assert read_metrics(tmp_path) == [
        {"step": step, "loss": loss} for step, loss in [(1, 1), (2, 2), (3, 30), (4, 40), (5, 50)]
    ]
    assert not list(tmp_path.glob("*.tmp"))


def test_other_processes_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, active=False)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())


def test_progress_without_a_terminal(capsys):
    progress = Progress("preference", 20)
    for step in range(1, 21):
        metrics = {"loss": 0.5, "gap": math.nan, "log_ratio/chosen": -0.25, "other": 1.0}
        progress.update(step, metrics, 1234.0)
    progress.say("WARNING something")
    progress.close()
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 12
    assert shown[0] == "preference 1/20  loss 0.5  chosen -0.25  1,234 tok/s"
    assert shown[1].startswith("preference 2/20 ")
    assert shown[-1] == "WARNING something"

    progress.update(20, {"loss": 0.5}, 0.0)  # a first update: no time to divide by
    assert capsys.readouterr().err.splitlines() == ["preference 20/20  loss 0.5"]
    progress.update(20, {"loss": 0.5, "data_wait_share": 0.04}, 1234.0)
    progress.update(20, {"loss": 0.5, "data_wait_share": 0.25}, 1234.0)
    few, much = capsys.readouterr().err.splitlines()
    assert few.endswith("1,234 tok/s")
    assert much.endswith("1,234 tok/s  25% waiting for data")

    silent = Progress("preference", 20, active=False)
    silent.update(20, {"loss": 0.5}, 0.0)
    silent.say("WARNING something")
    silent.close()
    assert capsys.readouterr().err == ""


def test_slow_updates_are_shown_one_by_one_with_the_time_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("spo_jax.training.trackers.time.monotonic", lambda: now[0])
    progress = Progress("preference", 100, 40)
    for step in range(41, 47):
        now[0] += 40.0
        progress.update(step, {"loss": 0.5}, 1.0)
    shown = [line.split("  ") for line in capsys.readouterr().err.splitlines()]
    assert [line[0] for line in shown] == [f"preference {n}/100" for n in (41, 43, 45)]
    assert [line[-1] for line in shown[1:]] == ["about 38 min left", "about 37 min left"]


def alarms(chosen, margin, threshold=-2.0, window=1):
    """The steps at which the alarm goes off; ``window=1`` looks at each step alone."""
    alarm = DisplacementAlarm(threshold, window=window)
    found = []
    for step, (c, m) in enumerate(zip(chosen, margin, strict=True)):
        metrics = {"log_ratio/chosen": float(c), "log_ratio/margin": float(m)}
        if alarm.update(step, metrics):
            found.append(step)
    return found


def test_alarm_when_the_chosen_fall_and_the_margin_grows():
    assert alarms([0, -1, -1.9, -2.1, -3], [0, 1, 2, 3, 4]) == [3]


def test_no_alarm_when_the_margin_shrinks_or_the_chosen_hold():
    assert alarms([0, -1, -2.1, -3, -4], [0, 3, 2, 1, 0.5]) == []
    assert alarms([-3, -4, -5], [-3, -2, -1]) == [], "the rejected are still more likely"
    assert alarms([0, 1, -1.9, 2], [0, 1, 2, 3]) == []
    # It waits for the margin to grow again beyond its best.
    assert alarms([0, -3, -3, -3], [2, 1, 1.5, 2.5]) == [3]


def test_alarm_once_until_the_log_ratio_has_recovered():
    margin = [1, 2, 3, 4, 5, 6]
    assert alarms([-3, -4, -1.5, -3, -3, -3], margin) == [0], "-1.5 is not recovered yet"
    assert alarms([-3, -4, -0.5, -3, -3, -3], margin) == [0, 3]


def test_one_odd_batch_raises_nothing():
    chosen = [0.0] * 10 + [-9.0] + [0.0] * 10
    assert alarms(chosen, range(21), window=10) == []
    # A lasting fall does; -4 averaged over ten updates passes -2 with the sixth of them.
    assert alarms([0.0] * 20 + [-4.0] * 20, range(40), window=10) == [25]
    # The average is bias-corrected: what is down from the start is seen at once.
    assert alarms([-3.0], [1.0], window=10) == [0]


def test_what_an_alarm_says():
    alarm = DisplacementAlarm(-2.0)
    assert alarm.update(1, {"loss": 1.0}) is None
    assert alarm.update(2, {"log_ratio/chosen": math.nan, "log_ratio/margin": 1.0}) is None
    text = alarm.update(3, {"log_ratio/chosen": -3.0, "log_ratio/margin": 1.5})
    assert text.startswith("WARNING displacement at step 3")
    for part in ("3.00 nats", "alarm at 2", "margin grew to 1.50", "solver.penalty_weight"):
        assert part in text


def test_the_alarm_goes_on_from_its_averages():
    """Stopped anywhere, it goes off at the same step as one that was not."""
    falling = [
        {"log_ratio/chosen": -0.2 * step, "log_ratio/margin": 0.1 * step} for step in range(40)
    ]

    def raised(alarm, steps):
        return [step for step in steps if alarm.update(step, falling[step])]

    (at,) = raised(DisplacementAlarm(-2.0), range(40))
    for stop in (0, 3, at, at + 1, 39):
        first, second = DisplacementAlarm(-2.0), DisplacementAlarm(-2.0)
        found = raised(first, range(stop))
        second.set_state(json.loads(json.dumps(first.get_state())))
        assert found + raised(second, range(stop, 40)) == [at]


def test_skipped_updates_done_again_are_written_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    assert not writer.skipped_file.exists()
    for step in (2, 5):
        writer.write(step, {"eval/loss": 1.0})
        writer.write_skipped(step, {"records": {}})
    writer.close()
    again = MetricsWriter(tmp_path, first_step=4)
    assert again.evaluated == {2}
    again.write_skipped(6, {"records": {}})
    again.close()
    lines = [json.loads(line) for line in again.skipped_file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 6]
    silent = MetricsWriter(tmp_path / "other", active=False)
    silent.write_skipped(1, {})
    silent.close()
    assert not (tmp_path / "other").exists()

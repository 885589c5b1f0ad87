"""Two and four real processes on loopback: the numbers of one, whatever stops and starts again."""

import json
import os
import signal
import time

import numpy as np
import pytest

from spo_jax.data.tokenize import CHUNK
from tests.runs import (
    DEVICES,
    PAIRS,
    finish,
    metrics_of,
    start,
    start_several,
    steps_of,
    wait_for_step,
    write_config,
)

pytestmark = pytest.mark.long

PATIENCE = 400
SETTINGS = {
    "stages": ["sft", "preference"],
    "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    "sft": {"steps": 3, "batch_size": 8},
    "train": {"steps": 12, "eval_every": 4, "gradient_accumulation": 2, "save_every": 4},
    "dynamics": {"every": 6, "pairs": 8, "max_new_tokens": 4, "samples": 0},
}


SHARES = ("eval/accuracy", "eval/unanswered", "eval/cut_off")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A configuration, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("processes")
    sft = {"train": str(folder / "pairs.jsonl"), "eval_fraction": 0.25}
    sizes = {"prompt_buckets": [4], "completion_buckets": [4]}
    answers = {"data": str(folder / "pairs.jsonl"), "task": "arithmetic", "max_new_tokens": 6}
    config = write_config(folder, **SETTINGS, sft_data={**sft, **sizes}, answers=answers)
    cache = folder / "compiled"
    run = start(config, folder / "alone", log=folder / "alone.log", cache=cache)
    assert finish([run], PATIENCE) == [0], (folder / "alone.log").read_text()
    return folder, config, cache


def assert_same_metrics(found, expected):
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        assert set(one) == set(other)
        for key, value in other.items():
            # Of 32 greedy answers two may turn at a tie.
            loose = {"atol": 2 / 32} if key in SHARES else {"rtol": 2e-3, "atol": 2e-4}
            np.testing.assert_allclose(one[key], value, err_msg=key, **loose)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "dynamics.jsonl").read_text().splitlines()]


def logs_of(folder, name):
    return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in sorted(folder.glob(f"{name}.*.log")))


def tasks_of_slurm(config, run, count, *, log, cache):
    """As srun sets the variables of a step; nothing but ``--distributed`` is said."""
    step = {
        "SLURM_JOB_ID": str(os.getpid()),  # the port is chosen by it
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_STEP_NUM_NODES": "1",
    }
    return [
        start(
            config,
            run,
            "--distributed",
            log=log.with_suffix(f".{i}.log"),
            variables=step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            devices=DEVICES // count,
            cache=cache,
        )
        for i in range(count)
    ]


def test_stopped_by_a_signal_to_one_and_resumed_by_another_number(alone):
    """Two as tasks of SLURM, then four, then one alone."""
    folder, config, cache = alone
    run = folder / "several"

    def stopped(name, processes, least):
        """``processes`` until ``least`` updates are done; the step that they saved."""
        wait_for_step(run / "preference", least, processes[0], PATIENCE)
        # Any of them may be the one that is told.
        processes[-1].send_signal(signal.SIGTERM)
        statuses = finish(processes, PATIENCE)
        assert statuses == [128 + signal.SIGTERM] * len(processes), logs_of(folder, name)
        (step,) = {line["step"] for line in metrics_of(run / "preference")[-1:]}
        assert least <= step < 12
        assert steps_of(run / "preference")[-1] == step
        return step

    first = stopped("two", tasks_of_slurm(config, run, 2, log=folder / "two", cache=cache), 2)
    # One host has a cache of its own, and nothing in it.
    own = {3: ["--reference.cache-dir", str(folder / "own_cache")]}
    options = {"log": folder / "four", "cache": cache, "own": own}
    second = stopped("four", start_several(config, run, 4, "--resume", **options), first + 2)
    assert f"going on from step {first} of 12" in logs_of(folder, "four")

    last = start(config, run, "--resume", log=folder / "one.log", cache=cache)
    said = folder / "one.log"
    assert finish([last], PATIENCE) == [0], said.read_text()
    assert f"going on from step {second} of 12" in said.read_text()
    for stage in ("sft", "preference"):
        expected = metrics_of(folder / "alone" / stage)
        assert len(expected) > 3
        assert set(expected[-1]) >= set(SHARES)
        assert_same_metrics(metrics_of(run / stage), expected)
    probed, expected = (lines_of(x / "preference") for x in (run, folder / "alone"))
    assert [line["step"] for line in probed] == [0, 6, 12]
    for line, other in zip(probed, expected, strict=True):
        assert line["row_ids"] == other["row_ids"]
        for key, value in other["summary"].items():
            np.testing.assert_allclose(
                line["summary"][key], value, rtol=2e-2, atol=1e-2, err_msg=key
            )


def test_what_only_one_process_lacks_ends_all_of_them(alone):
    """Its error is said by all, and nobody waits for jax's heartbeat."""
    folder, config, cache = alone
    for number in range(2):
        name = f"broken_{number}"
        missing = {number: ["--data.train", str(folder / "nowhere.jsonl")]}
        options = {"log": folder / name, "cache": cache, "own": missing}
        begun = time.monotonic()
        statuses = finish(start_several(config, folder / name, 2, **options), PATIENCE)
        assert statuses == [2, 2], logs_of(folder, name)
        assert time.monotonic() - begun < 60
        said, heard = (folder / f"{name}.{i}.log" for i in (number, 1 - number))
        assert f"spo-jax: error (process {number} of 2)" in said.read_text()
        assert f"process {1 - number} of 2 ends, for process {number} failed" in heard.read_text()
        assert all("nowhere.jsonl" in log.read_text() for log in (said, heard))


def test_rows_are_shared_out_and_a_bad_one_is_an_error_of_all(alone):
    """More rows than one process has in its share: every second chunk is the other's."""
    folder, _, cache = alone
    file = folder / "many.jsonl"
    rows = [dict(PAIRS[i % len(PAIRS)]) for i in range(2 * CHUNK + 100)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loop = {"steps": 2, "eval_every": 2, "eval_batch_size": 64}
    config = write_config(folder, "many", data={"train": str(file)}, train=loop)
    run = start(config, folder / "many_1", log=folder / "many_1.log", cache=cache)
    assert finish([run], PATIENCE) == [0], (folder / "many_1.log").read_text()
    options = {"log": folder / "many_2", "cache": cache}
    processes = start_several(config, folder / "many_2", 2, **options)
    assert finish(processes, PATIENCE) == [0, 0], logs_of(folder, "many_2")
    found, expected = (metrics_of(folder / name / "preference") for name in ("many_2", "many_1"))
    assert_same_metrics(found, expected)

    rows[CHUNK + 10]["chosen"] = ""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options["log"] = folder / "many_bad"
    processes = start_several(config, folder / "many_bad", 2, **options)
    assert finish(processes, PATIENCE) == [2, 2], logs_of(folder, "many_bad")
    for number in range(2):
        said = (folder / f"many_bad.{number}.log").read_text()
        assert f"{file}:{CHUNK + 11}: empty chosen" in said


def test_pairs_that_displace_are_listed_and_left_out_alike(alone):
    folder, _, cache = alone
    train = {"steps": 4, "eval_every": 4}
    data = {"drop_displacing": 0.25}
    config = write_config(folder, "displacing", mesh=SETTINGS["mesh"], train=train, data=data)
    found = {}
    for count in (1, 2):
        run = folder / f"displacing_{count}"
        options = {"log": folder / run.name, "cache": cache}
        for command in ("score-pairs", "train"):
            processes = start_several(config, run, count, command=command, **options)
            assert finish(processes, PATIENCE) == [0] * count, logs_of(folder, run.name)
        lines = (run / "pair_scores.jsonl").read_text().splitlines()
        dropped = json.loads((run / "dropped_pairs.json").read_text())
        found[count] = [json.loads(line) for line in lines], dropped, metrics_of(run)
    one, two = found[1], found[2]
    scores = [{x["row"]: x["normalised_ches"] for x in some[0]} for some in (one, two)]
    assert len(scores[0]) == 24
    for row, score in scores[0].items():
        np.testing.assert_allclose(scores[1][row], score, rtol=1e-3, atol=1e-4)
    rows = [{pair["row"] for pair in some[1]["dropped"]} for some in (one, two)]
    assert rows[0] == rows[1] == {line["row"] for line in one[0][:6]}
    assert_same_metrics(two[2], one[2])


def test_adapters_are_trained_alike(alone):
    """On the policy that one process made; each process has its part of base and adapters."""
    folder, _, cache = alone
    model = {"path": str(folder / "alone"), "init": None, "tokenizer": None}
    config = write_config(
        folder,
        "adapters",
        mesh=SETTINGS["mesh"],
        model=model,
        lora={"rank": 2},
        train={"steps": 4, "eval_every": 4, "save_every": 2},
    )
    found = {}
    for count in (1, 2):
        run = folder / f"adapters_{count}"
        processes = start_several(config, run, count, log=folder / run.name, cache=cache)
        assert finish(processes, PATIENCE) == [0] * count, logs_of(folder, run.name)
        found[count] = metrics_of(run)
    assert_same_metrics(found[2], found[1])
    # What one process saved, two go on with, and the other way round.
    for count, other in ((1, 2), (2, 1)):
        run = folder / f"adapters_{count}"
        more = ["--resume", "--train.steps", "6"]
        processes = start_several(config, run, other, *more, log=folder / run.name, cache=cache)
        assert finish(processes, PATIENCE) == [0] * other, logs_of(folder, run.name)
    ends = [metrics_of(folder / f"adapters_{count}") for count in (1, 2)]
    assert [line["step"] for line in ends[0]][-1] == 6
    assert_same_metrics(*ends)

"""Runs whose folder, model and data lie in a bucket: killed, doubled, torn, by two processes."""

import json
import signal

import jax
import numpy as np
import pytest

from spo_jax.cli import main
from spo_jax.parallel import copies
from spo_jax.parallel.lease import FOLDER
from spo_jax.parallel.stores import COMMITTED, Store
from tests.parallel.object_stores import BUCKET, serve
from tests.runs import (
    TIMINGS,
    finish,
    metrics_of,
    start,
    start_several,
    state_of,
    write_config,
)

pytest.importorskip("gcsfs")
pytest.importorskip("s3fs")
pytestmark = pytest.mark.long

PATIENCE = 300
STEPS = 16


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run on a local disk; both servers run."""
    serve()
    folder = tmp_path_factory.mktemp("buckets")
    config = write_config(folder, train={"steps": STEPS, "save_every": 2, "eval_every": 8})
    run, log = folder / "undisturbed", folder / "undisturbed.log"
    assert finish([start(config, run, log=log, cache=folder / "compiled")], PATIENCE) == [0], (
        log.read_text()
    )
    return folder, config, run


def steps_in(store):
    """The steps whose writing was finished."""
    names = [name.split("/") for name in store.entries()]
    marked = [x for x in names if x[0] == "checkpoints" and len(x) == 3 and x[2] == COMMITTED]
    return sorted(int(x[1]) for x in marked)


def metrics_in(store):
    lines = (store.read("metrics.jsonl") or b"").decode().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMINGS} for x in lines]


def brought_back(store, folder):
    """The run in the bucket as one on the local disk."""
    store.fetch(store.entries(), folder)
    return folder


def assert_same_end(store, folder, expected):
    assert steps_in(store)[-1] == STEPS
    assert metrics_in(store) == metrics_of(expected)
    (state, *rest), (other, *expected_rest) = (
        state_of(x, STEPS) for x in (brought_back(store, folder), expected)
    )
    jax.tree.map(np.testing.assert_array_equal, state, other)
    assert rest == expected_rest


def wait_for_saved(store, step, *processes):
    """Return when ``step`` is saved; none of the processes may end before."""
    while max(steps_in(store), default=0) < step:
        for process in processes:
            assert process.poll() is None, process.log.read_text()


@pytest.mark.parametrize(("scheme", "kills"), [("gs", 2), ("s3", 1)])
def test_killed_and_resumed_to_the_same_end(undisturbed, scheme, kills):
    """SIGKILL while it runs and saves; the newest step is torn."""
    folder, config, expected = undisturbed
    url, log = f"{scheme}://{BUCKET}/killed", folder / f"{scheme}.log"
    store, options = Store(url), {"log": log, "cache": folder / "compiled"}
    reached = 0
    for kill in range(kills):
        process = start(config, url, *(["--resume"] if kill else []), **options)
        wait_for_saved(store, reached + 4, process)
        process.kill()
        process.wait()
        reached = steps_in(store)[-1]
        assert reached < STEPS

    torn = [name for name in store.entries() if name.startswith(f"checkpoints/{reached}/state/")]
    for name in torn:
        store.write(name, store.read(name)[:-5])
    last = start(config, url, "--resume", **options)
    assert finish([last], PATIENCE) == [0], log.read_text()
    said = log.read_text()
    assert f"checkpoint {reached} in {url} is damaged" in said
    assert f"going on from step {reached - 2} of {STEPS}" in said
    assert "Traceback" not in said
    assert str(folder / "tmp") not in said
    assert_same_end(store, folder / f"{scheme}_back", expected)


def test_a_second_run_in_the_same_bucket_folder_refuses(undisturbed):
    folder, config, _ = undisturbed
    url, logs = f"gs://{BUCKET}/twice", [folder / f"twice_{i}.log" for i in range(2)]
    longer = ["--train.steps", "100000", "--train.save_every", "null"]
    first = start(config, url, *longer, log=logs[0], cache=folder / "compiled")
    store = Store(url)
    while first.poll() is None and "config.yaml" not in store.entries():
        pass
    second = start(config, url, *longer, "--resume", log=logs[1], cache=folder / "compiled")
    assert finish([second], PATIENCE) == [2], logs[1].read_text()
    assert f"a run goes on in {url} already (process {first.pid} on" in logs[1].read_text()
    assert first.poll() is None
    first.kill()
    first.wait()


def test_a_step_that_was_not_finished_is_none(undisturbed):
    folder, config, expected = undisturbed
    url, log = f"gs://{BUCKET}/unfinished", folder / "unfinished.log"
    store, options = Store(url), {"log": log, "cache": folder / "compiled"}
    process = start(config, url, **options)
    wait_for_saved(store, 4, process)
    process.send_signal(signal.SIGTERM)
    assert finish([process], 60) == [128 + signal.SIGTERM], log.read_text()
    assert f"everything is saved in {url}" in log.read_text()
    reached, before = reversed(steps_in(store)[-2:])
    # As a kill leaves it: all arrays but not the mark; and of the reference likewise.
    store.remove([f"checkpoints/{reached}/{COMMITTED}"])
    last = start(config, url, "--resume", **options)
    assert finish([last], PATIENCE) == [0], log.read_text()
    assert f"going on from step {before} of {STEPS}" in log.read_text()
    assert_same_end(store, folder / "unfinished_back", expected)


def test_two_processes_share_a_bucket_and_no_disk(undisturbed, tmp_path):
    """Folder, model and rows are there alone; each process has a copy of its own."""
    folder, config, expected = undisturbed
    inputs = Store(f"gs://{BUCKET}/inputs")
    inputs.write("pairs.jsonl", (folder / "pairs.jsonl").read_bytes())
    for file in (expected / "model").iterdir():
        inputs.write(f"tokenizer/{file.name}", file.read_bytes())
    places = ["--data.train", f"{inputs.url}/pairs.jsonl"]
    places += ["--model.tokenizer", f"{inputs.url}/tokenizer"]
    url, log = f"gs://{BUCKET}/two", folder / "two.log"
    own = {i: ["--reference.cache-dir", str(tmp_path / f"{i}")] for i in range(2)}
    options = {"log": log, "cache": folder / "compiled", "own": own}
    store = Store(url)

    processes = start_several(config, url, 2, *places, **options)
    wait_for_saved(store, 4, *processes)
    for process in processes:
        process.kill()
        process.wait()
    reached = steps_in(store)[-1]
    assert 4 <= reached < STEPS
    processes = start_several(config, url, 2, *places, "--resume", **options)
    statuses = finish(processes, PATIENCE)
    said = [(folder / f"two.{i}.log").read_text() for i in range(2)]
    assert statuses == [0, 0], said
    assert f"going on from step {reached} of {STEPS}" in said[0]
    assert "since the run began" not in said[0]
    sources = json.loads(store.read("model/sources.json"))
    assert {name.rpartition("/")[0] for name in sources} == {f"{inputs.url}/tokenizer"}
    found = metrics_in(store)
    assert [line["step"] for line in found] == [line["step"] for line in metrics_of(expected)]
    for one, other in zip(found, metrics_of(expected), strict=True):
        for key, value in other.items():
            np.testing.assert_allclose(one[key], value, rtol=2e-3, atol=2e-4, err_msg=key)

    refused = start_several(
        config, f"s3://{BUCKET}/two", 2, **(options | {"log": folder / "no.log"})
    )
    assert finish(refused, PATIENCE) == [2, 2]
    assert (
        "several processes are written to gs:// or to a folder" in (folder / "no.0.log").read_text()
    )


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_what_reads_a_run_reads_it_from_a_bucket(
    undisturbed, scheme, tmp_path, monkeypatch, capsys
):
    folder, config, expected = undisturbed
    store = Store(f"{scheme}://{BUCKET}/finished")
    for file in expected.rglob("*"):
        name = file.relative_to(expected).as_posix()
        if file.is_file() and not name.startswith("."):
            store.send(file, name)
    for step in (p.name for p in (expected / "checkpoints").iterdir()):
        store.write(f"checkpoints/{step}/{COMMITTED}", b"")
    store.write(f"reference/{COMMITTED}", b"")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments, status=0):
        monkeypatch.setattr(copies, "_COPIES", {})  # as in a process of its own
        assert main([str(x) for x in arguments]) == status
        found = capsys.readouterr()
        return found.out + found.err

    assert f"policy of {store.url} after {STEPS} updates" in run(
        "export", store.url, tmp_path / "hf"
    )
    run("export", expected, tmp_path / "local")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    for file in (tmp_path / "hf").iterdir():
        store.send(file, f"hf/{file.name}")
    pairs = folder / "pairs.jsonl"
    store.send(pairs, "pairs.jsonl")
    data = ["--data", f"{store.url}/pairs.jsonl"]
    found = run("evaluate", f"{store.url}/hf", *data, "--reference", store.url)
    metrics, _ = json.JSONDecoder().raw_decode(found[found.index("{") :])
    assert metrics["log_ratio/margin"] == pytest.approx(0.0, abs=1e-4), metrics
    run("report", store.url, "--out", tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000

    found = run(
        "data", config, "--output-dir", f"{scheme}://{BUCKET}/none", "--data.train", data[1]
    )
    assert f"{store.url}/pairs.jsonl" in found

    for arguments in (
        ("report", store.url),
        ("export", store.url, f"{store.url}/out"),
        ("dynamics", store.url),
        ("evaluate", store.url, *data, "--output", f"{store.url}/out.json"),
    ):
        assert "bucket" in run(*arguments, status=2), arguments
    before = set(store.entries())
    assert not [name for name in before if name.startswith(("out", FOLDER))]

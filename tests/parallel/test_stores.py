"""Buckets of two kinds, by servers on loopback: what is read, kept, sent, and who may write."""

import json
import os
import subprocess
import sys
import tempfile
import threading

import pytest

from spo_jax.checkpoints.run_folder import RunLocked, bucket_folder
from spo_jax.cli import main
from spo_jax.config.validation import checked_config
from spo_jax.parallel import copies
from spo_jax.parallel.copies import is_committed, local_path, named, place_of
from spo_jax.parallel.lease import FOLDER, Lease, LeaseHeld, LeaseLost
from spo_jax.parallel.mirror import Mirror
from spo_jax.parallel.processes import by_first
from spo_jax.parallel.stores import COMMITTED, BucketError, Store, check_local, scheme_of
from spo_jax.training.run import train
from tests.parallel.object_stores import BUCKET, serve

pytest.importorskip("gcsfs")
pytest.importorskip("s3fs")


@pytest.fixture(params=["gs", "s3"])
def url(request, tmp_path, monkeypatch):
    """A place of its own for a test, and a cache of its own for what is fetched."""
    serve()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(copies, "_COPIES", {})
    return f"{request.param}://{BUCKET}/{tmp_path.name}"


def test_objects_are_written_read_listed_and_removed(url, tmp_path):
    store = Store(f"{url}/")
    assert store.entries() == {}
    assert store.read("a/b") is None
    store.write("a/b", b"one")
    store.write("a/c", b"")
    first = store.entries()
    assert {name: entry.size for name, entry in first.items()} == {"a/b": 3, "a/c": 0}
    store.write("a/b", b"two!")
    assert store.read("a/b") == b"two!"
    assert store.entries()["a/b"] != first["a/b"]
    assert store.entries()["a/c"] == first["a/c"]
    file = tmp_path / "large"
    file.write_bytes(os.urandom(100_000))
    store.send(file, "large")
    store.fetch(["large", "a/b"], tmp_path / "back")
    assert (tmp_path / "back/large").read_bytes() == file.read_bytes()
    assert (tmp_path / "back/a/b").read_bytes() == b"two!"
    store.remove(["a/b", "never"])
    assert set(store.entries()) == {"a/c", "large"}
    # A prefix is no folder: what begins alike is another's.
    Store(f"{url}-other").write("x", b"")
    assert "x" not in str(store.entries())


def test_of_several_who_create_an_object_one_does(url):
    store, made = Store(url), []

    def create(number):
        made.append(store.create("one", f"{number}".encode()) and number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (number for number in made if number)
    assert store.read("one") == f"{winner}".encode()


def test_a_folder_is_fetched_once_and_then_what_has_changed(url, tmp_path, monkeypatch):
    store = Store(url)
    store.write("model/config.json", b"{}")
    store.write("model/weights", b"1")
    folder = local_path(f"{url}/model")
    assert (folder / "config.json").read_bytes() == b"{}"
    assert named(f"in {folder}/weights") == f"in {url}/model/weights"
    assert local_path(f"{url}/model/weights").read_bytes() == b"1"  # of the same copy
    store.write("model/weights", b"2")
    store.write("model/more", b"3")
    store.remove(["model/config.json"])
    assert local_path(f"{url}/model") == folder
    assert (folder / "weights").read_bytes() == b"1", "in a process a copy stays what it is"

    fetched = []
    fetch = Store.fetch
    monkeypatch.setattr(
        Store, "fetch", lambda self, names, to: fetched.extend(names) or fetch(self, names, to)
    )
    monkeypatch.setattr(copies, "_COPIES", {})  # as in the next process
    assert local_path(f"{url}/model") == folder
    assert sorted(p.name for p in folder.iterdir()) == ["more", "weights"]
    assert (folder / "weights").read_bytes() == b"2"
    assert sorted(fetched) == ["more", "weights"]
    monkeypatch.setattr(copies, "_COPIES", {})
    local_path(f"{url}/model")
    assert len(fetched) == 2


def test_a_name_that_leads_elsewhere_is_not_followed(url, monkeypatch):
    store = Store(url)
    listed = {f"{url.split('://')[1]}/x/../../../etc/y": {"size": 1, "etag": "1"}}
    monkeypatch.setattr(store._files, "find", lambda *_, **__: listed)
    with pytest.raises(BucketError, match="leads elsewhere"):
        store.entries()


def test_an_object_is_a_file(url):
    Store(url).write("pairs.jsonl", b'{"a": 1}\n')
    file = local_path(f"{url}/pairs.jsonl")
    assert file.name == "pairs.jsonl"
    assert json.loads(file.read_text()) == {"a": 1}


def test_arrays_of_a_run_stay_where_orbax_reads_them(url):
    store = Store(url)
    for name in ("config.yaml", "model/config.json", "metrics.jsonl"):
        store.write(f"run/{name}", b"{}")
    for step in (4, 6):
        store.write(f"run/checkpoints/{step}/state/d/0", b"array")
    store.write(f"run/checkpoints/4/{COMMITTED}", b"")
    store.write("run/reference/d/0", b"array")
    store.write("texts/reference/de.txt", b"not a run")
    folder = local_path(f"{url}/run")
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    plain = {"config.yaml", "model/config.json", "metrics.jsonl"}
    steps = place_of(folder / "checkpoints")
    if url.startswith("gs"):
        assert there == plain
        assert f"{steps}" == f"{url}/run/checkpoints"
        assert [is_committed(steps / name) for name in ("4", "6", "8")] == [True, False, False]
    else:
        assert there == {*plain, "checkpoints/4/state/d/0", f"checkpoints/4/{COMMITTED}"}
        assert steps == folder / "checkpoints"
        assert [is_committed(steps / name) for name in ("4", "6")] == [True, False]
    assert (local_path(f"{url}/texts") / "reference/de.txt").read_text() == "not a run"


def test_what_cannot_be_read_is_named(url, monkeypatch):
    with pytest.raises(FileNotFoundError, match=f"{url}/none: nothing lies there"):
        local_path(f"{url}/none")
    scheme = scheme_of(url)
    with pytest.raises(ValueError, match=f"{scheme}:///: expected {scheme}://BUCKET/PATH"):
        Store(f"{scheme}:///")
    with pytest.raises(ValueError, match="az:// is not read or written here; gs://, s3:// are"):
        local_path("az://container/x")
    assert scheme_of("/a/gs://b") is None
    with pytest.raises(ValueError, match=f"--out={url}: name a local path"):
        check_local("--out", url)
    check_local("--out", "a/b")
    check_local("--out", None)


def test_without_its_package_a_scheme_is_refused_with_the_mend():
    code = (
        "import sys; sys.modules['gcsfs'] = None\n"
        "from spo_jax.parallel.stores import Store\n"
        "Store('gs://a/b')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "gs:// needs the package gcsfs: pip install 'spo-jax[buckets]'" in found.stderr


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reference", {"cache_dir": "gs://b/x"}),
        ("rows_cache", "s3://b/x"),
        ("output_dir", "ftp://b/x"),
    ],
)
def test_places_that_a_run_cannot_have_in_a_bucket(key, value):
    tree = {"data": {"train": "pairs.jsonl"}, "model": {"path": "m"}, "train": {"steps": 1}}
    config = checked_config({**tree, key: value})
    with pytest.raises(ValueError, match="b/x"):
        train(config)


@pytest.mark.parametrize(
    "words",
    [
        ["study", "configs/study_arithmetic.yaml", "--output-dir"],
        ["rounds", "configs/rounds_arithmetic.yaml", "--output-dir"],
        ["score-pairs", "configs/quickstart.yaml", "--out"],
        ["data", "configs/quickstart.yaml", "--json"],
        ["generate", "model", "--data", "file.jsonl", "--out"],
        ["make-pairs", "model", "--data", "file.jsonl", "--task", "gsm8k", "--out"],
    ],
    ids=lambda words: words[0],
)
def test_what_a_command_writes_is_local(words, capsys):
    assert main([*words, "gs://a-bucket/x"]) == 2
    assert "x: name a local path" in capsys.readouterr().err


def test_a_lease_is_held_released_and_lost(url):
    store, times = Store(url), {"period": 0.2, "patience": 1.0}
    first, second, third = (Lease(store, **times) for _ in range(3))
    first._mine["machine"] = second._mine["machine"] = "elsewhere"
    first.take()
    beat, end = threading.Event(), threading.Event()

    def live():
        while not end.wait(0.1):
            first.renew()
            beat.set()

    thread = threading.Thread(target=live)
    thread.start()
    beat.wait()
    said = []
    with pytest.raises(LeaseHeld, match=f"process {os.getpid()} on "):
        second.take(said.append)
    assert f"{url}: process {os.getpid()} on " in said[0]
    end.set()
    thread.join()  # killed, as others see it
    second.take(said.append)
    with pytest.raises(LeaseLost, match=f"another run has taken over {url}"):
        first.renew()
    first.release()  # nothing of the other's
    second.renew()
    second.release()
    third.take()
    assert sorted(Store(f"{url}/{FOLDER}").entries()) == ["000003.json"]
    second._number = 2  # as if it had slept all the while
    with pytest.raises(LeaseLost):
        second.renew()


def test_who_died_on_this_machine_holds_no_lease(url):
    store = Store(url)
    dead = Lease(store)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead._mine["process"] = gone.pid
    dead.take()
    said = []
    Lease(store).take(said.append)
    assert not said, "nobody has to be waited for"


def test_a_mirror_sends_what_changes_and_takes_over_what_is_there(url):
    store = Store(url)
    store.write("model/config.json", b"{}")
    store.write("metrics.jsonl", b"1\n")
    with bucket_folder(url):
        folder = local_path(url)
        assert local_path(f"{url}/model") == folder / "model"
        assert (folder / "metrics.jsonl").read_text() == "1\n"
        with bucket_folder(url):  # the same one
            assert local_path(url) == folder
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("2\n")
        (folder / "model/config.json").unlink()
        (folder / ".metrics.jsonl.tmp").write_text("half")
        by_first(lambda: None)
        assert store.read("metrics.jsonl") == b"1\n2\n"
        held = {f"{FOLDER}/000001.json"}
        assert set(store.entries()) == {"metrics.jsonl", *held}

        # A step is sent whole or is none; where orbax writes the store itself it is not sent.
        state = folder / "preference/checkpoints/4/state"
        state.mkdir(parents=True)
        (state / "d").write_bytes(b"array")
        half = folder / "preference/checkpoints/6.orbax-checkpoint-tmp/state"
        half.mkdir(parents=True)
        (half / "d").write_bytes(b"array")
        (folder / "last").write_text("at the end")
    found = set(store.entries()) - held
    step = {f"preference/checkpoints/4/{name}" for name in ("state/d", COMMITTED)}
    assert found == {"metrics.jsonl", "last"} | (step if url.startswith("s3") else set())
    Lease(store).take()  # it was given back


def test_copies_that_killed_runs_left_are_removed(url, tmp_path, monkeypatch):
    """A machine whose runs are killed again and again keeps one copy, not all of them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    living, left, other = Mirror(url), tmp_path / "spo_jax_run_left", tmp_path / "spo_jax_run_x"
    for folder, name in ((left, ".lock_of_copy"), (left, "weights"), (other, "not ours")):
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
    new = Mirror(url)
    assert new.folder.is_dir()
    assert (living.folder / ".lock_of_copy").exists()
    assert not left.exists()
    assert (other / "not ours").exists()
    (new.folder / "a").write_text("1")
    new.send()
    assert set(new.store.entries()) == {"a"}
    for mirror in (living, new):
        mirror.remove()
    assert sorted(path.name for path in tmp_path.glob("spo_jax_run_*")) == [other.name]


def test_another_process_takes_over_what_the_first_one_sends(url, tmp_path):
    writer, reader = Mirror(url), Mirror(url)
    (writer.folder / "a").mkdir()
    (writer.folder / "a/b").write_text("1")
    writer.send()
    reader.fetch()
    assert (reader.folder / "a/b").read_text() == "1"
    (writer.folder / "a/b").unlink()
    (writer.folder / "c").write_text("2")
    writer.send()
    reader.fetch()
    there = [p.name for p in reader.folder.rglob("*") if p.is_file()]
    assert sorted(there) == [".lock_of_copy", "c"]
    for mirror in (writer, reader):
        mirror.remove()
        assert not mirror.folder.exists()


def test_a_run_that_goes_on_is_not_begun_again(url, monkeypatch):
    lease = Lease(Store(url))
    lease._mine["machine"] = "elsewhere"
    lease.take()
    monkeypatch.setattr(
        "spo_jax.checkpoints.run_folder.Lease", lambda store: Lease(store, period=0.1, patience=5.0)
    )
    end = threading.Event()
    thread = threading.Thread(
        target=lambda: [lease.renew() for _ in iter(lambda: end.wait(0.05), True)]
    )
    thread.start()
    try:
        with pytest.raises(RunLocked, match=f"a run goes on in {url} already"), bucket_folder(url):
            pass
    finally:
        end.set()
        thread.join()

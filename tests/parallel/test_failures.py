"""What a process that fails leaves for the others, and what they make of it."""

import json
import threading

import pytest

from spo_jax.cli import main
from spo_jax.parallel import failures


class Store:
    """The coordinator's store, as far as it is used here."""

    def __init__(self, *errors, lost=False):
        self.kept = {
            f"{failures.FOLDER}{i}": json.dumps({"error": error, "status": 75})
            for i, error in errors
        }
        self.lost, self.asked = lost, threading.Event()

    def key_value_set(self, key, value):
        if self.lost:
            raise RuntimeError("UNAVAILABLE")
        self.kept[key] = value

    def key_value_dir_get(self, folder):
        self.asked.set()
        if self.lost:
            raise RuntimeError("UNAVAILABLE")
        return [(key, value) for key, value in self.kept.items() if key.startswith(folder)]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Process 1 of 3; ``ends`` is what it would have ended with."""
    ends = []
    monkeypatch.setattr(failures, "PERIOD", 0.01)
    monkeypatch.setattr(failures, "_leaving", threading.Event())
    monkeypatch.setattr(failures.os, "_exit", ends.append)
    return ends


def test_the_others_end_with_the_words_and_status_of_the_one_that_failed(here, capsys):
    failures._look(Store((0, "data.jsonl: no such file")), 1, 3, here.append)
    assert here == [75]
    said = capsys.readouterr().err
    assert "process 1 of 3 ends, for process 0 failed: data.jsonl: no such file" in said


def test_they_look_again_until_there_is_something(here):
    store = Store()
    thread = threading.Thread(target=failures._look, args=(store, 1, 3, here.append))
    thread.start()
    assert store.asked.wait(5)
    assert here == []
    store.kept = Store((2, "no")).kept
    thread.join(5)
    assert here == [75]


def test_what_has_an_error_of_its_own_says_that(here):
    """As where a row is an error of all: the thread does not come before it."""
    store = Store((0, "no"))
    store.asked.set = failures._leaving.set  # between the first look and the second
    failures._look(store, 1, 3, here.append)
    assert here == []


def test_a_lost_coordinator_is_left_to_jax(here):
    failures._look(Store(lost=True), 1, 3, here.append)
    assert here == []


@pytest.mark.parametrize("lost", [False, True])
def test_word_is_left_and_the_process_ends(here, monkeypatch, capsys, lost):
    store = Store(lost=lost)
    monkeypatch.setattr(failures, "joined", lambda: (store, 2, 3))
    failures.leave("no room", 2)
    assert here == [2]
    assert failures._leaving.is_set()
    if lost:
        assert "the other processes were not told: UNAVAILABLE" in capsys.readouterr().err
    else:
        assert store.key_value_dir_get(failures.FOLDER) == [
            (f"{failures.FOLDER}2", '{"error": "no room", "status": 2}')
        ]


def test_an_error_of_waiting_for_one_that_failed_is_that_ones(here, monkeypatch, capsys):
    for store, expected in ((Store((0, "no room")), [75]), (Store(), []), (Store(lost=True), [])):
        here.clear()
        monkeypatch.setattr(failures, "joined", lambda store=store: (store, 1, 3))
        failures.end_if_told()
        assert here == expected
    assert "process 0 failed: no room" in capsys.readouterr().err


def test_a_command_tells_the_others_of_its_own_errors_and_of_others(here, monkeypatch, capsys):
    store = Store()
    monkeypatch.setattr(failures, "joined", lambda: (store, 2, 3))
    assert main(["train", "nowhere.yaml"]) == 2
    assert "error (process 2 of 3): " in capsys.readouterr().err

    def slip(options):
        raise KeyError("slip")

    monkeypatch.setattr("spo_jax.cli.train._train", slip)
    told = [store.kept.popitem()[1]]
    with pytest.raises(KeyError):
        main(["train", "nowhere.yaml"])
    told.append(store.kept.popitem()[1])
    assert here == [2, 1]
    assert "nowhere.yaml" in json.loads(told[0])["error"]
    assert json.loads(told[1]) == {"error": "KeyError: 'slip'", "status": 1}
    assert "Traceback" in capsys.readouterr().err


def test_a_command_that_broke_on_a_failed_one_says_what_that_one_said(here, monkeypatch, capsys):
    def broken(options):
        raise KeyError("collective")

    monkeypatch.setattr("spo_jax.cli.train._train", broken)
    monkeypatch.setattr(failures, "joined", lambda: (Store((0, "no room")), 2, 3))
    with pytest.raises(KeyError):
        main(["train", "nowhere.yaml"])
    assert here[0] == 75
    assert "process 0 failed: no room" in capsys.readouterr().err


def test_one_alone_watches_nothing():
    before = threading.active_count()
    failures.watch()
    assert threading.active_count() == before

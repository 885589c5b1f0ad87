"""A command that computes starts itself again, once, where glibc has huge pages to ask for."""

import os
import subprocess
import sys

import pytest

import spo_jax.cli
from spo_jax.cli import huge_pages
from spo_jax.cli.huge_pages import TUNABLES, start_on_huge_pages


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What would be started, on a system that has huge pages on demand."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36")
    monkeypatch.setattr(huge_pages, "ON_DEMAND", tmp_path / "enabled")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "spo_jax", "train", "a b"])
    monkeypatch.delenv(TUNABLES, raising=False)
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    return calls


def test_the_same_command_is_started_with_the_variable(started):
    start_on_huge_pages()
    ((program, arguments, variables),) = started
    assert program == sys.executable
    assert arguments == [sys.executable, "-X", "dev", "-m", "spo_jax", "train", "a b"]
    assert variables == os.environ | {TUNABLES: "glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize("enabled", ["[always] madvise never", "always madvise [never]", None])
def test_not_where_there_is_nothing_to_ask_for(started, tmp_path, enabled):
    if enabled is None:
        (tmp_path / "enabled").unlink()
    else:
        (tmp_path / "enabled").write_text(enabled)
    start_on_huge_pages()
    assert started == []


@pytest.mark.parametrize("library", ["glibc 2.34", "musl 1.2", None, ValueError])
def test_not_with_another_library(started, monkeypatch, library):
    def confstr(name):
        if library is ValueError:
            raise ValueError("unrecognized configuration name")
        return library

    monkeypatch.setattr(os, "confstr", confstr)
    start_on_huge_pages()
    assert started == []


@pytest.mark.parametrize("own", ["", "glibc.malloc.check=1"])
def test_what_the_user_has_set_stays(started, monkeypatch, own):
    monkeypatch.setenv(TUNABLES, own)
    start_on_huge_pages()
    assert started == []


@pytest.mark.parametrize("interpreter", [None, ""])
def test_not_inside_another_program(started, monkeypatch, interpreter):
    monkeypatch.setattr(sys, "executable", interpreter)
    start_on_huge_pages()
    assert started == []


def test_where_nothing_can_be_started_it_goes_on(started, monkeypatch):
    def fails(*call):
        raise PermissionError

    monkeypatch.setattr(os, "execve", fails)
    start_on_huge_pages()


@pytest.mark.parametrize(
    ("arguments", "again"),
    [(["train", "x.yaml"], 1), (["generate"], 1), (["report", "x"], 0), (["--help"], 0), ([], 0)],
)
def test_commands_that_compute_do_so(started, monkeypatch, arguments, again):
    monkeypatch.setattr(sys, "argv", ["spo-jax", *arguments])
    monkeypatch.setattr(spo_jax.cli, "main", lambda: 7)
    assert spo_jax.cli.start() == 7
    assert len(started) == again


def test_a_process_really_starts_again():
    """Where this system has such pages; else it goes on as it was. Its number stays."""
    code = (
        "import os; from spo_jax.cli.huge_pages import start_on_huge_pages;"
        "print(os.getpid(), flush=True); start_on_huge_pages();"
        f"print(os.environ.get({TUNABLES!r}))"
    )
    environment = {k: v for k, v in os.environ.items() if k != TUNABLES}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    *numbers, said = done.stdout.split()
    again = huge_pages._on_demand()
    assert said == ("glibc.malloc.hugetlb=1" if again else "None")
    assert len(numbers) == 1 + again
    assert len(set(numbers)) == 1

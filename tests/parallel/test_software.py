"""Versions and commits that a run depends on."""

import subprocess

import jax

from spo_jax.parallel.software import commit, devices, processor, versions


def git(folder, *command):
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *command], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_a_commit_and_what_of_it_is_changed(tmp_path):
    assert commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert commit(tmp_path) is None  # a checkout of nothing
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "x")
    number = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "unknown").write_text("1")
    assert commit(tmp_path / "below") == number
    (tmp_path / "a").write_text("2")
    assert commit(tmp_path) == f"{number}, and 1 changed files"


def test_without_git_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) is None


def test_versions_are_of_what_is_installed():
    found = versions(("jax", "no-such-package"))
    assert set(found) == {"jax"}
    assert found["jax"] == jax.__version__
    assert devices()["count"] == jax.device_count()
    assert "cores" in processor()

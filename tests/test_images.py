"""Container images: what they copy is there, and the linter finds nothing."""

import fnmatch
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "Dockerfile", ROOT / "tpu" / "gke" / "Dockerfile"]
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which(
    "hadolint"
)
IDS = [path.relative_to(ROOT).as_posix() for path in FILES]


def lint(path):
    if HADOLINT is None and (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("the linter's package has no wheel for this machine")
    assert HADOLINT, "hadolint is not installed: pip install -e '.[test]'"
    return subprocess.run([HADOLINT, str(path)], capture_output=True, text=True)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_the_linter_finds_nothing(path):
    done = lint(path)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_would_find_something(tmp_path):
    path = tmp_path / "Dockerfile"
    path.write_text("FROM python:latest\nRUN cd /tmp\n")
    assert "DL3007" in lint(path).stdout


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_what_is_copied_is_there_and_not_ignored(path):
    kept = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    lines = re.findall(r"^COPY (.*) \S+$", path.read_text(), re.MULTILINE)
    copied = [word for line in lines for word in line.split()]
    assert {"pyproject.toml", "requirements.txt", "README.md", "spo_jax", "configs"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists(), name
        assert any(fnmatch.fnmatch(name, pattern) for pattern in kept), name

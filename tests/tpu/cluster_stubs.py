"""Stand-ins for the programs that the scripts of ``tpu/`` call: no cluster is at hand in tests.

``gcloud`` and the rest record what they were called with, and answer what a test tells them to.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TPU = ROOT / "tpu"

_PROGRAM = '''#!{python} -SE
import json, os, pathlib, subprocess, sys

here = pathlib.Path({here!r})
name, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with (here / "calls").open("a") as calls:
    calls.write(json.dumps([name, *words]) + "\\n")


def following(key):
    """The next of the answers told for ``key``; the last one is for ever."""
    path = here / "answers.json"
    answers = json.loads(path.read_text())
    mine = answers.get(key)
    if not mine:
        sys.exit(f"the stub was told no answer for {{key}}: {{words}}")
    value = mine.pop(0) if len(mine) > 1 else mine[0]
    path.write_text(json.dumps(answers))
    return value


def ssh():
    command = next(w for w in words if w.startswith("--command=")).removeprefix("--command=")
    worker = next(w for w in words if w.startswith("--worker=")).removeprefix("--worker=")
    homes = sorted((here / "workers").glob("*"))
    if not homes:
        return told("ssh-status" if command.endswith("worker.sh status") else "ssh")
    failed = 0
    for home in homes if worker == "all" else [homes[int(worker)]]:
        env = {{**os.environ, "HOME": str(home)}}
        failed += subprocess.run(["bash", "-c", command], cwd=home, env=env).returncode != 0
    sys.exit(bool(failed))


def told(key):
    answer = following(key)
    if answer is None:
        sys.exit("ERROR: (gcloud) NOT_FOUND: Resource was not found")
    if answer.startswith("!"):
        sys.exit(answer[1:])
    print(answer)


if name == "gcloud" and words[3:4] == ["ssh"]:
    ssh()
elif name == "gcloud" and words[3:4] == ["describe"]:
    told(words[2])
elif name == "gcloud" and words[:4] == ["compute", "tpus", "queued-resources", "create"]:
    told("create")
elif name in ("srun", "scontrol"):
    (here / f"{{name}}.env").write_text(json.dumps(dict(os.environ)))
    sys.exit(int(following(name)))
'''


class Stubs:
    """A folder of stand-ins at the front of ``PATH``, and what is told to and asked of them."""

    def __init__(self, folder: Path, *programs: str):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for program in programs:
            self.write(program, _PROGRAM.format(python=sys.executable, here=str(folder)))
        self.tell()
        self.environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "PROJECT": "my-project",
            "ZONE": "us-west4-a",
            "NAME": "spo",
            "BUCKET": "my-bucket",
            "INTERVAL": "0",
        }

    def write(self, program: str, text: str) -> Path:
        """Another program, as a script of its own."""
        path = self.bin / program
        path.write_text(text)
        path.chmod(0o755)
        return path

    def tell(self, **answers: list[str | None]) -> None:
        """What to answer, call by call: ``None`` is "not found", ``!x`` fails saying x."""
        defaults: dict[str, Any] = {"ssh": [""], "create": [""]}
        named = {key.replace("_", "-"): value for key, value in answers.items()}
        (self.folder / "answers.json").write_text(json.dumps({**defaults, **named}))

    def calls(self) -> list[list[str]]:
        """Every call so far, as words."""
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self) -> list[str]:
        """The calls that change something, in short."""
        found = []
        for words in self.calls():
            if words[0] == "gcloud" and words[4] in ("create", "delete", "scp"):
                found.append(words[4])
            elif words[0] == "gcloud" and words[4] == "ssh":
                remote = words[-1].partition("worker.sh ")[2]
                if remote.startswith(("start", "stop")):
                    found.append(remote.split()[0] + (" --resume" * ("--resume" in remote)))
        return found

    def run(
        self, script: str, *arguments: str, **environment: str | None
    ) -> subprocess.CompletedProcess[str]:
        """Run a script of ``tpu/``; ``None`` takes a variable out of the environment."""
        merged = {**self.environment, **environment}
        return subprocess.run(
            ["bash", str(TPU / script), *arguments],
            env={key: value for key, value in merged.items() if value is not None},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


def commands(output: str) -> list[list[str]]:
    """What a dry run printed, as words, command by command; remarks are left out."""
    found, open_lines = [], []
    for line in output.splitlines():
        if not open_lines and (line.startswith("#") or not line.strip()):
            continue
        open_lines.append(line)
        try:
            words = shlex.split("\n".join(open_lines))
        except ValueError:  # a quotation that goes on in the next line
            continue
        found.append(words)
        open_lines = []
    assert not open_lines, f"a quotation is left open: {open_lines}"
    return found


def remote(words: list[str]) -> str | None:
    """The command that a gcloud command runs on workers, if it does."""
    return next((w.partition("=")[2] for w in words if w.startswith("--command=")), None)


def worker_home(stubs: Stubs, number: int) -> Path:
    """A worker's home folder as ``tpu/create.sh`` leaves it; ssh then runs there."""
    home = stubs.folder / "workers" / str(number)
    (home / "spo-venv" / "bin").mkdir(parents=True)
    os.symlink(ROOT, home / "spo-jax")
    return home

"""Real runs of the command in processes of their own, for tests of what no thread can show."""

import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.machine import WITHOUT_TORCH, cache_variables, shared_cache, xla_flags
from tests.tiny import ARCHITECTURE

ROOT = Path(__file__).resolve().parents[1]
DEVICES = 8

PAIRS = [
    {"prompt": f"{i}+{j}=", "chosen": f" {i + j}", "rejected": f" {i + j + 1}"}
    for i in range(8)
    for j in range(4)
]
TREE = {
    "stages": ["preference"],
    "model": {"tokenizer": "builtin:arithmetic", "init": ARCHITECTURE},
    "data": {"eval_fraction": 0.25, "prompt_buckets": [4], "completion_buckets": [4]},
    # With statistics, a running minimum and a multiplier: states that a resumed run must carry.
    "loss": {"name": "alphadpo", "beta": 2.0, "gamma_beta_ratio": 0.3, "alpha": 0.1},
    "solver": {"name": "primal_dual", "tolerance": -0.01},
    "objective": {"inner_value": "running_min"},
    "outer": {"learning_rate": 1e-2},
    "train": {"steps": 24, "batch_size": 8, "save_every": 2, "keep_checkpoints": 3},
}
TIMINGS = ("tokens_per_second", "data_wait_share")


def write_config(folder: Path, name="config", **sections) -> Path:
    """A small run of pairs as a file; ``sections`` are laid over ``TREE``'s, key by key."""
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    tree = {k: dict(v) if isinstance(v, dict) else v for k, v in TREE.items()}
    tree["data"] |= {"train": str(data)}
    tree["reference"] = {"cache_dir": str(folder / "cache")}
    for key, section in sections.items():
        tree[key] = {**tree.get(key, {}), **section} if isinstance(section, dict) else section
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def environment(devices=DEVICES, cache: Path | None = None) -> dict[str, str]:
    """That of a command on so many simulated devices.

    ``cache`` keeps compiled programs, every one; without it they are those of the test run.
    """
    found = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    found |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
        "PYTHONPATH": os.pathsep.join([str(ROOT), WITHOUT_TORCH]),
    }
    if cache is None:
        return found | shared_cache()
    kept = cache_variables(str(cache))
    return found | kept | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@functools.cache
def _zygote() -> subprocess.Popen:
    """The one of this test process; it ends when this process does, which closes its pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.zygote"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(1),
        cwd=ROOT,
        text=True,
    )


def _asked(request) -> int | None:
    zygote = _zygote()
    zygote.stdin.write(json.dumps(request) + "\n")
    zygote.stdin.flush()
    return json.loads(zygote.stdout.readline())


class Run:
    """A command under way, as ``subprocess.Popen`` has it."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path):
        request = {"start": arguments, "environment": environment, "log": str(log)}
        self.log = log
        self.pid = _asked(request)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        if self.returncode is None:
            self.returncode = _asked({"wait": self.pid})
        return self.returncode

    def wait(self, seconds: float = 60) -> int:
        """The exit status; ``subprocess.TimeoutExpired`` where there is none after ``seconds``."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("spo-jax", seconds)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To the process, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def start(
    config: Path,
    output: Path,
    *arguments: str,
    log: Path,
    variables=None,
    command="train",
    **options,
) -> Run:
    """``spo-jax train CONFIG`` in the background; what it says goes to the end of ``log``."""
    words = [command, str(config), "--output-dir", str(output), *arguments]
    return Run(words, environment(**options) | (variables or {}), log)


def free_port() -> int:
    """A port of this machine that a server started a little later still finds free.

    Those that the system gives out by itself may be taken meanwhile by any connection, and tests
    of buckets make thousands: it is one below them.
    """
    while True:
        port = random.SystemRandom().randint(15_000, 32_000)  # workers may be seeded alike
        with contextlib.suppress(OSError), socket.socket() as found:
            found.bind(("localhost", port))
            return port


def start_several(
    config: Path, output: Path, count: int, *arguments: str, log: Path, own=None, **options
) -> list[Run]:
    """``count`` processes of one run, with the devices shared out; ``own`` arguments by number."""
    address = f"localhost:{free_port()}"
    return [
        start(
            config,
            output,
            *arguments,
            *("--coordinator", address, "--num-processes", str(count), "--process-id", str(i)),
            *(own or {}).get(i, ()),
            log=log.with_suffix(f".{i}.log"),
            devices=DEVICES // count,
            **options,
        )
        for i in range(count)
    ]


def finish(processes, seconds: float) -> list[int]:
    """The exit statuses; what has not ended after ``seconds`` is killed (-9)."""
    end = time.monotonic() + seconds
    try:
        for process in processes:
            process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    return [process.wait() for process in processes]


def metrics_of(folder: Path) -> list[dict]:
    """The lines of ``metrics.jsonl`` without what the clock decides; the whole ones."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append({k: v for k, v in json.loads(line).items() if k not in TIMINGS})
        except ValueError:  # being written
            break
    return found


def wait_for_step(folder: Path, step: int, process: Run, seconds: float) -> None:
    """Return when ``step`` is written down, or the process has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if any(line["step"] >= step for line in metrics_of(folder)):
            return
        time.sleep(0.01)


def steps_of(folder: Path) -> list[int]:
    """The steps of the checkpoints kept."""
    names = [p.name for p in (folder / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def state_of(folder: Path, step: int):
    """Everything a checkpoint holds, as it is on the disk: arrays by path, position, counters."""
    import orbax.checkpoint as ocp

    root = folder / "checkpoints" / str(step)
    jsons = [json.loads((root / item / "metadata").read_text()) for item in ("data", "run")]
    return ocp.PyTreeCheckpointer().restore(root / "state"), *jsons

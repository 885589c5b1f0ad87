"""Speed and memory of one DPO step on the CPU: ours beside TRL (PyTorch) and Tunix (JAX).

    python benchmarks/peers.py

A Llama of 56 million parameters with random weights, written once as a Hugging Face folder and
read from there by every side; 4 pairs of random ids without padding; AdamW without decay, beta
0.1, and the reference is the policy at the start. Every side runs in a process of its own,
interleaved over rounds. The libraries are installed by pip into environments of their own, below
``--environments``, which are used again; ``--torch`` says which PyTorch, a CPU build will do.
Losses of the first two steps have to agree: the first is ln 2, the second tells of the gradients.
Every process has large arrays on huge pages where the system gives them on demand, as
``spo-jax train`` has. Other work on the machine spoils the numbers, those of TRL most: PyTorch's
threads wait for each other without sleeping, unless ``OMP_WAIT_POLICY=passive`` is set.

tokens/s counts both full sequences of a pair, for everyone. share is the time a program would take
that computes each prompt once, the head on completions alone, nothing twice, and all of it as fast
as plain products of the model's shapes run at that time, over the time taken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from step_sides import (
    JOB,
    OURS,
    TOLERANCES,
    TRL,
    Runner,
    Shape,
    Side,
    disagreeing,
    llama_config,
    perfect_flops,
    read_shapes,
)

PEERS = {"trl": ("trl==1.16.0", "torch"), "tunix": ("google-tunix==0.1.7",)}
"""What each peer's environment is made of; ``torch`` stands for ``--torch``."""

_TRL_BEST = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
SIDES = {
    "ours online": Side("ours", {"reference": "online"}),
    "ours precomputed": Side("ours", {"reference": "precomputed"}),
    "ours + penalty": Side("ours", {"reference": "precomputed", "solver": "penalty"}, False),
    "TRL stock": Side("trl", {"config": {}}),
    "TRL best": Side("trl", {"config": _TRL_BEST}),
    "Tunix stock": Side("tunix", {"reference": "online"}),
    "Tunix best": Side("tunix", {"reference": "at hand"}),
}
MORE_SIDES = {
    "ours kept": Side("ours", {"reference": "precomputed", "remat": "none"}),
    "ours remat": Side("ours", {"reference": "precomputed", "remat": "full"}),
    "ours lean": Side("ours", {"reference": "precomputed", "remat": "dots_no_batch"}),
    "ours in 2": Side("ours", {"reference": "precomputed", "micro_batches": 2}),
    "ours in 4": Side("ours", {"reference": "precomputed", "micro_batches": 4}),
    "ours chunked": Side("ours", {"reference": "precomputed", "chunk_tokens": 2048}),
    "ours xla": Side("ours", {"reference": "precomputed", "attention": "xla"}),
    "TRL online": Side("trl", {"config": {"gradient_checkpointing": False}}),
    "TRL precomputed": Side("trl", {"config": {"precompute_ref_log_probs": True}}),
    "TRL compiled": Side("trl", {"config": {**_TRL_BEST, "torch_compile": True}}),
    "Tunix remat": Side("tunix", {"reference": "at hand", "remat": "DECODER"}),
}
"""More for ``--sides``: each differs in one setting from a side above."""

DEFAULTS = {"ours": OURS, "trl": TRL, "tunix": {"remat": "NONE"}}


def product_shapes(shape: Shape, of: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """The products of the model, ``[a, b] x [b, c]``, whose rate is measured."""
    hidden, inner, rows = of["hidden_size"], of["intermediate_size"], shape.computed
    return [
        (rows, hidden, inner), (rows, inner, hidden), (rows, hidden, hidden),
        (2048, hidden, of["vocab_size"]),
    ]  # fmt: skip


# Processes


def make_environment(folder: Path, requirements: list[str]) -> Path:
    """The interpreter of an environment that has ``requirements``, made if it is not there."""
    python, made = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join(requirements) + "\n"
    if made.is_file() and made.read_text() == wanted:
        return python
    print(f"installing {' '.join(requirements)} into {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
    made.write_text(wanted)
    return python


def default_environments() -> Path:
    """A folder in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "spo_jax" / "peers"


# What is shown


def side_rows(rounds: list[dict], shape: Shape, flops: float, peers: set[str]) -> list[dict]:
    """One row of the table a side: medians over rounds, ratios and shares within a round."""
    names = list(rounds[0]["sides"])
    seconds = {
        name: [statistics.median(r["sides"][name]["seconds"]) for r in rounds] for name in names
    }
    ranked = sorted(peers & set(names), key=lambda name: statistics.median(seconds[name]))
    rates = [statistics.mean(r["rates"]) for r in rounds]
    rows = []
    for name in names:
        found = [r["sides"][name] for r in rounds]
        mine, cpu = seconds[name], [x for side in found for x in side["cpu_seconds"]]
        row = {
            "side": name,
            "seconds": statistics.median(mine),
            "tokens_per_second": statistics.median(shape.counted / s for s in mine),
            "cpu_seconds": statistics.median(cpu),
            "peak_bytes": statistics.median(side["peak_bytes"] for side in found),
            "share": statistics.median(flops / s / r for s, r in zip(mine, rates, strict=True)),
            "losses": found[0]["losses"],
        }
        if ranked:
            best = seconds[ranked[0]]
            ratios = [b / s for s, b in zip(mine, best, strict=True)]
            row["ratio_to_fastest_peer"] = statistics.median(ratios)
        rows.append(row)
    return rows


def show(rows: list[dict], rounds: list[dict], shape: Shape, flops: float, dtype: str) -> None:
    """Print the table of one shape."""
    rates = [rate for r in rounds for rate in r["rates"]]
    print(
        f"\nprompt {shape.prompt}, completion {shape.completion}, {shape.pairs} pairs, {dtype}: "
        f"{flops / 1e12:.3g} TFLOP a step; products at {min(rates) / 1e9:.3g} to "
        f"{max(rates) / 1e9:.3g} GFLOP/s\n"
        f"{'side':>16} {'s/step':>8} {'tokens/s':>9} {'ratio':>6} {'CPU s':>8} {'GiB':>6} "
        f"{'share':>6}  first losses"
    )
    for row in rows:
        ratio = row.get("ratio_to_fastest_peer")
        losses = " ".join(f"{loss:.6f}" for loss in row["losses"][:2])
        print(
            f"{row['side']:>16} {row['seconds']:8.3f} {row['tokens_per_second']:9.0f} "
            f"{'-' if ratio is None else f'{ratio:.2f}x':>6} {row['cpu_seconds']:8.2f} "
            f"{row['peak_bytes'] / 2**30:6.2f} {100 * row['share']:5.0f}%  {losses}"
        )


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", action="append", metavar="P/C", help="prompt and completion tokens; repeatable")
    add("--sides", nargs="+", choices=[*SIDES, *MORE_SIDES], default=list(SIDES), metavar="SIDE")
    add("--dtype", choices=TOLERANCES, default="float32", help="of the products")
    add("--rounds", type=int, default=3, help="of all sides, one after the other")
    add("--steps", type=int, default=3, help="timed ones of a side in a round")
    add("--warmup", type=int, default=2, help="steps before them; Tunix compiles in two")
    add("--pairs", type=int, default=4)
    add("--hidden", type=int, default=512)
    add("--layers", type=int, default=8)
    add("--vocabulary", type=int, default=32000)
    add("--learning-rate", type=float, default=1e-6)
    add("--tolerance", type=float, help="of the losses; 1e-4, or 2e-2 in bfloat16")
    add("--environments", type=Path, default=default_environments(), help="folder of the peers'")
    add("--torch", default="torch", metavar="REQUIREMENT", help="what pip installs for PyTorch")
    add("--tunables", default="glibc.malloc.hugetlb=1", help="of glibc, for every side; '': none")
    add("--json", type=Path, metavar="FILE", help="all numbers, too")
    options = parser.parse_args(arguments)
    if min(options.warmup, options.steps, options.rounds) < 1:
        parser.error("--warmup, --steps and --rounds are at least 1")
    options.shape = read_shapes(parser, options.shape or ["128/384", "384/128"], options.pairs)
    return options


def measure_shape(shape: Shape, sides: Mapping[str, Side], pythons, options) -> dict[str, Any]:
    """All rounds of one shape, checked and shown."""
    architecture = llama_config(options.hidden, options.layers, options.vocabulary)
    flops = perfect_flops(shape, architecture)
    job = JOB | shape._asdict() | {
        "architecture": architecture, "dtype": options.dtype, "on_cpu": True,
        "learning_rate": options.learning_rate, "warmup": options.warmup, "steps": options.steps,
    }  # fmt: skip
    # Where weights are bfloat16, such a small step rounds to none.
    stuck = {name for name, side in sides.items() if side.library == "tunix"}
    alike = {name for name, side in sides.items() if side.same_update}
    alike -= stuck if options.dtype == "bfloat16" else set()
    given = options.tolerance
    tolerance = TOLERANCES[options.dtype] if given is None else given
    rounds = []
    with tempfile.TemporaryDirectory(prefix="peers_") as folder:
        job["model"] = str(Path(folder) / "model")
        variables = {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": options.tunables}
        runner = Runner(Path(folder), pythons, job, variables)
        runner.run("model", "ours_prepare")
        rate = {"shapes": product_shapes(shape, architecture)}
        for number in range(options.rounds):
            first, found = runner.run("products", "ours_rate", **rate), {}
            for name, side in sides.items():
                settings = DEFAULTS[side.library] | side.settings
                found[name] = runner.run(name, f"{side.library}_step", settings=settings)
                seconds = statistics.median(found[name]["seconds"])
                print(f"round {number + 1}: {name} {seconds:.3f} s", file=sys.stderr, flush=True)
            last = runner.run("products", "ours_rate", **rate)
            wrong = disagreeing({n: f["losses"] for n, f in found.items()}, alike, tolerance)
            if wrong:
                raise SystemExit("The sides do not compute the same:\n" + "\n".join(wrong))
            rounds.append({"rates": [first["rate"], last["rate"]], "sides": found})
    peers = {name for name, side in sides.items() if side.library != "ours"}
    rows = side_rows(rounds, shape, flops, peers)
    show(rows, rounds, shape, flops, options.dtype)
    return {"shape": shape._asdict(), "flops": flops, "table": rows, "rounds": rounds}


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    options = read_options(arguments)
    sides = {name: (SIDES | MORE_SIDES)[name] for name in options.sides}
    pythons: dict[str, Path | str] = {"ours": sys.executable}
    for library in sorted({side.library for side in sides.values()} - {"ours"}):
        requirements = [options.torch if x == "torch" else x for x in PEERS[library]]
        pythons[library] = make_environment(options.environments / library, requirements)
    print(f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}")
    found = [measure_shape(shape, sides, pythons, options) for shape in options.shape]
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k not in ("environments", "json")}
        told = {name: DEFAULTS[side.library] | side.settings for name, side in sides.items()}
        options.json.write_text(
            json.dumps({"options": settings, "sides": told, "shapes": found}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()

"""One DPO step on an accelerator: ours in several settings, and TRL's ``DPOTrainer`` beside it.

    python benchmarks/accelerator.py --json found.jsonl
    python benchmarks/accelerator.py --models qwen2.5-1.5b --shape 128/384 --sides "ours full" \
        --profile traces

Random weights that are made on the device, random ids without padding, products in bfloat16,
beta 0.1; AdamW on float32 weights, and for 8 billion parameters Adafactor on bfloat16 ones. Every
side runs in a process of its own, so that its memory is its own. TRL has to be installed, here or
where ``--trl`` points. With ``--json`` every side is written down when it is done and not run
again: a command that was cut off goes on where it was. What a side had no memory for is a row too.

tokens/s counts both full sequences of a pair, for everyone. share is the time of a program that
computes each prompt once, the head on completions alone, nothing twice, with the frozen log-probs
at hand and at the rate of one large product, measured at the start, over the time taken. GiB are
the device's peak as its library counts it, frozen log-probs included; on a CPU the process's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from step_sides import (
    JOB,
    OURS,
    TOLERANCES,
    TRL,
    Runner,
    Shape,
    Side,
    SideFailed,
    disagreeing,
    llama_config,
    perfect_flops,
    read_shapes,
)

ARCHITECTURES = Path(__file__).parents[1] / "configs" / "paper" / "architectures"


class Target(NamedTuple):
    """A model to train: its ``config.json``, what a job says of it, and our sides unless asked."""

    architecture: Mapping[str, Any]
    job: Mapping[str, Any] = {}
    ours: Mapping[str, Any] = {}


def _stored(name: str, **changed: Any) -> dict[str, Any]:
    return json.loads((ARCHITECTURES / f"{name}.json").read_text()) | changed


MODELS = {
    "qwen2.5-0.5b": Target(_stored("qwen2.5-0.5b")),
    "qwen2.5-1.5b": Target(
        _stored(
            "qwen2.5-0.5b",
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            max_window_layers=28,
        )
    ),
    "llama-3-8b": Target(
        _stored("llama-3-8b"),
        {"param_dtype": "bfloat16", "optimizer": "adafactor"},
        {"remat": "full"},
    ),
    "tiny": Target(llama_config(16, 2, 40)),
}
"""``tiny`` tries the script."""

_TRL_BEST = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
SIDES = {
    "ours": Side("ours", {}),
    "ours + penalty": Side("ours", {"solver": "penalty"}, False),
    "ours online": Side("ours", {"reference": "online"}),
    "ours kept": Side("ours", {"remat": "none"}),
    "ours dots_no_batch": Side("ours", {"remat": "dots_no_batch"}),
    "ours full": Side("ours", {"remat": "full"}),
    "ours chunk 512": Side("ours", {"chunk_tokens": 512}),
    "ours chunk 8192": Side("ours", {"chunk_tokens": 8192}),
    "ours xla": Side("ours", {"attention": "xla"}),
    "ours sequences": Side("ours", {"reference": "online", "layout": "sequences"}),
    "TRL": Side("trl", {"config": _TRL_BEST}),
    "TRL checkpointed": Side("trl", {"config": {"precompute_ref_log_probs": True}}),
    "TRL online": Side("trl", {"config": {"gradient_checkpointing": False}}),
    "TRL flash": Side("trl", {"config": _TRL_BEST, "attention": "flash_attention_2"}),
    "TRL liger": Side("trl", {"config": _TRL_BEST | {"use_liger_kernel": True}}),
    "TRL compiled": Side("trl", {"config": _TRL_BEST | {"torch_compile": True}}),
}
"""``ours`` and ``TRL`` have the reference computed ahead and compute no product again.

``ours sequences`` is our model in the usual step: two sequences a pair, all logits at once. TRL's
head is fused on all its sides; ``liger`` (the package ``liger-kernel``) fuses norms and MLPs.
"""

_NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OutOfMemoryError|ALLOC_FAILED", re.I)
NAME = 100
"""Letters shown of an operation: kernels have names of many hundreds."""
KEY = ("model", "prompt", "completion", "pairs", "dtype", "steps", "side")
"""What names a record of the file."""


def key_of(record: Mapping[str, Any]) -> tuple:
    """The side, model and shape that a record is of."""
    return tuple(record[name] for name in KEY)


def read_records(file: Path | None) -> dict[tuple, dict[str, Any]]:
    """The last record of each key; a side that failed, but not for memory, is not done."""
    if file is None or not file.is_file():
        return {}
    found = {}
    for line in file.read_text().splitlines():
        record = json.loads(line)
        found[key_of(record)] = record
    return {key: record for key, record in found.items() if "failed" not in record}


def run_side(name: str, target: Target, runner: Runner, profile: Path | None) -> dict[str, Any]:
    """What a side found, or ``failed`` or ``no_memory`` with its last words."""
    side = SIDES[name]
    told = OURS | target.ours if side.library == "ours" else TRL
    start = time.perf_counter()
    try:
        found = runner.run(
            name,
            f"{side.library}_step",
            settings=dict(told | side.settings),
            profile=str(profile) if profile else None,
        )
    except SideFailed as error:
        # The system ends a process that takes too much of its memory.
        no_memory = error.status == -9 or _NO_MEMORY.search(error.words)
        found = {"no_memory" if no_memory else "failed": error.words}
    return found | {"wall_seconds": time.perf_counter() - start}


# What is shown


def table(records: Iterable[Mapping[str, Any]], shape: Shape) -> list[dict[str, Any]]:
    """A row for each side of one model and shape."""
    rows = []
    for record in records:
        row = {"side": record["side"], "wall_seconds": record["wall_seconds"]}
        if "seconds" in record:
            seconds = statistics.median(record["seconds"])
            row |= {
                "seconds": seconds,
                "tokens_per_second": shape.counted / seconds,
                "peak_bytes": record["peak_bytes"],
                "share": record["flops"] / seconds / record["rate"],
            }
        else:
            last = record.get("failed", "").strip().splitlines()[-1:]
            row["why"] = "out of memory" if "no_memory" in record else f"failed: {''.join(last)}"
        rows.append(row)
    theirs = [r["seconds"] for r in rows if r["side"].startswith("TRL") and "seconds" in r]
    for row in rows:
        if theirs and "seconds" in row:
            row["ratio_to_trl"] = min(theirs) / row["seconds"]
    return rows


def show(records: list[Mapping[str, Any]], shape: Shape) -> None:
    """Print the table of one model and shape."""
    first, done = records[0], [r for r in records if "seconds" in r]
    versions = {name: number for r in done for name, number in r["versions"].items()}
    devices = sorted({r["device"] for r in records if "device" in r})
    rates = [r["rate"] / 1e12 for r in records]
    print(
        f"\n{first['model']}, prompt {shape.prompt}, completion {shape.completion}, {shape.pairs} "
        f"pairs, {first['dtype']}: {first['flops'] / 1e12:.4g} TFLOP a step\n"
        f"{', '.join(devices)}; a large product at {min(rates):.4g} to {max(rates):.4g} TFLOP/s; "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + "\n\n| side | s a step | tokens/s | against TRL | peak GiB | share | took s |\n"
        "|---|---|---|---|---|---|---|"
    )
    for row in table(records, shape):
        if "why" in row:
            cells = [row["why"], "", "", "", ""]
        else:
            ratio = row.get("ratio_to_trl")
            cells = [
                f"{row['seconds']:.4f}", f"{row['tokens_per_second']:,.0f}",
                "-" if ratio is None else f"{ratio:.2f}", f"{row['peak_bytes'] / 2**30:.2f}",
                f"{row['share']:.1%}",
            ]  # fmt: skip
        print(f"| {' | '.join([row['side'], *cells, format(row['wall_seconds'], '.0f')])} |")
    for record in done:
        if "operations" in record:
            print(f"\nlongest operations of one step of {record['side']}")
            for found in record["operations"]:
                print(
                    f"  {found['seconds'] * 1e3:10.2f} ms in {found['calls']:5d} calls: "
                    f"{found['name'][:NAME]}"
                )


def wrong_losses(records: Iterable[Mapping[str, Any]], tolerance: float) -> list[str]:
    """Sides that compute something else; TRL's weights are its own, so are its second losses."""
    losses = {r["side"]: r["losses"] for r in records if "losses" in r}
    alike = {name for name in losses if SIDES[name].library == "ours" and SIDES[name].same_update}
    return disagreeing(losses, alike, tolerance)


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    real = [name for name in MODELS if name != "tiny"]
    add("--models", nargs="+", choices=MODELS, default=real, metavar="MODEL")
    add("--shape", nargs="+", default=["128/384", "384/128", "512/1536"], metavar="P/C")
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE")
    add("--pairs", type=int, default=8)
    add("--dtype", choices=TOLERANCES, default="bfloat16", help="of the products")
    add("--steps", type=int, default=8, help="timed ones")
    add("--warmup", type=int, default=2, help="steps before them")
    add("--learning-rate", type=float, default=1e-6)
    add("--product", type=int, default=8192, metavar="N", help="rows and columns of the large one")
    add("--minutes", type=float, default=float("inf"), help="after them no side is started")
    add("--trl", default=sys.executable, metavar="PYTHON", help="an interpreter that has TRL")
    add("--json", type=Path, metavar="FILE", help="a line for each side; those in it are done")
    add("--profile", type=Path, metavar="DIR", help="a trace of one step of each side, of ours")
    options = parser.parse_args(arguments)
    theirs = [name for name in options.sides if SIDES[name].library != "ours"]
    if options.profile and theirs:
        parser.error(
            f"--profile would be ignored for {', '.join(theirs)}: name sides of ours with --sides"
        )
    if min(options.warmup, options.steps, options.pairs, options.product) < 1:
        parser.error("--warmup, --steps, --pairs and --product are at least 1")
    options.shape = read_shapes(parser, options.shape, options.pairs)
    return options


def key_at(model: str, shape: Shape, side: str, options: argparse.Namespace) -> tuple:
    """The key that a side's record will have."""
    return (model, *shape, options.dtype, options.steps, side)


def measure(
    asked: list[tuple[str, Shape]], records: dict[tuple, dict], options: argparse.Namespace
) -> None:
    """Run what ``records`` do not have, and add it to them and to the file."""
    end, rate = time.perf_counter() + 60 * options.minutes, None
    job = JOB | {
        "dtype": options.dtype, "learning_rate": options.learning_rate,
        "warmup": options.warmup, "steps": options.steps,
    }  # fmt: skip
    pythons = {"ours": sys.executable, "trl": options.trl}
    # Each side has the device to itself. Taken as one piece it does not fall to pieces.
    variables = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    with tempfile.TemporaryDirectory(prefix="accelerator_") as folder:
        for (model, shape), name in itertools.product(asked, options.sides):
            key, target = key_at(model, shape, name, options), MODELS[model]
            label = f"{model} {shape.prompt}/{shape.completion} {name}"
            if key in records and not options.profile:
                print(f"{label}: done before")
                continue
            if time.perf_counter() > end:
                return
            given = job | target.job | shape._asdict() | {"architecture": target.architecture}
            runner = Runner(Path(folder), pythons, given, variables)
            if rate is None:
                product = [options.product] * 3
                rate = runner.run("product", "ours_rate", shapes=[product])["rate"]
            profile = options.profile and options.profile.resolve() / re.sub(r"[/ ]", "_", label)
            found = run_side(name, target, runner, profile)
            found |= dict(zip(KEY, key, strict=True))
            found |= {"rate": rate, "flops": perfect_flops(shape, target.architecture)}
            records[key] = found
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(found) + "\n")
            print(f"{label}: {found['wall_seconds']:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for and the file has not, and show all of it."""
    options = read_options(arguments)
    records, wrong, left = read_records(options.json), [], 0
    asked = list(itertools.product(options.models, options.shape))
    measure(asked, records, options)
    for model, shape in asked:
        keys = [key_at(model, shape, name, options) for name in options.sides]
        rows = [records[key] for key in keys if key in records]
        left += len(keys) - len(rows)
        if rows:
            show(rows, shape)
            wrong += wrong_losses(rows, TOLERANCES[options.dtype])
    if left:
        print(f"\n{left} sides are left: with the same --json, the same command goes on")
    if wrong:
        raise SystemExit("The sides do not compute the same:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()

"""Our DPO step and the usual one, compiled for TPUs that are not there: the compiler's figures.

    python benchmarks/tpu_step.py

Needs the TPU compiler (``pip install -e '.[plan]'``), no TPU and no weights. The usual step is the
same model code, kernels and optimizer as a trainer has it that knows no pair layout: two sequences
a pair, each with its own prompt, float32 logits of all positions at once, the frozen reference in
the step. Its half-way house, with the reference computed ahead, is shown beside it. A minute or two
for each line. A program that the compiler refuses for its size is a line that says so.

temporaries and peak are the compiler's. TFLOP are the products of the compiled program, and GB what
its fusions read and write, loops times their turns; seconds an estimate from the two for a chip of
those figures, the first if all overlaps, the second if nothing does (``spo-jax plan``). Nothing was
run. ``--json`` has the compiler's own counts too, which take the body of a loop once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shared import make_full_logits_fn
from step_sides import Shape, read_shapes

from spo_jax.config.choices import bound_loss
from spo_jax.config.validation import checked_config
from spo_jax.objective import make_objective
from spo_jax.parallel.mesh import make_mesh
from spo_jax.plan import DoesNotFit, Machine, describe_machine, memory_summary, software
from spo_jax.plan.compiled import (
    assemble,
    compile_assembled,
    make_model,
    peak_memory,
    stage_rows,
)
from spo_jax.plan.counts import count
from spo_jax.plan.estimate import roofline

ARCHITECTURES = Path(__file__).parents[1] / "configs" / "paper" / "architectures"
GIB = 2**30


class Step(NamedTuple):
    """What a line is of; ``whole``: two sequences a pair, all logits at once."""

    reference: str
    solver: str = "preference_only"
    whole: bool = False


STEPS = {
    "ours precomputed": Step("precomputed"),
    "ours + penalty": Step("precomputed", "penalty"),
    "ours online": Step("online"),
    "usual precomputed": Step("precomputed", whole=True),
    "usual online": Step("online", whole=True),
}


def compile_step(
    step: Step, architecture: Mapping[str, Any], machine: Machine, shape: Shape, remat: str
) -> dict[str, Any]:
    """What the compiler says of one step.

    Raises:
        DoesNotFit: it refuses the program for its size.
    """
    config = checked_config(
        {
            "model": {"path": "random", "compute_dtype": "bfloat16", "remat": remat},
            "data": {"train": "random.jsonl"},
            "loss": {"name": "dpo", "beta": 0.1},
            "solver": {"name": step.solver},
            "reference": {"mode": step.reference},
            "train": {"steps": 1000, "batch_size": shape.pairs},
            "mesh": {"data": 1, "fsdp": -1},
        }
    )
    mesh = make_mesh(data=1, fsdp=-1, devices=machine.devices)
    model = make_model(config, architecture, mesh)
    lengths = {"prompt_length": shape.prompt, "completion_length": shape.completion}
    rows = stage_rows(config, "preference", **lengths)
    assembled = assemble(config, model, mesh, "preference", rows)
    if step.whole:
        objective = make_objective(
            make_full_logits_fn(model), bound_loss(config.loss), reference=step.reference
        )
        assembled = assembled._replace(stage=assembled.stage._replace(objective=objective))
    compiled, text = compile_assembled(assembled)
    counts, own = count(text), compiled.cost_analysis() or {}
    found = {
        **memory_summary(compiled),
        "peak": peak_memory(compiled)[0],
        "flops": counts.products.flops,
        "opaque": counts.products.opaque,
        "traffic": counts.memory_traffic,
        "sent": sum(row.sent for row in counts.collectives),
        "compiler_loops_once": {
            name: own.get(key)
            for name, key in (
                ("flops", "flops"), ("bytes", "bytes accessed"), ("seconds", "optimal_seconds"),
            )
        },
    }  # fmt: skip
    if machine.chip is not None:
        sizes = {key: found[key] for key in ("flops", "traffic", "sent")}
        time_of = roofline(**sizes, chip=machine.chip)
        found["seconds"] = [time_of.overlapped, time_of.serial]
    return found


def line(name: str, found: Mapping[str, Any]) -> str:
    """One line of the table."""
    if "refusal" in found:
        needed, available = found["needed"], found["available"]
        of = f": {needed / GIB:.1f} of {available / GIB:.2f} GiB" if needed and available else ""
        return f"| {name} | the compiler refuses it{of} | | | | |"
    seconds = " to ".join(f"{s:.3f}" for s in found.get("seconds", ())) or "-"
    return (
        f"| {name} | {found['temporaries'] / GIB:.2f} | {found['peak'] / GIB:.2f} | "
        f"{found['flops'] / 1e12:.3g} | {found['traffic'] / 1e9:.3g} | {seconds} |"
    )


def main(arguments: list[str] | None = None) -> None:
    """Compile what the command line asks for and print a table for each machine and shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--topology", nargs="+", default=["v5e:1x1", "v6e:1x1"], metavar="NAME")
    add("--shape", nargs="+", default=["512/512", "384/128"], metavar="P/C")
    add("--pairs", type=int, default=2, help="of all chips together")
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    add("--architecture", type=Path, default=ARCHITECTURES / "qwen2.5-0.5b.json", metavar="FILE")
    add("--remat", default="full", help="none | elementwise | dots | dots_no_batch | full")
    add("--json", type=Path, metavar="FILE", help="all numbers, too")
    options = parser.parse_args(arguments)
    shapes = read_shapes(parser, options.shape, options.pairs)
    architecture = json.loads(options.architecture.read_text())
    told = ", ".join(f"{name} {number}" for name, number in software().items())
    print(f"{options.architecture.stem}, remat {options.remat}; {told}")
    records = []
    for topology in options.topology:
        machine = describe_machine(topology)
        for shape in shapes:
            print(
                f"\n{topology}, prompt {shape.prompt}, completion {shape.completion}, "
                f"{shape.pairs} pairs\n\n"
                "| step | temporaries GiB | peak GiB | TFLOP | GB | estimated s |\n"
                "|---|---|---|---|---|---|",
                flush=True,
            )
            for name in options.steps:
                start = time.perf_counter()
                try:
                    found = compile_step(STEPS[name], architecture, machine, shape, options.remat)
                except DoesNotFit as refused:
                    found = {"refusal": str(refused), "needed": refused.needed,
                             "available": refused.available}  # fmt: skip
                found["compiled_in"] = time.perf_counter() - start
                records.append({"topology": topology, **shape._asdict(), "step": name, **found})
                print(line(name, found), flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"versions": software(), "remat": options.remat, "steps": records}, indent=2)
            + "\n"
        )


if __name__ == "__main__":
    main()

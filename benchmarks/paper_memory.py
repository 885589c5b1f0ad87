"""Memory a chip needs for the paper-size studies' update, compiled for TPUs that are not there.

    python benchmarks/paper_memory.py

Needs the TPU compiler (``pip install -e '.[plan]'``), no TPU and no weights. ``spo-jax plan`` says
more about one run; this is the table for all. Each study of
``configs/paper`` is compiled at its own batch, accumulation, mesh and longest lengths, for the
hardware that its header names. A minute to some minutes each. What does not fit is said so.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import jax

from spo_jax.config.validation import checked_config
from spo_jax.plan import DoesNotFit, compile_pair_update, describe_machine, memory_summary
from spo_jax.study import read_study
from spo_jax.study.grid import run_cells

FOLDER = Path(__file__).parents[1] / "configs" / "paper"
TOPOLOGY = {"qwen2.5-0.5b": "v5e:2x4", "llama-3.2-1b": "v5e:2x4", "llama-3-8b": "v5p:2x2x1"}
"""Slices of one host: v5litepod-8, twice, and v5p-8."""
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [f"{model}-{data}" for model in TOPOLOGY for data in ("gsm8k", "ultrafeedback")]
    parser.add_argument("--only", nargs="*", default=names, choices=names, metavar="STUDY")
    parser.add_argument("--run", default="DPO + SPO", help="row of the study")
    parser.add_argument("--topology", help="another one, such as v6e:2x4")
    parser.add_argument("--accumulation", type=int, help="another train.gradient_accumulation")
    options = parser.parse_args()
    print(f"{options.run}; jax {jax.__version__}, libtpu {version('libtpu')}")
    print(
        f"{'study':>26} {'slice':>10} {'chips':>5} {'pairs':>12} {'lengths':>10} {'state':>6} "
        f"{'working':>7} {'GiB/chip':>8} {'compiled in':>11}"
    )
    for name in options.only:
        measure(name, options)


def measure(name: str, options: argparse.Namespace) -> None:
    """Print one line."""
    model = name.rsplit("-", 1)[0]
    architecture = json.loads((FOLDER / "architectures" / f"{model}.json").read_text())
    overrides = {}
    if options.accumulation:
        overrides["run.train.gradient_accumulation"] = options.accumulation
    study = read_study(FOLDER / f"{name}.yaml", overrides)
    config = checked_config(next(c.tree for c in run_cells(study) if c.row == options.run))
    topology = options.topology or TOPOLOGY[model]
    devices = describe_machine(topology).devices
    prompt, completion = config.data.prompt_buckets[-1], config.data.completion_buckets[-1]
    micro = config.train.batch_size // config.train.gradient_accumulation
    start = time.perf_counter()
    head = (
        f"{name:>26} {topology:>10} {len(devices):5d} "
        f"{f'{config.train.gradient_accumulation} x {micro}':>12} {f'{prompt}+2x{completion}':>10}"
    )
    try:
        compiled = compile_pair_update(
            config,
            architecture,
            devices=devices,
            prompt_length=prompt,
            completion_length=completion,
        )
    except DoesNotFit as error:
        print(f"{head} does not fit: {str(error).splitlines()[0][:160]}", flush=True)
        return
    memory = memory_summary(compiled)
    print(
        f"{head} {memory['arguments'] / GIB:6.2f} {memory['temporaries'] / GIB:7.2f} "
        f"{memory['total'] / GIB:8.2f} {time.perf_counter() - start:9.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()

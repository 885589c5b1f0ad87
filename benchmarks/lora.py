"""A DPO step of all weights beside those of adapters, their base in full and in 4 bits, in turns.

python benchmarks/lora.py [--model 56m smollm2-135m] [--shape 128/128] [--pairs 4] [--rank 16]
                          [--steps 5] [--param-dtype float32] [--compute-dtype float32]

Weights are drawn at random; the reference is precomputed, remat and attention are the defaults.
Tokens a second are those laid out. Memory is what the compiled step holds at most: arguments, of
which the state is given over to the next one, and temporaries. Steps alternate, after one of each;
with --steps 0 there are none.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from shared import random_rows
from step_sides import Shape, llama_config, read_shapes

from spo_jax import Execution, init_model, make_logprobs_fn, make_objective, make_preference_loss
from spo_jax.models import Lora, Model, as_base, join, make_adapters
from spo_jax.objective.adapted import OnBase, Whole, adapted_objective
from spo_jax.objective.levels import Objective
from spo_jax.solvers import make_penalty
from spo_jax.solvers.optimizers import make_optimizer
from spo_jax.training.update import init_state, jit_step, make_train_step
from spo_jax.types import BilevelBatch, Params

MODELS: dict[str, dict[str, Any]] = {
    "tiny": llama_config(256, 2, 40),
    "56m": llama_config(512, 8, 32000),
    "smollm2-135m": llama_config(576, 30, 49152, tied=True)
    | {"intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    | {"head_dim": 64},
}


class Side(NamedTuple):
    """A compiled step with its state, its last argument, and the bytes it holds at most."""

    step: Any
    state: Any
    stays: Any
    bytes: int
    trained: int


def make_side(model: Model, params: Params, lora: Lora | None, batch: BilevelBatch) -> Side:
    """SPO's DPO step (solver ``penalty``, AdamW) of all weights, or of adapters on ``params``."""
    logprobs, loss = make_logprobs_fn(model), make_preference_loss("dpo", beta=0.1)

    def bind(whole: Whole) -> Objective:
        return make_objective(lambda params, rows: logprobs(whole(params, rows), rows), loss)

    objective, trained, stays = bind(lambda params, _: params), params, None
    if lora is not None:
        objective = adapted_objective(bind, join)
        trained = make_adapters(params, lora, jax.random.key(1))
        stays = OnBase(as_base(jax.tree.map(jnp.copy, params), lora))
    optimizer, schedule = make_optimizer(
        name="adamw", steps=100, learning_rate=1e-5, schedule="constant"
    )
    solver = make_penalty(outer=optimizer)
    step = jit_step(make_train_step(objective, solver, schedule=schedule))
    key = jax.random.key_data(jax.random.key(0))
    state = jax.jit(partial(init_state, solver, objective))(trained, key)
    compiled = step.lower(state, batch, stays).compile()
    held = compiled.memory_analysis()
    peak = held.argument_size_in_bytes + held.output_size_in_bytes
    peak += held.temp_size_in_bytes - held.alias_size_in_bytes
    count = sum(x.size for x in jax.tree.leaves(trained))
    return Side(compiled, state, stays, peak, count)


def measure(name: str, shape: Shape, options: argparse.Namespace) -> None:
    """Print both sides of one model."""
    execution = Execution(param_dtype=options.param_dtype, compute_dtype=options.compute_dtype)
    model = init_model(MODELS[name], execution)
    rows = random_rows(
        shape.pairs,
        shape.prompt,
        shape.completion,
        branches=2,
        vocabulary=model.config.vocab_size,
    )
    batch = BilevelBatch(preference=rows)
    params = model.init(jax.random.key(0))
    lora = Lora(options.rank, 2.0 * options.rank, ("*_proj",))
    adapted = {"all weights": None, f"rank {options.rank}": lora}
    adapted |= {f"rank {options.rank}, nf4": replace(lora, quantize="nf4")}
    sides = {side: make_side(model, params, of, batch) for side, of in adapted.items()}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(options.steps and options.steps + 1):
        for side, found in sides.items():
            begun = time.perf_counter()
            state, metrics = jax.block_until_ready(found.step(found.state, batch, found.stays))
            seconds[side].append(time.perf_counter() - begun)
            assert jnp.isfinite(metrics["loss"])
            sides[side] = found._replace(state=state)
    device = jax.devices()[0].device_kind
    print(f"{name}, {shape.prompt}/{shape.completion}, {shape.pairs} pairs, {device}")
    whole = next(iter(sides.values())).bytes
    for side, found in sides.items():
        line = f"  {side:>14}: {found.trained:>12,} trained  {found.bytes / 2**20:8.0f} MiB "
        line += f"({found.bytes / whole:.2f})"
        if options.steps:
            first, middle = (statistics.median(seconds[s][1:]) for s in (next(iter(sides)), side))
            line += f"  {shape.computed / middle:8.0f} tokens/s (time {middle / first:.2f})"
        print(line)


def main(words: Sequence[str] | None = None) -> None:
    """Measure the models that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), default=list(MODELS)[1:])
    parser.add_argument("--shape", nargs="+", default=["128/128"])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--param-dtype", default="float32")
    parser.add_argument("--compute-dtype", default="float32")
    options = parser.parse_args(words)
    for shape in read_shapes(parser, options.shape, options.pairs):
        for name in options.model:
            measure(name, shape, options)


if __name__ == "__main__":
    main()

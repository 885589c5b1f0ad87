"""Step time and peak memory of each solver relative to ``preference_only``, interleaved in one run.

    python benchmarks/solvers.py

A Llama of 56 million parameters (hidden 512, 8 layers, 8 heads over 4 kv heads, intermediate
1408, vocabulary 32,000), 4 pairs of prompt 128 and completion 384, float32, AdamW, random
weights. A step is the first of its run: that of ``max_level`` measures, as one in ten does, and
the draw of ``random_level`` is that of its seed. Every solver takes the same pairs; those with
SFT data of their own, or validation rows, also 4 rows of the same lengths. The seconds are medians
of ratios within one round, so that a noisy machine disturbs them little; the memory is what the
compiler reports for the step: arguments, results that do not reuse them, and temporaries.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import jax
import numpy as np
import optax
from shared import make_llama, random_rows

from spo_jax import (
    BilevelBatch,
    init_state,
    jit_step,
    make_logprobs_fn,
    make_objective,
    make_preference_loss,
    make_solver,
    make_train_step,
)

VOCABULARY = 32000
SIDES = {
    "preference_only": ("chosen", {}),
    "penalty": ("chosen", {}),
    "penalty, squared hinge": ("chosen", {"penalty": "squared_hinge"}),
    "penalty, hinge, tracked": ("chosen", {"penalty": "hinge"}),
    "primal_dual": ("chosen", {}),
    "primal_dual, validation rows": ("chosen", {"form": "lagrangian"}),
    "primal_dual, validation rows, tracked": ("chosen", {"form": "lagrangian"}),
    "dynamic_barrier": ("chosen", {}),
    "projected": ("chosen", {}),
    "random_level, F drawn": ("chosen", {"seed": 2}),
    "random_level, g drawn": ("chosen", {"seed": 1}),
    "max_level": ("chosen", {}),
    "alternating": ("chosen", {}),
    "unrolled_first_order": ("chosen", {}),
    "unrolled": ("chosen", {}),
    "penalty, SFT data": ("sft", {}),
    "primal_dual, SFT data": ("sft", {}),
    "dynamic_barrier, SFT data": ("sft", {}),
    "projected, SFT data": ("sft", {}),
    "random_level, F drawn, SFT data": ("sft", {"seed": 2}),
    "random_level, g drawn, SFT data": ("sft", {"seed": 1}),
    "max_level, SFT data": ("sft", {}),
}
FORWARD = "forward pass alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--completion", type=int, default=384, help="tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--remat", default="elementwise", help="none | elementwise | dots | dots_no_batch | full"
    )
    parser.add_argument("--only", nargs="*", help="solvers beside preference_only")
    options = parser.parse_args()
    model = make_llama(
        options.hidden, options.layers, vocabulary=VOCABULARY, tied=False, remat=options.remat
    )
    params = model.init(jax.random.key(0))
    millions = sum(x.size for x in jax.tree.leaves(params)) / 1e6
    print(f"{millions:.1f} M parameters, jax {jax.__version__}, {jax.devices()[0].platform}")
    logprobs = make_logprobs_fn(model, chunk_tokens=512)
    sides = {n: s for n, s in SIDES.items() if not options.only or n in options.only}
    sides = {"preference_only": SIDES["preference_only"], **sides}

    key = np.asarray(jax.random.key_data(jax.random.key(0)))
    problems = {name: make_problem(name, *side, logprobs) for name, side in sides.items()}
    sizes = (options.pairs, options.prompt, options.completion)
    pairs, rows = (random_rows(*sizes, branches=n, vocabulary=VOCABULARY) for n in (2, 1))
    batches = {False: BilevelBatch(pairs), True: BilevelBatch(pairs, rows)}
    compiled, memory = {}, {}
    for name, (step, init) in problems.items():
        batch = batches[has_rows(name)]
        compiled[name] = jit_step(step).lower(jax.eval_shape(init, params, key), batch).compile()
        found = compiled[name].memory_analysis()
        memory[name] = (
            found.argument_size_in_bytes + found.output_size_in_bytes
            - found.alias_size_in_bytes + found.temp_size_in_bytes
        )  # fmt: skip
        print(f"compiled {name}", flush=True)

    objective = make_objective(logprobs, make_preference_loss("dpo", beta=0.1))
    forward = jax.jit(lambda p, b: objective.levels(objective.init()).both(p, b)[0])
    seconds: dict[str, list[float]] = {name: [] for name in (FORWARD, *sides)}
    for number in range(options.rounds + 1):
        for name in seconds:
            batch = batches[has_rows(name)]
            if name == FORWARD:
                run = partial(forward, params)
            else:
                # Made anew and dropped: one train state is in memory at a time.
                state = jax.block_until_ready(jax.jit(problems[name][1])(params, key))
                run = partial(compiled[name], state)
            start = time.perf_counter()
            jax.block_until_ready(run(batch))
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
            state = run = None
    base = seconds["preference_only"]
    print(f"{'solver':>38} {'s/step':>8} {'time':>7} {'lowest':>7} {'GB':>6} {'memory':>7}")
    for name, found in seconds.items():
        ratios = [mine / plain for mine, plain in zip(found, base, strict=True)]
        held = memory.get(name)
        print(
            f"{name:>38} {statistics.median(found):8.2f} {statistics.median(ratios):6.2f}x "
            f"{min(found) / min(base):6.2f}x"
            + (f" {held / 1e9:6.2f} {held / memory['preference_only']:6.2f}x" if held else "")
        )
    passed = [1 - f / p for f, p in zip(seconds[FORWARD], base, strict=True)]
    tokens = options.prompt + 2 * options.completion
    share = (options.prompt + options.completion) / tokens
    print(
        "time: median ratio within a round; lowest: ratio of the fastest steps.\n"
        f"One more backward pass of the pairs: {1 + statistics.median(passed):.2f}x. "
        f"SFT rows bring {100 * share:.0f} % more tokens: {1 + share:.2f}x."
    )


def has_rows(name: str) -> bool:
    """Whether an update of a side has SFT rows beside its pairs."""
    return "SFT" in name or "validation" in name


def make_problem(name: str, inner_data: str, extra: dict, logprobs):
    """The update of one solver and ``(params, key) -> state``."""
    loss = make_preference_loss("dpo", beta=0.1)
    chains = {"outer": optax.adamw(1e-6), "inner": optax.sgd(1e-3)}
    tracked = {"inner_value": "tracked", "inner": chains["inner"], "tracked_steps": 1}
    options = tracked if "tracked" in name else {}
    options = {**options, "validation_rows": "validation" in name}
    objective = make_objective(logprobs, loss, inner_data=inner_data, **options)
    solver = make_solver(name.split(",")[0], **chains, **extra)
    step = make_train_step(objective, solver, schedule=optax.constant_schedule(1e-6))
    return step, partial(init_state, solver, objective)


if __name__ == "__main__":
    main()

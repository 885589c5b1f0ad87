"""What a token costs in large batches and in long rows: one DPO step, interleaved in one run.

    python benchmarks/linear_cost.py --picture linear_cost.png

Batches of 1 to 64 pairs are taken one pair at a time (gradient accumulation), rows of 256 to 4,096
tokens one a batch. Two parts of a step are not the tokens' own: its passes over all weights
(optimizer, norms, a sum of gradients for each pair), which a step of as many pairs of 8 tokens
shows, and attention, which grows with the square of a row: the same step is measured with a sum in
its place. Both are taken off; the table has both numbers. Seconds are the least of some repeats.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure
from shared import make_llama, random_rows

from spo_jax import (
    BilevelBatch,
    Model,
    init_state,
    jit_step,
    make_logprobs_fn,
    make_objective,
    make_penalty,
    make_preference_loss,
    make_train_step,
)
from spo_jax.models.attention import BranchAttention
from spo_jax.report.style import COLOURS, FAINT_INK, INK, figure_style, figure_to_png

VOCABULARY = 8192


class Case(NamedTuple):
    """A batch: pairs, and tokens of one pair's row (half of them prompt)."""

    pairs: int
    tokens: int

    @property
    def prompt(self) -> int:
        return self.tokens // 2

    @property
    def completion(self) -> int:
        return self.tokens // 4


class Cost(NamedTuple):
    """Seconds of a step, of one without attention, and of the passes over the weights."""

    step: float
    without: float
    weights: float

    def per_token(self, case: Case) -> tuple[float, float]:
        """Microseconds a token: of the whole step, and without attention and weights."""
        tokens = case.pairs * case.tokens
        return 1e6 * self.step / tokens, 1e6 * (self.without - self.weights) / tokens


def make_step(model: Model, case: Case, *, attention: bool = True) -> Callable[[], Any]:
    """One DPO + SPO update of AdamW, from its state to the next."""
    logprobs = make_logprobs_fn(model)
    loss = make_preference_loss("dpo", beta=0.1)
    objective = make_objective(logprobs, loss, micro_batches=case.pairs)
    solver = make_penalty(outer=optax.adamw(1e-6))
    step = jit_step(make_train_step(objective, solver, schedule=optax.constant_schedule(1e-6)))
    state = init_state(solver, objective, model.init(jax.random.key(0)), jax.random.PRNGKey(0))
    rows = random_rows(case.pairs, case.prompt, case.completion, branches=2, vocabulary=VOCABULARY)
    kept = [state]

    def run():
        with nullcontext() if attention else without_attention():  # traced in the first call
            kept[0], metrics = step(kept[0], BilevelBatch(rows, None))
        return metrics["loss"]

    return run


@contextmanager
def without_attention() -> Iterator[None]:
    """What is traced inside adds keys and values to their queries, token by token, instead."""

    def add(self, q, k, v, window, cached, cap=None):
        groups = q.shape[2] // k.shape[2]
        return q + jnp.repeat(k + v, groups, axis=2), None

    with mock.patch.object(BranchAttention, "attend", add):
        yield


def least_seconds(runs: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[Any, float]:
    """The least seconds of each run, one after the other, ``repeats`` times; the first is thrown
    away."""
    found: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            found[name].append(time.perf_counter() - start)
    return {name: min(seconds[1:]) for name, seconds in found.items()}


def measure(model: Model, cases: list[Case], repeats: int) -> dict[Case, Cost]:
    """The cost of every case."""
    runs: dict[Any, Callable[[], Any]] = {
        ("weights", pairs): make_step(model, Case(pairs, 8)) for pairs in {c.pairs for c in cases}
    }
    for case in cases:
        runs["step", case] = make_step(model, case)
        runs["without", case] = make_step(model, case, attention=False)
    seconds = least_seconds(runs, repeats)
    return {
        case: Cost(seconds["step", case], seconds["without", case], seconds["weights", case.pairs])
        for case in cases
    }


def draw(series: Mapping[str, dict[Case, Cost]], picture: Path) -> None:
    """Microseconds a token over pairs and over tokens; the grey band is 10 % around the mean."""
    with figure_style():
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        panels = figure.subplots(1, len(series), sharey=True)
        for axes, (label, costs) in zip(panels, series.items(), strict=True):
            places = [c.pairs if label.startswith("pairs") else c.tokens for c in costs]
            whole, own = zip(*(cost.per_token(case) for case, cost in costs.items()), strict=True)
            mean = sum(own) / len(own)
            axes.axhspan(0.9 * mean, 1.1 * mean, color=FAINT_INK, alpha=0.2, lw=0)
            axes.plot(
                places,
                own,
                "o-",
                color=COLOURS[0],
                label="without attention and the passes over weights",
            )
            axes.plot(places, whole, "s--", color=COLOURS[1], label="whole step")
            axes.set_xscale("log", base=2)
            axes.set_xticks(places, [f"{place:,}" for place in places])
            axes.set_xlabel(label, color=INK)
        panels[0].set_ylim(0, 1.05 * max(axes.dataLim.y1 for axes in panels))
        panels[0].set_ylabel("microseconds a token")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        picture.write_bytes(figure_to_png(figure))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--picture", type=Path, help="where to write a PNG")
    options = parser.parse_args(arguments)
    model = make_llama(options.hidden, options.layers, vocabulary=VOCABULARY, tied=True)
    series = {
        "pairs of 256 tokens, one at a time": [Case(pairs, 256) for pairs in options.pairs],
        "tokens of one row": [Case(1, tokens) for tokens in options.tokens],
    }
    found = {label: measure(model, cases, options.repeats) for label, cases in series.items()}
    print("| pairs | tokens a row | s a step | us a token | without attention and weights |")
    print("|---|---|---|---|---|")
    for costs in found.values():
        for case, cost in costs.items():
            whole, own = cost.per_token(case)
            print(f"| {case.pairs} | {case.tokens} | {cost.step:.3f} | {whole:.0f} | {own:.0f} |")
    for label, costs in found.items():
        own = [cost.per_token(case)[1] for case, cost in costs.items()]
        print(f"{label}: from {min(own):.0f} to {max(own):.0f} us, {max(own) / min(own):.2f}x")
    if options.picture is not None:
        draw(found, options.picture)
        print(options.picture)


if __name__ == "__main__":
    main()

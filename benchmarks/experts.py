"""The MLPs of a layer's experts and their gradients: those that are picked, beside every expert.

    python benchmarks/experts.py [--tokens 2048] [--steps 5]

Widths are a quarter and an eighth of those of Qwen3-30B-A3B and Mixtral 8x7B, numbers of experts
theirs. Choices are drawn evenly. Both run in turns; milliseconds are the least of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spo_jax.models.experts import Matrices, every_expert, picked_experts


class Sizes(NamedTuple):
    """Of a layer: experts, those of a token, and the widths of the model and of an expert."""

    experts: int
    picked: int
    model: int
    wide: int


LAYERS = {"qwen3-moe": Sizes(128, 8, 512, 192), "mixtral": Sizes(8, 2, 512, 1792)}


def milliseconds(sizes: Sizes, tokens: int, steps: int, dtype: str) -> dict[str, float]:
    """Of the outputs and all gradients, by each way."""
    keys = jax.random.split(jax.random.key(0), 5)
    e, k, d, f = sizes
    x = jax.random.normal(keys[0], (1, tokens, d), dtype)
    chances = jax.nn.softmax(jax.random.normal(keys[1], (1, tokens, e)))
    shares, picked = jax.lax.top_k(chances, k)
    shapes = (e, d, f), (e, d, f), (e, f, d)
    drawn = [0.05 * jax.random.normal(key, s) for key, s in zip(keys[2:], shapes, strict=True)]
    given = x, shares, Matrices(*drawn), picked

    def loss(function, *given):
        return jnp.sum(function(*given, activation=jax.nn.silu) ** 2)

    ways = {
        function.__name__: jax.jit(jax.grad(partial(loss, function), (0, 1, 2)))
        for function in (picked_experts, every_expert)
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(steps + 1):  # the first one compiles
        for name, way in ways.items():
            begun = time.perf_counter()
            jax.block_until_ready(way(*given))
            found[name].append(1e3 * (time.perf_counter() - begun))
    return {name: min(times[1:]) for name, times in found.items()}


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print a line for each layer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a batch")
    parser.add_argument("--steps", type=int, default=5, help="of each way, after one that compiles")
    parser.add_argument("--dtype", default="float32", help="of the products")
    options = parser.parse_args(words)
    print(
        f"{jax.default_backend()}, jax {jax.__version__}, {options.tokens} tokens, {options.dtype}"
    )
    for name in options.layers:
        sizes = LAYERS[name]
        took = milliseconds(sizes, options.tokens, options.steps, options.dtype)
        ratio = took["every_expert"] / took["picked_experts"]
        ways = ", ".join(f"{way} {ms:.0f} ms" for way, ms in took.items())
        print(f"{name} ({sizes.picked} of {sizes.experts}): {ways}: {ratio:.1f} times as fast")


if __name__ == "__main__":
    main()

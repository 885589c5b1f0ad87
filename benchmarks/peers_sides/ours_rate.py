"""Multiplications and additions a second of the machine, in products of the model's own shapes."""

from __future__ import annotations

import math
import time

import jax
import jax.numpy as jnp
import measure

REPEATS = 4
LONG_ENOUGH = 0.05
"""Seconds of products in a row: what it takes to start one and to wait for it is little then."""


def best_seconds(rows: int, inner: int, columns: int, dtype: str) -> float:
    """Of one product ``[rows, inner] x [inner, columns]``, compiled; the best of a few means."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, [(rows, inner), (inner, columns)], strict=True)
    )
    product = jax.jit(jnp.dot)
    jax.block_until_ready(product(a, b))

    def mean(products: int) -> float:
        start = time.perf_counter()
        for _ in range(products):
            result = product(a, b)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / products

    products = math.ceil(LONG_ENOUGH / mean(1))
    return min(mean(products) for _ in range(REPEATS))


job = measure.read_job()
shapes = [tuple(shape) for shape in job.shapes]
seconds = [best_seconds(*shape, job.dtype) for shape in shapes]
flops = [2 * rows * inner * columns for rows, inner, columns in shapes]
products = [
    {"shape": shape, "flops_a_second": n / s}
    for shape, n, s in zip(shapes, flops, seconds, strict=True)
]
device = jax.devices()[0].device_kind
measure.write_result(job, "jax", device=device, rate=sum(flops) / sum(seconds), products=products)

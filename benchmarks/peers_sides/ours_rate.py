"""Multiplications and additions a second of the machine, in products of the model's own shapes."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import measure

REPEATS = 4


def best_seconds(rows: int, inner: int, columns: int, dtype: str) -> float:
    """Of one product ``[rows, inner] x [inner, columns]``, compiled; the best of a few."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, [(rows, inner), (inner, columns)], strict=True)
    )
    product = jax.jit(jnp.dot)
    jax.block_until_ready(product(a, b))
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(product(a, b))
        found.append(time.perf_counter() - start)
    return min(found)


job = measure.read_job()
shapes = [tuple(shape) for shape in job.shapes]
seconds = [best_seconds(*shape, job.dtype) for shape in shapes]
flops = [2 * rows * inner * columns for rows, inner, columns in shapes]
products = [
    {"shape": shape, "flops_a_second": n / s}
    for shape, n, s in zip(shapes, flops, seconds, strict=True)
]
measure.write_result(job, "jax", rate=sum(flops) / sum(seconds), products=products)

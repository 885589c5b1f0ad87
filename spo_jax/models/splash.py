"""Attention on TPU: JAX's stock Pallas kernel, fitted to our layout, lengths and mesh.

The kernel ("splash": flash attention that visits only the blocks its static mask needs) is
``jax.experimental.pallas.ops.tpu.splash_attention``. Scores never exist beyond one block, and
blocks above the diagonal, or left of a window, are never visited. After Dao et al.,
arXiv 2205.14135.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from spo_jax.parallel.constraints import ROWS, parts

BLOCKS = (512, 256, 128)
"""Sides of a block of scores, from the one to take if little padding comes of it."""

MAX_PADDING = 1 / 8
"""Share of a length that may be padding for a larger block; the smallest is taken anyway."""


def splash_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    segment_ids: Int[Array, "B T"],
    window: int | None,
    *,
    mesh: Mesh | None,
    interpret: bool,
) -> Float[Array, "B T H d"]:
    """Causal attention within segments by the splash kernel; segment 0 is padding and gives 0.

    On a ``mesh`` each device runs the kernel on its rows, cut over ``data`` and ``fsdp``, and
    its heads, cut over ``tensor``: a Pallas kernel is opaque to the partitioner, which would
    gather its operands. Key/value heads that ``tensor`` does not divide are repeated until it
    does; query heads or rows that do not divide are not cut. ``interpret`` runs the kernel
    as ordinary operations, where there is no TPU.
    """
    one = functools.partial(_attend, window=window, interpret=interpret)
    if mesh is None or mesh.size == 1:
        return one(q, k, v, segment_ids)
    rows = ROWS if q.shape[0] % parts(ROWS, mesh) == 0 else None
    heads = "tensor" if q.shape[2] % mesh.shape["tensor"] == 0 else None
    if heads is not None:
        repeats = _repeats(q.shape[2], k.shape[2], mesh.shape["tensor"])
        k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    cut = P(rows, None, heads, None)
    return jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(cut, cut, cut, P(rows, None)),
        out_specs=cut,
        # A Pallas call does not say over which axes its results vary.
        check_vma=False,
    )(q, k, v, segment_ids)


def _repeats(heads: int, kv_heads: int, tensor: int) -> int:
    """The least number of copies of a key/value head with which ``tensor`` divides all.

    Query head ``i`` still finds its own: copies lie side by side, and ``heads`` stay divisible.
    """
    group = heads // kv_heads
    return next(r for r in range(1, group + 1) if group % r == 0 and kv_heads * r % tensor == 0)


def _attend(q, k, v, segment_ids, *, window: int | None, interpret: bool):
    """The kernel on one device's rows and heads."""
    length, heads, width = q.shape[1:]
    block, padding = block_and_padding(length)
    # Whatever stands in padding (0 times NaN is NaN) must reach neither outputs nor gradients.
    real = segment_ids[..., None, None] > 0
    scaled = q.astype(jnp.float32) * width**-0.5
    q, k, v = (jnp.where(real, x, 0) for x in (scaled.astype(q.dtype), k, v))
    tail = [(0, 0), (0, padding)]
    segment_ids = jnp.pad(segment_ids, tail)
    q, k, v = (
        jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), *tail, (0, 0)])
        if padding
        else jnp.swapaxes(x, 1, 2)
        for x in (q, k, v)
    )
    kernel = _kernel(heads, length + padding, block, window, interpret)
    out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment_ids, segment_ids))
    return jnp.swapaxes(out, 1, 2)[:, :length]


def block_and_padding(length: int) -> tuple[int, int]:
    """The side of a block for sequences of ``length``, and the tokens that fill the last one."""
    for block in BLOCKS:
        padding = -length % block
        if padding <= MAX_PADDING * length or block == BLOCKS[-1]:
            return block, padding
    raise AssertionError("unreachable: the smallest block is always taken")


def _kernel(heads: int, length: int, block: int, window: int | None, interpret: bool):
    """The kernel with its static mask: causal, and of a window where there is one."""
    shape = (length, length)
    if window is None:
        mask = masks.CausalMask(shape)
    else:
        mask = masks.LocalMask(shape, (window - 1, 0), offset=0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

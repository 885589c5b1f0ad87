"""Attention over the pair layout a block of queries at a time: no score matrix is ever whole.

On a processor without a fused kernel, memory traffic costs more than arithmetic. Each block of
queries meets only the keys that it may see (causality halves the products, and the prompt is
computed once for all completions), and its scores are computed again in the backward pass
instead of being kept: FlashAttention's trade (Dao et al., arXiv 2205.14135) in ordinary operations,
which can be differentiated any number of times.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

BLOCK = 128
"""Queries in a block; more where a sequence would have more than ``MOST_BLOCKS``."""
MOST_BLOCKS = 16


class _Block(NamedTuple):
    """Queries ``[start, stop)`` of a branch, and the first key they see, by place in the branch."""

    branch: int
    start: int
    stop: int
    first: int

    def keys(self, prompt: int, completion: int) -> list[tuple[int, int]]:
        """Where its keys begin and end in packed order: the prompt's, then the branch's own."""
        ahead = self.branch * completion
        own = (max(self.first, prompt) + ahead, self.stop + ahead)
        parts = [(self.first, min(self.stop, prompt)), own]
        return [part for part in parts if part[0] < part[1]]


class _Pieces:
    """Keys or values, cut once at ``cuts``; what lies between two of them is joined again.

    Slices would each have a gradient as long as the array, padded with zeros; a piece's is as
    long as the piece.
    """

    def __init__(self, x: Any, cuts: Iterable[int]):
        starts = sorted({0, x.shape[2], *cuts})
        sizes = [stop - start for start, stop in itertools.pairwise(starts)]
        self.by_start = dict(zip(starts[:-1], jax.lax.split(x, sizes, axis=2), strict=True))

    def between(self, parts: Iterable[tuple[int, int]]) -> Any:
        """``parts`` are ``(start, stop)``, both among the cuts."""
        found = [
            piece
            for start, stop in parts
            for place, piece in self.by_start.items()
            if start <= place < stop
        ]
        return jnp.concatenate(found, axis=2)


def _blocks(prompt: int, branches: int, completion: int, window: Any) -> Iterator[_Block]:
    """The prompt's blocks (branch 0), then each branch's, in packed order."""
    size = max(BLOCK, -(-(prompt + completion) // MOST_BLOCKS))
    sees = window if isinstance(window, int) else prompt + completion
    parts = [(0, 0, prompt), *((b, prompt, prompt + completion) for b in range(branches))]
    for branch, begin, end in parts:
        for start in range(begin, end, size):
            yield _Block(branch, start, min(start + size, end), max(0, start - sees + 1))


def capped(x: Any, cap: float | None) -> Any:
    """``cap tanh(x / cap)``: about ``x`` where it is small, never beyond ``cap``."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def blocked_attention(
    q: Float[Array, "B packed H d"],
    k: Float[Array, "B packed K d"],
    v: Float[Array, "B packed K d"],
    segment_ids: Shaped[Array, "B #n T"],
    positions: Int[Array, "B n T"] | None,
    layout: tuple[int, int, int],
    window: Any,
    cap: float | None = None,
) -> Float[Array, "B packed H d"]:
    """Causal attention of prompts and of completions that each continue the prompt.

    ``layout`` is ``attention.Layout``; ``segment_ids`` and ``positions`` are by place in a branch,
    ids of one branch stand for all. A token sees tokens of its own segment only. ``window`` is as
    in ``attention.Window``, counted in ``positions`` where they are given, else in places. Scores
    are held within ``cap``.
    """
    prompt, branches, completion = layout
    batch, packed, heads, width = q.shape
    groups = k.shape[2]
    dtype = q.dtype
    if dtype == jnp.float16:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    q = q.reshape(batch, packed, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))

    def seen(block: _Block) -> Any:
        """Whether a query of the block sees a key of ``keys_of``."""
        ids = segment_ids[:, min(block.branch, segment_ids.shape[1] - 1)]
        mask = ids[:, block.start : block.stop, None] == ids[:, None, block.first : block.stop]
        mask &= _behind(block, static_window)
        if positions is None or window is None:
            return mask
        place = positions[:, block.branch]
        query, key = place[:, block.start : block.stop], place[:, block.first : block.stop]
        return mask & (query[:, :, None] - key[:, None] < window)

    @jax.checkpoint
    def attend(q, k, v, mask):
        scores = jnp.einsum("bkgqd,bktd->bkgqt", q, k, preferred_element_type=jnp.float32)
        scores = capped(scores * width**-0.5, cap)
        scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bkgqt,bktd->bkgqd", weights, v)

    # Counted in positions, a window leaves out keys in places that only the batch tells.
    static_window = window if positions is None else None
    blocks = list(_blocks(prompt, branches, completion, static_window))
    queries = jax.lax.split(q, [block.stop - block.start for block in blocks], axis=3)
    places = [block.keys(prompt, completion) for block in blocks]
    cuts = [cut for parts in places for part in parts for cut in part]
    keys, values = _Pieces(k, cuts), _Pieces(v, cuts)
    found = [
        attend(asking, keys.between(parts), values.between(parts), seen(block))
        for block, asking, parts in zip(blocks, queries, places, strict=True)
    ]
    out = jnp.concatenate(found, axis=3).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, packed, heads, width).astype(dtype)


def _behind(block: _Block, window: Any) -> Any:
    query = np.arange(block.start, block.stop)[:, None]
    key = np.arange(block.first, block.stop)[None]
    seen = key <= query
    return seen if window is None else seen & (query - key < window)

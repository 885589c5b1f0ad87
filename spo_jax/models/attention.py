"""Attention over the pair layout: the branch view, the kernels, and a layer's contexts.

A decoder layer hands its queries, keys and values to a *context*, a small pytree that
knows what they may look at: both branches of a preference row (``BranchAttention``), a
prompt whose keys and values are kept (``PrefillAttention``), or a cache
(``CachedAttention``). The layer itself never learns which of the three it runs in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from spo_jax.models.blocked import blocked_attention, capped
from spo_jax.models.few_rows import few_rows_sum
from spo_jax.models.second_order import with_second_derivative
from spo_jax.parallel.constraints import platform

Window: TypeAlias = Int[Array, ""] | int | None
"""How many tokens a query sees, itself included; ``None`` for all earlier ones."""

ATTENDED = "attended"
"""The name of what attention hands on: rematerialization may save it."""

WIDEST_HEAD = 128
"""What cuDNN's kernel takes on every card, if it is a multiple of 8; on newer ones it takes 256."""

NO_WINDOW = 2**30
"""A window no sequence reaches: full attention where windows are an array over layers."""


class Layout(NamedTuple):
    """Static lengths of ``[prompt | completion 0 | completion 1 | ...]`` on one token axis."""

    prompt: int
    branches: int
    completion: int


def split_branches(
    packed: Shaped[Array, "B packed ..."], layout: Layout
) -> Shaped[Array, "Bn T ..."]:
    """View ``[B, P + n*C, ...]`` as ``[B*n, P+C, ...]``, the prompt repeated for each branch.

    Merged batch-major, so that a batch sharded over devices stays where it is.
    """
    P, n, C = layout
    if n == 1:
        return packed
    B, rest = packed.shape[0], packed.shape[2:]
    prompt = jnp.broadcast_to(packed[:, None, :P], (B, n, P, *rest))
    completions = packed[:, P:].reshape(B, n, C, *rest)
    return jnp.concatenate([prompt, completions], axis=2).reshape(B * n, P + C, *rest)


def merge_branches(
    branches: Shaped[Array, "Bn T ..."], layout: Layout
) -> Shaped[Array, "B packed ..."]:
    """Undo ``split_branches``; the prompt, equal in all branches, is taken from branch 0."""
    P, n, C = layout
    if n == 1:
        return branches
    rest = branches.shape[2:]
    view = branches.reshape(-1, n, P + C, *rest)
    completions = view[:, :, P:].reshape(-1, n * C, *rest)
    return jnp.concatenate([view[:, 0, :P], completions], axis=1)


Kernel: TypeAlias = Callable[..., Any]
"""``(q [B,T,H,d], k [B,T,K,d], v [B,T,K,d], segment_ids [B,T], window) -> [B,T,H,d]``, causal.

``xla_attention`` and ``cudnn_attention`` also take ``positions [B,T]`` for ``window`` to count in.
"""


def xla_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    segment_ids: Int[Array, "B T"],
    window: Window,
    positions: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H d"]:
    """Causal attention within segments, written in XLA operations; runs everywhere."""
    mask = segment_ids[:, :, None] == segment_ids[:, None, :]
    if window is not None:
        mask &= _within(q.shape[1], window, positions)
    dtype = q.dtype
    if dtype == jnp.float16:
        # XLA's 16-bit kernel asks for a dot product that CPU and TPU do not have.
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask[:, None], is_causal=True, implementation="xla"
    ).astype(dtype)


def cudnn_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    segment_ids: Int[Array, "B T"],
    window: Window,
    positions: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H d"]:
    """Causal attention within segments by cuDNN's flash kernel; 16-bit inputs on NVIDIA GPUs."""
    length = q.shape[1]
    if length % 2:  # in training the kernel takes even lengths: one token more, seen by none
        q, k, v = (jnp.pad(x, [(0, 0), (0, 1), (0, 0), (0, 0)]) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, [(0, 0), (0, 1)], constant_values=-1)
        positions = None if positions is None else jnp.pad(positions, [(0, 0), (0, 1)])
    mask = segment_ids[:, :, None] == segment_ids[:, None, :]
    local = None
    if isinstance(window, int) and positions is None:
        local = (window - 1, 0)  # left, right: cuDNN skips what lies outside a static window
    elif window is not None:
        mask &= _within(q.shape[1], window, positions)

    def by(implementation):
        def attention(q, k, v, mask, local):
            return jax.nn.dot_product_attention(
                q, k, v, mask=mask, is_causal=True, local_window_size=local,
                implementation=implementation,
            )  # fmt: skip

        return attention

    attention = with_second_derivative(by("cudnn"), by("xla"), ATTENDED)
    return attention(q, k, v, mask[:, None], local)[:, :length]


KERNELS = ("xla", "blocked", "cudnn", "splash")
"""What ``Execution.attention`` may name, beside ``auto``."""


def in_blocks(name: str, mesh: Mesh | None, cap: float | None = None) -> bool:
    """Whether attention called ``name`` is ``blocked_attention``.

    ``auto`` is on a CPU, and everywhere if scores have a ``cap``, which no other knows.
    """
    return name == "blocked" or (name == "auto" and (cap is not None or platform(mesh) == "cpu"))


def choose_kernel(
    name: str,
    dtype: Any,
    head_dim: int,
    length: int,
    window: Window,
    mesh: Mesh | None,
    *,
    packed: bool = False,
) -> Kernel:
    """Return the kernel called ``name``; ``auto`` takes the platform's own where it serves.

    That is cuDNN on GPU and splash on TPU, XLA where these do not serve. The platform is that of
    the devices of ``mesh``, which may be described and not there. ``blocked_attention`` knows the
    pair layout and is no kernel: see ``in_blocks``. In ``packed`` rows a window is counted in
    positions.

    Raises:
        ValueError: ``splash`` for windows that differ from layer to layer, or in packed rows, or
            on a GPU.
    """
    backend = platform(mesh)
    static = window is None or (isinstance(window, int) and not packed)
    if name == "auto":
        serves = jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= WIDEST_HEAD
        if backend == "gpu" and serves:
            return cudnn_attention
        if backend != "tpu" or not static or dtype == jnp.float16:
            return xla_attention
    elif name != "splash":
        return {"xla": xla_attention, "cudnn": cudnn_attention}[name]
    # Where it does not run it is not imported: Pallas is slow to.
    from spo_jax.models.splash import BLOCKS, splash_attention

    if name == "auto" and length < BLOCKS[-1]:
        return xla_attention
    if not static:
        raise ValueError(
            "attention='splash' with sliding windows in some layers only, or in packed rows: its "
            "mask is compiled in, and layers and rows share one program; use attention='auto' or "
            "'xla', or no packing"
        )
    if backend not in ("tpu", "cpu"):
        raise ValueError(
            f"attention='splash' on {backend}: it is a TPU kernel; use attention='auto' or 'cudnn'"
        )
    splash = functools.partial(splash_attention, mesh=mesh, interpret=backend != "tpu")
    return with_second_derivative(splash, xla_attention, ATTENDED)


def _within(length: int, window: Window, positions: Any) -> Bool[Array, "#B T T"]:
    index = jnp.arange(length)[None] if positions is None else positions
    return index[:, :, None] - index[:, None, :] < window


class BranchAttention(flax.struct.PyTreeNode):
    """Each branch attends to its prompt and to itself, never to another branch.

    ``segment_ids`` of the ``[B*n, P+C]`` view: 1 for tokens, 0 for prompt padding, which
    attends to itself only, so that no softmax row is empty. Packed rows have examples 1, 2, ...,
    0 for all padding, and ``positions``, in which windows are counted.
    """

    segment_ids: Int[Array, "Bn T"]
    layout: Layout = flax.struct.field(pytree_node=False)
    kernel: str = flax.struct.field(pytree_node=False)
    mesh: Mesh | None = flax.struct.field(pytree_node=False)
    positions: Int[Array, "Bn T"] | None = None

    def attend(
        self, q: Any, k: Any, v: Any, window: Window, cached: None, cap: float | None = None
    ) -> tuple[Any, None]:
        """Return the packed ``[B, P + n*C, H, d]`` outputs, and nothing to keep."""
        ids, positions, layout = self.segment_ids, self.positions, self.layout
        packed = positions is not None
        if in_blocks(self.kernel, self.mesh, cap):
            ids = ids.reshape(-1, layout.branches, ids.shape[1])
            if packed:
                positions = positions.reshape(ids.shape)
            else:
                ids = ids[:, :1] > 0  # the same in all branches
            out = blocked_attention(q, k, v, ids, positions, layout, window, cap)
            return checkpoint_name(out, ATTENDED), None
        q, k, v = (split_branches(x, layout) for x in (q, k, v))
        kernel = choose_kernel(
            self.kernel, q.dtype, q.shape[-1], q.shape[1], window, self.mesh, packed=packed
        )
        more = {"positions": positions} if packed and window is not None else {}
        out = merge_branches(kernel(q, k, v, ids, window, **more), layout)
        if kernel is cudnn_attention:  # it has named its output, which it keeps, by itself
            return out, None
        return checkpoint_name(out, ATTENDED), None


class PrefillAttention(flax.struct.PyTreeNode):
    """As ``BranchAttention`` for a prompt alone, handing back the keys and values to cache."""

    segment_ids: Int[Array, "B P"]
    kernel: str = flax.struct.field(pytree_node=False)
    mesh: Mesh | None = flax.struct.field(pytree_node=False)

    def attend(
        self, q: Any, k: Any, v: Any, window: Window, cached: None, cap: float | None = None
    ) -> tuple[Any, tuple[Any, Any]]:
        """Return the outputs ``[B, P, H, d]`` and the prompt's keys and values."""
        if in_blocks(self.kernel, self.mesh, cap):
            ids, layout = self.segment_ids[:, None] > 0, Layout(q.shape[1], 1, 0)
            return blocked_attention(q, k, v, ids, None, layout, window, cap), (k, v)
        kernel = choose_kernel(self.kernel, q.dtype, q.shape[-1], q.shape[1], window, self.mesh)
        return kernel(q, k, v, self.segment_ids, window), (k, v)


class CachedAttention(flax.struct.PyTreeNode):
    """One new token a row is put into ``slot`` and attends to the slots marked ``valid``.

    ``valid`` marks the new token's own slot too.
    """

    valid: Bool[Array, "B S"]
    slot: Int[Array, ""]
    on_cpu: bool = flax.struct.field(pytree_node=False)

    def attend(
        self,
        q: Any,
        k: Any,
        v: Any,
        window: Window,
        cached: tuple[Any, Any],
        cap: float | None = None,
    ) -> tuple[Any, tuple[Any, Any]]:
        """Return the outputs ``[B, 1, H, d]`` and the layer's ``[B, K, d, S]`` cache with them.

        Slots lie along the last axis: scores, softmax and the weighted sum all run over them,
        and no product needs a transposed copy of the cache.
        """
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, new[:, 0, :, :, None], self.slot, axis=3)
            for old, new in zip(cached, (k, v), strict=True)
        )
        B, K, d, S = keys.shape
        seen = self.valid
        if window is not None:
            seen &= self.slot - jnp.arange(S) < window
        grouped = q.reshape(B, K, -1, d)
        scores = jnp.einsum("bkgd,bkds->bkgs", grouped, keys, preferred_element_type=jnp.float32)
        scores = capped(scores * d**-0.5, cap)
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        if self.on_cpu:
            out = few_rows_sum(weights, values)
        else:
            out = jnp.einsum("bkgs,bkds->bkgd", weights, values)
        return out.reshape(q.shape), (keys, values)

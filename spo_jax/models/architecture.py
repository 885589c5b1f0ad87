"""What a decoder is (``DecoderConfig``) and how it is executed (``Execution``)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spo_jax.models.attention import ATTENDED, KERNELS, NO_WINDOW

ADAPTED = "adapted"
"""What rematerialization calls a projection with its adapter's term added."""


def _and_names(policy: Any, *names: str) -> Any:
    named = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint_policies.save_from_both_policies(policy, named)


_NO_BATCH = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "elementwise": _and_names(_NO_BATCH, ATTENDED, ADAPTED),
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": _and_names(jax.checkpoint_policies.dots_saveable, ADAPTED),
    "dots_no_batch": _and_names(_NO_BATCH, ADAPTED),
}
"""What the backward pass of a layer finds saved; ``none`` is no rematerialization at all.

``elementwise`` saves products and what attention hands on, and computes norms, rotations and gates
again: less traffic than to save them, and half of the memory.
"""

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched: ``linear``, or ``llama3`` with three more numbers."""

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a pre-norm decoder with rotary positions, grouped queries and a gated MLP.

    ``sliding_window`` counts the tokens a query sees, itself included; ``sliding_layers``
    says which layers use it (``None``: all of them). Hashable, so it can be a static
    argument.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}: every key/value head serves equally many heads"
            )
        if self.head_dim < 2:
            raise ValueError(
                f"head_dim={self.head_dim}: hidden_size={self.hidden_size} does not suffice for "
                f"num_heads={self.num_heads}: use fewer heads, or set head_dim"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: rotary positions turn pairs")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window}: use at least 1, or None")
        if self.sliding_layers is not None:
            if self.sliding_window is None:
                raise ValueError("sliding_layers is set but sliding_window is None: set both")
            if len(self.sliding_layers) != self.num_layers:
                raise ValueError(
                    f"sliding_layers has {len(self.sliding_layers)} entries for "
                    f"num_layers={self.num_layers}: give one a layer"
                )

    @property
    def shared_window(self) -> int | None:
        """The window where all layers agree on it; ``None`` is full attention."""
        return None if self.sliding_layers and not any(self.sliding_layers) else self.sliding_window

    @property
    def layer_windows(self) -> np.ndarray | None:
        """The window of each layer where they differ, else ``None``."""
        layers = self.sliding_layers
        if layers is None or all(layers) or not any(layers):
            return None
        return np.where(layers, self.sliding_window, NO_WINDOW).astype(np.int32)


@dataclass(frozen=True)
class Execution:
    """How a decoder runs: dtypes, what the backward pass recomputes, the attention kernel, where.

    ``attention="auto"`` takes splash on a TPU, cuDNN on a GPU with a 16-bit
    ``compute_dtype``, blocks of queries on a CPU, and XLA's where these do not serve. ``mesh`` is
    the one the parameters live on, with axes ``data``, ``fsdp`` and ``tensor``: kernels run on
    each device's part, and activations stay cut. ``None`` leaves everything to the partitioner.
    An unknown name is an error that says the nearest valid one.
    """

    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    remat: str = "elementwise"
    attention: str = "auto"
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        _check_name("param_dtype", self.param_dtype, DTYPES)
        _check_name("compute_dtype", self.compute_dtype, DTYPES)
        _check_name("remat", self.remat, REMAT_POLICIES)
        _check_name("attention", self.attention, ("auto", *KERNELS))
        if self.attention == "cudnn" and jnp.dtype(self.compute_dtype).itemsize != 2:
            raise ValueError(
                f"attention='cudnn' with compute_dtype={self.compute_dtype!r}: cuDNN attention "
                "takes 16-bit inputs, use compute_dtype='bfloat16' or attention='xla'"
            )
        if self.attention == "splash" and self.compute_dtype == "float16":
            raise ValueError(
                "attention='splash' with compute_dtype='float16': a TPU has no float16, use "
                "compute_dtype='bfloat16' or attention='xla'"
            )


def _check_name(field: str, value: str, valid: Any) -> None:
    if value not in valid:
        nearest = difflib.get_close_matches(value, list(valid), n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{field}={value!r} is unknown: did you mean {nearest!r}? "
            f"Valid are {', '.join(map(repr, valid))}"
        )

"""What a decoder is (``DecoderConfig``) and how it is executed (``Execution``)."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
"""Of the gate of an MLP, by the names of ``config.json``."""

NORMS = ("pre", "post", "both")
"""Where a layer has its norms: see ``DecoderConfig``."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched: ``linear``, ``llama3`` or ``longrope``.

    ``longrope`` has a factor for each of them: ``short_factor`` for texts of up to
    ``original_max_position_embeddings`` and ``long_factor`` beyond; only the first are computed
    with. Cosines and sines are multiplied by ``attention_factor``; ``None`` is what its paper
    takes, of ``factor``.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    attention_factor: float | None = None


class PerLayer(NamedTuple):
    """What sets a layer apart, an array over the layers each; ``None`` where all are alike.

    ``window`` is its own window, ``rotation`` its row of ``rope.frequency_table``.
    """

    window: Any = None
    rotation: Any = None

    def of(self, layer: int) -> PerLayer:
        """The numbers of one layer."""
        return PerLayer(*(None if x is None else int(x[layer]) for x in self))


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder with rotary positions, grouped queries, RMS norms and a gated MLP.

    ``norms`` are taken of what goes into attention and MLP (``pre``), of what comes out
    (``post``), or of ``both``; ``qk_norm`` of every head's queries and keys, ``full_qk_norm`` of
    all heads together, and ``unit_norms`` multiply by ``1 + scale``. ``activation`` is that of
    the MLP's gate. Scores of attention are divided by the root of ``score_width`` (``None``:
    ``head_dim``); they and logits are held within a cap ``c`` by ``c tanh(x / c)``, where there
    is one. ``scaled_embeddings`` are multiplied by the root of their width.

    With ``num_experts`` a token's MLP is the ``experts_per_token`` of them, ``expert_size`` wide,
    that its router finds likeliest, weighed by their probabilities; ``normed_routes`` add up to
    one.
    ``sliding_window`` counts the tokens a query sees, itself included; ``sliding_layers``
    says which layers use it (``None``: all of them). ``rope_layers`` says which layers turn
    queries and keys by their positions (``None``: all of them), ``rotary_dim`` how much of
    a head they turn (``None``: the whole of it), ``sliding_rope_theta`` the base of layers with a
    window (``None``: as the others, ``rope_scaling`` included). Hashable, so it can be a
    static argument.
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
    norms: str = "pre"
    qk_norm: bool = False
    full_qk_norm: bool = False
    unit_norms: bool = False
    activation: str = "silu"
    score_width: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    scaled_embeddings: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    normed_routes: bool = True
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    rope_layers: tuple[bool, ...] | None = None
    rotary_dim: int | None = None
    sliding_rope_theta: float | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}: every key/value head serves equally many heads"
            )
        _check_name("norms", self.norms, NORMS)
        _check_name("activation", self.activation, ACTIVATIONS)
        for name in ("score_width", "score_cap", "logit_cap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: use a number above 0, or None")
        if self.qk_norm and self.full_qk_norm:
            raise ValueError("qk_norm and full_qk_norm are both set: queries have one norm")
        if not 0 <= self.experts_per_token <= self.num_experts or (
            self.num_experts and not (self.experts_per_token and self.expert_size)
        ):
            raise ValueError(
                f"experts_per_token={self.experts_per_token}, expert_size={self.expert_size}: of "
                f"num_experts={self.num_experts} a token takes at least one and at most all"
            )
        if self.head_dim < 2:
            raise ValueError(
                f"head_dim={self.head_dim}: hidden_size={self.hidden_size} does not suffice for "
                f"num_heads={self.num_heads}: use fewer heads, or set head_dim"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: rotary positions turn pairs")
        if self.rotary_dim is not None and not (
            2 <= self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0
        ):
            raise ValueError(
                f"rotary_dim={self.rotary_dim}: rotary positions turn pairs of the "
                f"head_dim={self.head_dim} numbers of a head, use an even number of them"
            )
        for name in ("short_factor", "long_factor"):
            factors = getattr(self.rope_scaling, name, None)
            if factors is not None and 2 * len(factors) != self.turned:
                raise ValueError(
                    f"{name} of rope_scaling has {len(factors)} numbers: expected "
                    f"{self.turned // 2}, one for each pair that turns"
                )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window}: use at least 1, or None")
        if self.sliding_layers is not None and self.sliding_window is None:
            raise ValueError("sliding_layers is set but sliding_window is None: set both")
        if self.sliding_rope_theta is not None and self.sliding_layers is None:
            raise ValueError("sliding_rope_theta is set but sliding_layers is None: set both")
        for name in ("sliding_layers", "rope_layers"):
            layers = getattr(self, name)
            if layers is not None and len(layers) != self.num_layers:
                raise ValueError(
                    f"{name} has {len(layers)} entries for num_layers={self.num_layers}: "
                    "give one a layer"
                )

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by, as attention divides by the root of ``head_dim``."""
        return 1.0 if self.score_width is None else (self.head_dim / self.score_width) ** 0.5

    @property
    def turned(self) -> int:
        """How many numbers of a head rotary positions turn."""
        return self.rotary_dim or self.head_dim

    @property
    def context(self) -> tuple[str, int]:
        """What bounds the length of a text, by its key: the reach of longrope's short factors."""
        scaling = self.rope_scaling
        if scaling is not None and scaling.rope_type == "longrope":
            name = "original_max_position_embeddings"
            return name, getattr(scaling, name)
        return "max_position_embeddings", self.max_position_embeddings

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

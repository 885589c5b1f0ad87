"""The Flax decoder, and ``Model``: its pure functions on a plain tree of parameters.

One trunk serves training and generation. Norms, projections and MLPs run on packed
``[B, T]`` tokens; what a token may look at is the business of the attention context.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from spo_jax.models.architecture import ADAPTED, REMAT_POLICIES, DecoderConfig, Execution
from spo_jax.models.attention import (
    BranchAttention,
    CachedAttention,
    Layout,
    PrefillAttention,
    split_branches,
)
from spo_jax.models.cache import Cache, empty_cache
from spo_jax.models.few_rows import few_rows_product, layer_by_layer, transpose_kernels
from spo_jax.models.lora import LORA, merge
from spo_jax.models.nf4 import dequantize
from spo_jax.models.rope import rotate, rotation
from spo_jax.models.token_positions import ids_and_positions, positions_from_mask
from spo_jax.parallel.constraints import ROWS, constrain, platform
from spo_jax.types import Params, Segments


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, in float32 inside."""

    eps: float
    execution: Execution

    @nn.compact
    def __call__(self, x):
        dtype = self.execution.param_dtype
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), dtype)
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale.astype(jnp.float32)).astype(self.execution.compute_dtype)


class _Projecting(nn.Module):
    """What attention and MLP share: settings, and how they make a projection."""

    config: DecoderConfig
    execution: Execution
    product: Callable[..., Any] | None = None

    def project(self, x, features: int, name: str, *, bias: bool):
        dense = nn.Dense(
            features,
            use_bias=bias,
            dtype=self.execution.compute_dtype,
            param_dtype=self.execution.param_dtype,
            kernel_init=nn.initializers.normal(self.config.initializer_range),
            dot_general=self.product,
            name=name,
        )
        # As one matrix: with a batch axis, the CPU compiler computes the kernel's gradient from
        # transposed copies.
        rows = x.reshape(-1, x.shape[-1])
        stored = self.get_variable("params", name) or {}
        out = self._four_bits(rows, stored) if "codes" in stored else dense(rows)
        if self.has_variable("params", name + LORA):
            # Named, so that the backward pass finds the sum saved and not both of its terms.
            out = checkpoint_name(out + self._low_rank(rows, name), ADAPTED)
        return out.reshape(*x.shape[:-1], features)

    def _four_bits(self, rows, stored):
        dtype = self.execution.compute_dtype
        out = rows.astype(dtype) @ dequantize(stored).astype(dtype)
        return out + stored["bias"].astype(dtype) if "bias" in stored else out

    def _low_rank(self, rows, name: str):
        adapter = self.get_variable("params", name + LORA)
        dtype = self.execution.compute_dtype
        if "key" in adapter:
            kept = jax.random.bernoulli(
                jax.random.wrap_key_data(adapter["key"]), adapter["keep"], rows.shape
            )
            rows = jnp.where(kept, rows / adapter["keep"].astype(rows.dtype), 0)
        inner = rows.astype(dtype) @ adapter["a"].astype(dtype)
        return (inner * adapter["scale"].astype(dtype)) @ adapter["b"].astype(dtype)


class Attention(_Projecting):
    """Grouped-query attention with rotary positions: Ainslie et al., arXiv 2305.13245."""

    @nn.compact
    def __call__(self, x, rotation, context, window, cached):
        c = self.config
        q = self.project(x, c.num_heads * c.head_dim, "q", bias=c.qkv_bias)
        k = self.project(x, c.num_kv_heads * c.head_dim, "k", bias=c.qkv_bias)
        v = self.project(x, c.num_kv_heads * c.head_dim, "v", bias=c.qkv_bias)
        q, k, v = (t.reshape(*x.shape[:2], -1, c.head_dim) for t in (q, k, v))
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, self.execution, name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, self.execution, name="k_norm")(k)
        q, k = rotate(q, rotation), rotate(k, rotation)
        out, kept = context.attend(q, k, v, window, cached)
        out = out.reshape(*x.shape[:2], c.num_heads * c.head_dim)
        return self.project(out, c.hidden_size, "o", bias=c.o_bias), kept


class MLP(_Projecting):
    """``down(silu(gate(x)) * up(x))``: Shazeer, arXiv 2002.05202."""

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate = self.project(x, c.intermediate_size, "gate", bias=c.mlp_bias)
        up = self.project(x, c.intermediate_size, "up", bias=c.mlp_bias)
        return self.project(nn.silu(gate) * up, c.hidden_size, "down", bias=c.mlp_bias)


class Layer(nn.Module):
    """Attention and MLP, each on a normed input and added to the residual stream."""

    config: DecoderConfig
    execution: Execution
    product: Callable[..., Any] | None = None

    @nn.compact
    def __call__(self, x, window, cached, rotation, context):
        c, e, p = self.config, self.execution, self.product
        window = c.shared_window if window is None else window
        normed = RMSNorm(c.rms_norm_eps, e, name="attention_norm")(x)
        out, kept = Attention(c, e, p, name="attention")(normed, rotation, context, window, cached)
        x += out
        x += MLP(c, e, p, name="mlp")(RMSNorm(c.rms_norm_eps, e, name="mlp_norm")(x))
        return constrain(x, e.mesh, ROWS, None, None), kept


class Decoder(nn.Module):
    """Token embedding, the layers as one scan (parameters stacked ``[L, ...]``), final norm."""

    config: DecoderConfig
    execution: Execution

    @nn.compact
    def __call__(self, tokens, positions, context, cached=None):
        c, e = self.config, self.execution
        init = nn.initializers.normal(c.initializer_range)
        embed = self.param("embed", init, (c.vocab_size, c.hidden_size), e.param_dtype)
        if not c.tie_word_embeddings:
            self.param("head", init, (c.hidden_size, c.vocab_size), e.param_dtype)

        layer = Layer
        if e.remat != "none":
            # Inside a scan nothing can be merged across layers, so the barrier that
            # prevent_cse puts there would only cost.
            layer = nn.remat(Layer, policy=REMAT_POLICIES[e.remat], prevent_cse=False)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )(c, e, name="layers")
        windows = None if c.layer_windows is None else jnp.asarray(c.layer_windows)
        x = _look_up(embed, tokens, e)
        x, kept = layers(x, windows, cached, rotation(c, positions), context)
        return RMSNorm(c.rms_norm_eps, e, name="final_norm")(x), kept


def _look_up(embed, tokens, execution: Execution):
    """The rows of ``embed`` that ``tokens`` name.

    On a mesh its columns stay where they are, cut over ``fsdp``: the ids of all rows on that
    axis come to them, and what was found goes back to the rows. The table never travels.
    """
    mesh = execution.mesh
    tokens = constrain(tokens, mesh, "data", None)
    found = constrain(embed[tokens], mesh, "data", None, "fsdp")
    return constrain(found.astype(execution.compute_dtype), mesh, ROWS, None, None)


_MATRICES = ("kernel", "embed", "head")
"""Names of the parameters that products are taken with."""


@dataclass(frozen=True)
class Model:
    """A decoder as pure functions of its parameters; hashable, so it can be a static argument.

    The parameters are a plain nested dict; ``init`` makes them at random and
    ``spo_jax.models.load_params`` reads them from a folder.
    """

    config: DecoderConfig
    execution: Execution = field(default_factory=Execution)

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that the parameters live on, if the model was told."""
        return self.execution.mesh

    def init(self, key: PRNGKeyArray) -> Params:
        """Draw matrices from ``N(0, initializer_range^2)``; norms are 1, biases 0."""
        return _init(self, key)

    def abstract_params(self) -> Params:
        """The parameters' shapes and dtypes, as a tree of ``jax.ShapeDtypeStruct``."""
        return jax.eval_shape(self.init, jax.ShapeDtypeStruct((2,), jnp.uint32))

    def hidden(
        self,
        params: Params,
        prompt_tokens: Int[Array, "B P"],
        prompt_mask: Bool[Array, "B P"],
        completion_tokens: Int[Array, "B n C"],
        segments: Segments | None = None,
    ) -> tuple[Float[Array, "B P D"], Float[Array, "B n C D"]]:
        """Hidden states after the final norm of prompts and their ``n`` completions.

        The pair layout: each prompt is computed once, and every completion continues it
        as if alone. Prompts are right-aligned, completions left-aligned; completion
        padding needs no mask, since causality hides it. Of packed rows ``segments`` say which
        prompt a completion continues. Logits of the token after a position are
        ``hidden @ output_head(params)``.
        """
        P = prompt_tokens.shape[1]
        B, n, C = completion_tokens.shape

        def packed(prompt, completion):
            return jnp.concatenate([prompt, completion.reshape(B, n * C)], axis=1)

        tokens = packed(prompt_tokens, completion_tokens)
        if segments is None:
            lengths = jnp.sum(prompt_mask, axis=1, dtype=jnp.int32)
            after = lengths[:, None, None] + jnp.arange(C, dtype=jnp.int32)
            after = jnp.broadcast_to(after, (B, n, C))
            positions = packed(positions_from_mask(prompt_mask), after)
            ids = packed(prompt_mask, jnp.ones((B, n, C), bool))
        else:
            (prompts, completions), positions = ids_and_positions(segments, P, C)
            ids, positions = packed(prompts, completions), packed(*positions)
        layout = Layout(P, n, C)
        context = BranchAttention(
            segment_ids=split_branches(ids, layout).astype(jnp.int32),
            layout=layout,
            kernel=self.execution.attention,
            mesh=self.execution.mesh,
            positions=None if segments is None else split_branches(positions, layout),
        )
        x, _ = self._apply(params, tokens, positions, context)
        return x[:, :P], x[:, P:].reshape(B, n, C, self.config.hidden_size)

    def hidden_plain(
        self, params: Params, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Hidden states of ordinary padded sequences: the pair layout without completions."""
        no_completion = jnp.zeros((tokens.shape[0], 1, 0), tokens.dtype)
        return self.hidden(params, tokens, mask, no_completion)[0]

    def output_head(self, params: Params) -> Float[Array, "D V"]:
        """The matrix from hidden states to logits: the embedding transposed where tied."""
        return params["embed"].T if self.config.tie_word_embeddings else params["head"]

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache of ``length`` slots a row: the prompt's and the tokens to come."""
        return empty_cache(self.config, self.execution.compute_dtype, batch, length)

    def prefill(
        self,
        params: Params,
        cache: Cache,
        tokens: Int[Array, "B P"],
        mask: Bool[Array, "B P"],
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Fill an empty cache from right-aligned prompts; returns the last hidden state of each."""
        P = tokens.shape[1]
        context = PrefillAttention(
            segment_ids=mask.astype(jnp.int32),
            kernel=self.execution.attention,
            mesh=self.execution.mesh,
        )
        x, kept = self._apply(params, tokens, positions_from_mask(mask), context)
        keys, values = (
            tuple(old.at[..., :P].set(new) for old, new in zip(olds, news, strict=True))
            for olds, news in zip(cache[:2], (jnp.moveaxis(t, 2, 4) for t in kept), strict=True)
        )
        return x[:, -1], Cache(
            keys=keys,
            values=values,
            valid=cache.valid.at[:, :P].set(mask),
            positions=jnp.sum(mask, axis=1, dtype=jnp.int32),
            slot=jnp.asarray(P, jnp.int32),
        )

    def decode_params(self, params: Params) -> Params:
        """Parameters for many ``decode_step``: matrices in the compute dtype, cast once.

        Adapters are merged into them. On a CPU also a tree a layer, with matrices as
        ``few_rows_product`` reads them. The tied embedding is one already.
        """
        dtype = self.execution.compute_dtype
        params = merge(params)
        params = jax.tree.map_with_path(
            lambda path, x: x.astype(dtype) if path[-1].key in _MATRICES else x, params
        )
        if not self._on_cpu:
            return params
        params = {**params, "layers": layer_by_layer(params["layers"], self.config.num_layers)}
        if "head" in params:
            params["head"] = params["head"].T
        return params

    def decode_logits(self, params: Params, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Logits in float32 by the parameters of ``decode_params``."""
        if not self._on_cpu:
            head = self.output_head(params)
            return jnp.dot(hidden, head, preferred_element_type=jnp.float32)
        matrix = params["embed" if self.config.tie_word_embeddings else "head"]
        return few_rows_product(hidden, matrix.T, preferred_element_type=jnp.float32)

    def decode_step(
        self, params: Params, cache: Cache, tokens: Int[Array, "B"]
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Append one token a row; returns its hidden state and the cache that now holds it.

        ``params`` are those of ``decode_params``.
        The layers are written out one after the other: a scan over them would copy each
        layer's part of the cache at every step.
        """
        c, e = self.config, self.execution
        own = jnp.ones_like(cache.valid[:, :1])
        valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, own, cache.slot, axis=1)
        context = CachedAttention(valid=valid, slot=cache.slot, on_cpu=self._on_cpu)
        rotated = rotation(c, cache.positions[:, None])
        x = params["embed"][tokens][:, None].astype(e.compute_dtype)
        kept = []
        for i, cached in enumerate(zip(cache.keys, cache.values, strict=True)):
            if self._on_cpu:
                layer, product = transpose_kernels(params["layers"][i]), few_rows_product
            else:
                layer, product = jax.tree.map(lambda x, i=i: x[i], params["layers"]), None
            window = None if c.layer_windows is None else int(c.layer_windows[i])
            apply = Layer(c, e, product).apply
            x, now = apply({"params": layer}, x, window, cached, rotated, context)
            kept.append(now)
        keys, values = zip(*kept, strict=True)
        x = RMSNorm(c.rms_norm_eps, e).apply({"params": params["final_norm"]}, x)
        return x[:, 0], Cache(keys, values, valid, cache.positions + 1, cache.slot + 1)

    @property
    def _on_cpu(self) -> bool:
        return platform(self.execution.mesh) == "cpu"

    @property
    def _trunk(self) -> Decoder:
        return Decoder(self.config, self.execution)

    def _apply(self, params, tokens, positions, context, cached=None):
        return self._trunk.apply({"params": params}, tokens, positions, context, cached)


@functools.partial(jax.jit, static_argnums=0)
def _init(model: Model, key: PRNGKeyArray) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    context = PrefillAttention(segment_ids=jnp.ones((1, 1), jnp.int32), kernel="xla", mesh=None)
    return model._trunk.init(key, tokens, tokens, context)["params"]

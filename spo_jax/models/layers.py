"""The layers of the Flax decoder: norms, projections, attention, MLP, and the trunk of them all.

Norms, projections and MLPs run on packed ``[B, T]`` tokens; what a token may look at is the
business of the attention context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spo_jax.models.architecture import (
    ACTIVATIONS,
    ADAPTED,
    REMAT_POLICIES,
    DecoderConfig,
    Execution,
    PerLayer,
)
from spo_jax.models.experts import Matrices, picked_experts
from spo_jax.models.lora import LORA
from spo_jax.models.nf4 import dequantize
from spo_jax.models.rope import frequency_table, own_rotation, rotate, rotation
from spo_jax.parallel.constraints import ROWS, constrain


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, in float32 inside.

    Of ``unit_norms`` the factor is ``1 + scale``.
    """

    config: DecoderConfig
    execution: Execution

    @nn.compact
    def __call__(self, x):
        dtype, unit = self.execution.param_dtype, self.config.unit_norms
        start = nn.initializers.zeros if unit else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],), dtype).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(mean + self.config.rms_norm_eps)
        return (wide * (1 + scale if unit else scale)).astype(self.execution.compute_dtype)


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
        normed = [RMSNorm(c, self.execution, name=n) for n in ("q_norm", "k_norm")]
        if c.full_qk_norm:
            q, k = (norm(t) for norm, t in zip(normed, (q, k), strict=True))
        q, k, v = (t.reshape(*x.shape[:2], -1, c.head_dim) for t in (q, k, v))
        if c.qk_norm:
            q, k = (norm(t) for norm, t in zip(normed, (q, k), strict=True))
        q, k = rotate(q, rotation, c.query_scale), rotate(k, rotation)
        out, kept = context.attend(q, k, v, window, cached, c.score_cap)
        out = out.reshape(*x.shape[:2], c.num_heads * c.head_dim)
        return self.project(out, c.hidden_size, "o", bias=c.o_bias), kept


class MLP(_Projecting):
    """``down(activation(gate(x)) * up(x))``: Shazeer, arXiv 2002.05202."""

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate = self.project(x, c.intermediate_size, "gate", bias=c.mlp_bias)
        up = self.project(x, c.intermediate_size, "up", bias=c.mlp_bias)
        return self.project(
            ACTIVATIONS[c.activation](gate) * up, c.hidden_size, "down", bias=c.mlp_bias
        )


class _Kernels(nn.Module):
    """One matrix an expert."""

    shape: tuple[int, int, int]
    scale: float
    dtype: str

    @nn.compact
    def __call__(self):
        return self.param("kernel", nn.initializers.normal(self.scale), self.shape, self.dtype)


class Experts(_Projecting):
    """``sum_e p_e MLP_e(x)``, the MLPs that a router picks: Shazeer et al., arXiv 1701.06538.

    Each computes the tokens that picked it (``picked_experts``), none is left out. No loss keeps
    the experts evenly busy.
    """

    @nn.compact
    def __call__(self, x):
        c, e = self.config, self.execution
        logits = self.project(x, c.num_experts, "router", bias=False)
        found = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        best, picked = jax.lax.top_k(found, c.experts_per_token)
        if c.normed_routes:
            best /= jnp.sum(best, axis=-1, keepdims=True)

        def kernels(name: str, rows: int, columns: int):
            shape = (c.num_experts, rows, columns)
            return _Kernels(shape, c.initializer_range, e.param_dtype, name=name)()

        wide = (c.hidden_size, c.expert_size)
        matrices = Matrices(
            kernels("gate", *wide), kernels("up", *wide), kernels("down", *wide[::-1])
        )
        activation = ACTIVATIONS[c.activation]
        total = picked_experts(x, best, matrices, picked, activation=activation, mesh=e.mesh)
        return total.astype(e.compute_dtype)


class Layer(nn.Module):
    """Attention and MLP, each normed before or behind, and added to the residual stream."""

    config: DecoderConfig
    execution: Execution
    product: Callable[..., Any] | None = None

    @nn.compact
    def __call__(self, x, own, cached, rotation, context):
        c, e, p = self.config, self.execution, self.product
        window = c.shared_window if own.window is None else own.window
        rotation = own_rotation(rotation, own.rotation)

        def norm(x, where: str, name: str):
            return RMSNorm(c, e, name=name)(x) if c.norms in (where, "both") else x

        out, kept = Attention(c, e, p, name="attention")(
            norm(x, "pre", "attention_norm"), rotation, context, window, cached
        )
        x += norm(out, "post", "attention_out_norm")
        mlp = Experts(c, e, p, name="experts") if c.num_experts else MLP(c, e, p, name="mlp")
        out = mlp(norm(x, "pre", "mlp_norm"))
        x += norm(out, "post", "mlp_out_norm")
        return constrain(x, e.mesh, ROWS, None, None), kept


def per_layer(config: DecoderConfig) -> PerLayer:
    """What sets the layers apart."""
    return PerLayer(config.layer_windows, frequency_table(config)[1])


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
        own = jax.tree.map(jnp.asarray, per_layer(c))
        x = scaled(_look_up(embed, tokens, e), c)
        x, kept = layers(x, own, cached, rotation(c, positions), context)
        return RMSNorm(c, e, name="final_norm")(x), kept


def scaled(x, config: DecoderConfig):
    """Embeddings as the first layer takes them; the factor is rounded to their dtype."""
    return x * jnp.asarray(config.hidden_size**0.5, x.dtype) if config.scaled_embeddings else x


def _look_up(embed, tokens, execution: Execution):
    """The rows of ``embed`` that ``tokens`` name.

    On a mesh its columns stay where they are, cut over ``fsdp``: the ids of all rows on that
    axis come to them, and what was found goes back to the rows. The table never travels.
    """
    mesh = execution.mesh
    tokens = constrain(tokens, mesh, "data", None)
    found = constrain(embed[tokens], mesh, "data", None, "fsdp")
    return constrain(found.astype(execution.compute_dtype), mesh, ROWS, None, None)

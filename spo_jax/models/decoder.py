"""``Model``: the decoder as pure functions on a plain tree of parameters.

One trunk (``layers.py``) serves training and generation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from spo_jax.models.architecture import DecoderConfig, Execution
from spo_jax.models.attention import (
    BranchAttention,
    CachedAttention,
    Layout,
    PrefillAttention,
    split_branches,
)
from spo_jax.models.blocked import capped
from spo_jax.models.cache import Cache, empty_cache
from spo_jax.models.few_rows import few_rows_product, layer_by_layer, transpose_kernels
from spo_jax.models.layers import Decoder, Layer, RMSNorm, per_layer, scaled
from spo_jax.models.lora import merge
from spo_jax.models.rope import rotation
from spo_jax.models.token_positions import ids_and_positions, positions_from_mask
from spo_jax.parallel.constraints import platform
from spo_jax.types import Params, Segments

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

    def __post_init__(self) -> None:
        kernel = self.execution.attention
        if self.config.score_cap is not None and kernel not in ("auto", "blocked"):
            raise ValueError(
                f"attention={kernel!r} with a cap on the scores (score_cap="
                f"{self.config.score_cap}): it knows none, use attention='auto' or 'blocked'"
            )

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that the parameters live on, if the model was told."""
        return self.execution.mesh

    @property
    def logit_cap(self) -> float | None:
        """What logits are held within, ``c tanh(logit / c)``; ``None`` leaves them as they are."""
        return self.config.logit_cap

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
        ``hidden @ output_head(params)``, held within ``logit_cap`` where there is one.
        """
        P = prompt_tokens.shape[1]
        B, n, C = completion_tokens.shape
        self._check_length(P + C)

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
            logits = jnp.dot(hidden, head, preferred_element_type=jnp.float32)
        else:
            matrix = params["embed" if self.config.tie_word_embeddings else "head"]
            logits = few_rows_product(hidden, matrix.T, preferred_element_type=jnp.float32)
        return capped(logits, self.logit_cap)

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
        rotated, own = rotation(c, cache.positions[:, None]), per_layer(c)
        x = scaled(params["embed"][tokens][:, None].astype(e.compute_dtype), c)
        kept = []
        for i, cached in enumerate(zip(cache.keys, cache.values, strict=True)):
            if self._on_cpu:
                layer, product = transpose_kernels(params["layers"][i]), few_rows_product
            else:
                layer, product = jax.tree.map(lambda x, i=i: x[i], params["layers"]), None
            apply = Layer(c, e, product).apply
            x, now = apply({"params": layer}, x, own.of(i), cached, rotated, context)
            kept.append(now)
        keys, values = zip(*kept, strict=True)
        x = RMSNorm(c, e).apply({"params": params["final_norm"]}, x)
        return x[:, 0], Cache(keys, values, valid, cache.positions + 1, cache.slot + 1)

    def _check_length(self, length: int) -> None:
        """Raise ``ValueError`` where a text could be so long that longrope has other factors."""
        name, most = self.config.context
        if name != "max_position_embeddings" and length > most:
            raise ValueError(
                f"rows of {length} tokens reach beyond the model's {name}={most}: from there on "
                "its longrope takes other factors (long_factor) for the whole of a text, which is "
                "not implemented; lower max_prompt_length or max_completion_length until their "
                f"sum is at most {most}"
            )

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
    context = PrefillAttention(segment_ids=jnp.ones((1, 1), jnp.int32), kernel="blocked", mesh=None)
    return model._trunk.init(key, tokens, tokens, context)["params"]

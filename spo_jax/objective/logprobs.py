"""Hidden states and the output head -> log-probs of the scored tokens, in chunks.

``[B, T, V]`` logits are the largest array of a preference step by far, so they never
exist: the head runs on a few completion positions at a time, forward and backward, and
what is kept between the two passes is one log-normalizer a token. Where one chunk holds all
scored positions its logits are kept as well: the backward pass begins with them.

On a mesh the vocabulary is cut over ``tensor`` and ``fsdp``: each device has its columns of
the head and of the head's gradient, states travel to them a chunk at a time, and of the
logits only their partial maxima and sums travel (``_Cut``).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

from spo_jax.objective.packed_rows import has_predictor, packed_predictors
from spo_jax.parallel.constraints import ROWS, constrain, parts, platform
from spo_jax.types import CompletionBatch, Params, Segments

DEFAULT_CHUNK_TOKENS = 2048
"""Head rows in flight at once: logits of ``chunk_tokens * V * 4`` bytes (256 MiB at V = 32k)."""
KEPT_ON_CPU = 512 * 2**20
"""Bytes of logits on a CPU, where to compute them a second time costs more than memory does."""
KEPT_ON_GPU = 1 / 12
"""The share of a GPU's memory that logits may take: kept, they are not computed a second time."""


def rows_in_flight(asked: int | None, vocabulary: int, mesh: Mesh | None) -> int:
    """Head rows at once on a data shard: ``asked``, or what suits the platform of ``mesh``."""
    if asked is not None:
        return asked
    kind = platform(mesh)
    if kind == "cpu":
        return max(1, KEPT_ON_CPU // (4 * vocabulary))
    memory = _memory(mesh) if kind == "gpu" else 0
    return max(DEFAULT_CHUNK_TOKENS, int(memory * KEPT_ON_GPU) // (4 * vocabulary))


def _memory(mesh: Mesh | None) -> int:
    """Bytes of one device as its library has them to give; 0 where there is no asking.

    Processes must not be told different numbers: they run one program.
    """
    devices = jax.local_devices()[:1] if mesh is None else mesh.devices.flat
    if len({device.process_index for device in devices}) > 1:
        return 0
    told = getattr(devices[0], "memory_stats", lambda: None)() or {}
    return told.get("bytes_limit", 0)


def predictor_states(
    prompt_hidden: Float[Array, "B P D"],
    completion_hidden: Float[Array, "B n C D"],
    segments: Segments | None = None,
) -> Float[Array, "B n C D"]:
    """States that predict each completion token: the prompt's last, then the completion's own.

    The prompt is right-aligned, so its last state is at ``P - 1`` for every row; of packed rows
    ``segments`` tell where each prompt ends.
    """
    if segments is not None:
        return packed_predictors(prompt_hidden, completion_hidden, segments)
    batch, branches, _, width = completion_hidden.shape
    first = jnp.broadcast_to(prompt_hidden[:, None, -1:, :], (batch, branches, 1, width))
    return jnp.concatenate([first, completion_hidden[:, :, :-1]], axis=2)


def completion_states(
    model: Any, params: Params, batch: CompletionBatch
) -> Float[Array, "B n C D"]:
    """States that predict the completion tokens of ``batch`` under a ``models.Model``."""
    packed = () if batch.segments is None else (batch.segments,)
    prompt, completion = model.hidden(
        params, batch.prompt_tokens, batch.prompt_mask, batch.completion_tokens, *packed
    )
    return predictor_states(prompt, completion, *packed)


def states_and_head(
    model: Any, params: Params, batch: CompletionBatch
) -> tuple[Float[Array, "B n C D"], Float[Array, "D V"]]:
    """``completion_states``, and the head that predicts with them, in their dtype."""
    states = completion_states(model, params, batch)
    return states, model.output_head(params).astype(states.dtype)


def scored_mask(batch: CompletionBatch) -> Bool[Array, "B n C"]:
    """``completion_mask`` without the first token of rows that have nothing to predict it from.

    With an empty prompt (no BOS either) the token at index 0 is given, not predicted.
    """
    if batch.segments is not None:
        return batch.completion_mask & has_predictor(
            batch.segments, batch.completion_mask.shape[-1]
        )
    has_prompt = jnp.any(batch.prompt_mask, axis=-1)
    first = jnp.arange(batch.completion_mask.shape[-1]) == 0
    return batch.completion_mask & (has_prompt[:, None, None] | ~first)


def _chunk_length(batch: int, branches: int, length: int, chunk_tokens: int) -> int:
    return max(1, min(length, chunk_tokens // max(batch * branches, 1)))


def _to_chunks(x: Shaped[Array, "B n C ..."], chunk: int) -> Shaped[Array, "chunks B n c ..."]:
    """Cut along C, so that the batch axis stays whole and sharded as it is."""
    batch, branches, length, *rest = x.shape
    padding = -length % chunk
    x = jnp.pad(x, [(0, 0), (0, 0), (0, padding)] + [(0, 0)] * len(rest))
    x = x.reshape(batch, branches, (length + padding) // chunk, chunk, *rest)
    return jnp.moveaxis(x, 2, 0)


def _from_chunks(x: Shaped[Array, "chunks B n c ..."], length: int) -> Shaped[Array, "B n C ..."]:
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :length]


class _Cut(NamedTuple):
    """How the head's work is cut over a mesh; without a ``mesh`` it is not.

    While logits exist, their rows are cut over ``rows`` and the vocabulary over
    ``vocabulary``, two disjoint sets of axes. Everywhere else rows are cut over ``ROWS``.
    """

    mesh: Mesh | None = None
    rows: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()

    def to_logits(self, x: Any) -> Any:
        """Bring the rows of ``x [B, ...]`` to where their logits are computed."""
        return constrain(x, self.mesh, self.rows, *[None] * (x.ndim - 1))

    def from_logits(self, x: Any) -> Any:
        """Undo ``to_logits``: for ``x`` summed over the vocabulary, a scattered sum."""
        return constrain(x, self.mesh, ROWS, *[None] * (x.ndim - 1))

    def logits(self, states: Any, head: Any) -> Any:
        found = jnp.einsum("bncd,dv->bncv", states, head, preferred_element_type=jnp.float32)
        return constrain(found, self.mesh, self.rows, None, None, self.vocabulary)

    def head(self, head: Any) -> Any:
        """The columns of the head that each device works on."""
        return constrain(head, self.mesh, None, self.vocabulary)

    @property
    def row_shards(self) -> int:
        return 1 if self.mesh is None else parts(self.rows, self.mesh)

    def head_gradient(self, states: Any, logit_gradient: Any) -> Any:
        """``[shards, D, V]``, float32: each shard of rows sums up its own, and all once at the end.

        As one sum over all rows, every chunk of the scan would send a whole head around.
        """
        shards = self.row_shards
        if shards == 1:
            # As matrices: over three axes the CPU compiler would copy both sides first.
            found = _summed_over_rows(
                states.reshape(-1, states.shape[-1]),
                logit_gradient.reshape(-1, logit_gradient.shape[-1]),
            )[None]
        else:
            found = jnp.einsum(
                "xbncd,xbncv->xdv",
                states.reshape(shards, -1, *states.shape[1:]),
                logit_gradient.reshape(shards, -1, *logit_gradient.shape[1:]),
                preferred_element_type=jnp.float32,
            )
        return constrain(found, self.mesh, self.rows, None, self.vocabulary)

    def state_gradient(self, logit_gradient: Any, head: Any) -> Any:
        """``[B, n, c, D]`` in the head's dtype; parts of the vocabulary add up in float32."""
        wide = jnp.float32 if self.vocabulary else None
        found = jnp.einsum("bncv,dv->bncd", logit_gradient, head, preferred_element_type=wide)
        return self.from_logits(found).astype(head.dtype)


def _summed_over_rows(states: Any, logit_gradient: Any) -> Any:
    """``[D, V]``, float32, of ``[rows, D]`` and ``[rows, V]``."""
    # On a CPU turned first, and not as a way to read the states: its fast product reads its left
    # factor row by row, and a slower one would be called.
    turned = jax.lax.platform_dependent(
        states.T, cpu=jax.lax.optimization_barrier, default=lambda x: x
    )
    return jnp.einsum("dr,rv->dv", turned, logit_gradient, preferred_element_type=jnp.float32)


SPARE_TRAFFIC = 2
"""States may travel as long as they are this many times the head; beyond, the head does."""


def _cut(mesh: Mesh | None, tokens: tuple[int, int, int], vocabulary: int) -> _Cut:
    """Cut the vocabulary over all axes that hold parameters, if it and the rows divide.

    Rows stay cut over what is left. With many more tokens on the ``fsdp`` axis than words in
    the vocabulary, it is cheaper that each device gathers the head for its own rows, and
    holds it whole.
    """
    if mesh is None or mesh.size == 1 or tokens[0] % parts(ROWS, mesh):
        return _Cut()
    travelling = math.prod(tokens) // mesh.shape["data"]
    choices = [("tensor", "fsdp"), ("tensor",)]
    for axes in choices if travelling <= SPARE_TRAFFIC * vocabulary else choices[1:]:
        if parts(axes, mesh) > 1 and vocabulary % parts(axes, mesh) == 0:
            return _Cut(mesh, tuple(name for name in ROWS if name not in axes), axes)
    return _Cut(mesh, ROWS, ())


def token_logprobs(
    hidden: Float[Array, "B n C D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B n C"],
    *,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    mesh: Mesh | None = None,
    cap: float | None = None,
) -> Float[Array, "B n C"]:
    """Log-prob of each token under ``softmax(hidden @ head)``, float32, in nats.

    Logits are held within ``cap``, if the model has one: ``cap tanh(logit / cap)``.
    ``chunk_tokens`` bounds the rows of logits alive at once, over all devices of ``mesh``.
    Differentiable in ``hidden`` and ``head`` (any order); positions that are not scored get a
    value too, mask them.
    """
    cut = _cut(mesh, tokens.shape, head.shape[1])
    return _token_logprobs((int(chunk_tokens), cap, cut), hidden, head, tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(how, hidden, head, tokens):
    return _token_logprobs_forward(how, hidden, head, tokens)[0]


def _token_logprobs_forward(how, hidden, head, tokens):
    chunk_tokens, cap, cut = how
    batch, branches, length, _ = hidden.shape
    chunk = _chunk_length(batch, branches, length, chunk_tokens)
    head = cut.head(head)

    def of_chunk(states, targets):
        states, targets = cut.to_logits(states), cut.to_logits(targets)
        logits = _capped(cut.logits(states, head), cap)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        if cut.vocabulary:
            # Picked by a sum, which adds up over the parts of the vocabulary.
            picked = jnp.sum(jnp.where(_is_target(head, targets), logits, 0), axis=-1)
        else:
            picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return logits, tuple(cut.from_logits(x) for x in (picked - normalizer, normalizer))

    if chunk == length:
        # The backward pass begins here: one chunk's logits are kept, not computed again.
        logits, (logprobs, normalizer) = of_chunk(hidden, tokens)
        return logprobs, (hidden, head, tokens, normalizer, logits)

    pieces = (_to_chunks(hidden, chunk), _to_chunks(tokens, chunk))
    _, found = jax.lax.scan(lambda _, piece: (None, of_chunk(*piece)[1]), None, pieces)
    logprobs, normalizer = (_from_chunks(x, length) for x in found)
    return logprobs, (hidden, head, tokens, normalizer, None)


def _capped(logits, cap):
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _slope(logits, cap):
    """The derivative of ``_capped`` by what it holds, where that has come to be ``logits``."""
    return 1 if cap is None else 1 - (logits / cap) ** 2


def _is_target(head, targets):
    return jnp.arange(head.shape[1], dtype=targets.dtype) == targets[..., None]


def _token_logprobs_backward(how, residuals, cotangent):
    """``d logits = ct (onehot - softmax)``, a chunk at a time; the head's gradient adds up."""
    chunk_tokens, cap, cut = how
    hidden, head, tokens, normalizer, kept = residuals
    batch, branches, length, _ = hidden.shape
    chunk = _chunk_length(batch, branches, length, chunk_tokens)

    def of_chunk(logits, states, targets, log_z, ct):
        logits = _capped(cut.logits(states, head), cap) if logits is None else logits
        probabilities = jnp.exp(logits - log_z[..., None])
        logit_gradient = ct[..., None] * (_is_target(head, targets) - probabilities)
        logit_gradient = (logit_gradient * _slope(logits, cap)).astype(head.dtype)
        return cut.head_gradient(states, logit_gradient), cut.state_gradient(logit_gradient, head)

    if kept is not None and cut.mesh is None:
        return *_from_kept(cap, kept, hidden, head, tokens, normalizer, cotangent), None
    if kept is not None:
        pieces = (cut.to_logits(x) for x in (hidden, tokens, normalizer, cotangent))
        head_gradient, state_gradient = of_chunk(kept, *pieces)
        return state_gradient, _whole(head_gradient, cut, head.dtype), None

    # Differentiated once more (by an unrolled solver), a chunk is recomputed, not kept.
    @jax.checkpoint
    def body(head_gradient, piece):
        found, state_gradient = of_chunk(None, *(cut.to_logits(x) for x in piece))
        return head_gradient + found, state_gradient

    # float32 whatever the head's dtype: thousands of small terms are added here.
    start = jnp.zeros((cut.row_shards, *head.shape), jnp.float32)
    start = constrain(start, cut.mesh, cut.rows, None, cut.vocabulary)
    pieces = tuple(_to_chunks(x, chunk) for x in (hidden, tokens, normalizer, cotangent))
    head_gradient, state_gradient = jax.lax.scan(body, start, pieces)
    return _from_chunks(state_gradient, length), _whole(head_gradient, cut, head.dtype), None


def _from_kept(cap, kept, hidden, head, tokens, normalizer, cotangent):
    """Gradients of states and head from all logits at hand, on one device: as matrices.

    A part of the rows at a time, so that gradients of logits never are a second array as large.
    """
    rows = tokens.size
    parts = next(n for n in (4, 3, 2, 1) if rows % n == 0)
    logits = kept.reshape(rows, -1)
    of_rows = (
        hidden.reshape(rows, -1),
        *(x.reshape(rows) for x in (tokens, normalizer, cotangent)),
    )

    @jax.checkpoint
    def body(head_gradient, start):
        logits_, states, targets, log_z, ct = (
            jax.lax.dynamic_slice_in_dim(x, start, rows // parts) for x in (logits, *of_rows)
        )
        gradient = ct[:, None] * (_is_target(head, targets) - jnp.exp(logits_ - log_z[:, None]))
        gradient = (gradient * _slope(logits_, cap)).astype(head.dtype)
        return head_gradient + _summed_over_rows(states, gradient), jnp.einsum(
            "rv,dv->rd", gradient, head
        )

    start = jnp.zeros(head.shape, jnp.float32)
    head_gradient, found = jax.lax.scan(body, start, jnp.arange(parts) * (rows // parts))
    return found.reshape(hidden.shape), head_gradient.astype(head.dtype)


def _whole(head_gradient, cut, dtype):
    """The sum over the shards of rows, back to how parameters lie (DECODER_RULES)."""
    found = jnp.sum(head_gradient, axis=0)
    return constrain(found, cut.mesh, "fsdp", "tensor").astype(dtype)


_token_logprobs.defvjp(_token_logprobs_forward, _token_logprobs_backward)


def token_spread(
    hidden: Float[Array, "B n C D"],
    head: Float[Array, "D V"],
    *,
    top_k: int,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    cap: float | None = None,
) -> tuple[Float[Array, "B n C"], Float[Array, "B n C"]]:
    """How spread out ``p = softmax(hidden @ head)`` is at each position, float32.

    ``-sum p log p`` over the whole vocabulary, in nats, and the probability that the ``top_k``
    likeliest tokens have together. ``chunk_tokens`` and ``cap`` are as in ``token_logprobs``.
    """
    batch, branches, length, _ = hidden.shape
    chunk = _chunk_length(batch, branches, length, chunk_tokens)

    def body(_, states):
        logprobs = jax.nn.log_softmax(_capped(_Cut().logits(states, head), cap), axis=-1)
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        likeliest, _ = jax.lax.top_k(logprobs, top_k)
        return None, (entropy, jnp.sum(jnp.exp(likeliest), axis=-1))

    _, (entropy, mass) = jax.lax.scan(body, None, _to_chunks(hidden, chunk))
    return _from_chunks(entropy, length), _from_chunks(mass, length)

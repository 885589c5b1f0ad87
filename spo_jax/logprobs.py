"""Hidden states and the output head -> log-probs of the scored tokens, in chunks.

``[B, T, V]`` logits are the largest array of a preference step by far, so they never
exist: the head runs on a few completion positions at a time, forward and backward, and
what is kept between the two passes is one log-normalizer a token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from spo_jax.types import CompletionBatch, Params

DEFAULT_CHUNK_TOKENS = 2048
"""Head rows in flight at once: logits of ``chunk_tokens * V * 4`` bytes (256 MiB at V = 32k)."""


def predictor_states(
    prompt_hidden: Float[Array, "B P D"], completion_hidden: Float[Array, "B n C D"]
) -> Float[Array, "B n C D"]:
    """States that predict each completion token: the prompt's last, then the completion's own.

    The prompt is right-aligned, so its last state is at ``P - 1`` for every row.
    """
    batch, branches, _, width = completion_hidden.shape
    first = jnp.broadcast_to(prompt_hidden[:, None, -1:, :], (batch, branches, 1, width))
    return jnp.concatenate([first, completion_hidden[:, :, :-1]], axis=2)


def states_and_head(
    model: Any, params: Params, batch: CompletionBatch
) -> tuple[Float[Array, "B n C D"], Float[Array, "D V"]]:
    """States that predict the completion tokens of ``batch``, and the head that does it with them.

    ``model`` is a ``models.Model``; the head has the states' dtype.
    """
    prompt, completion = model.hidden(
        params, batch.prompt_tokens, batch.prompt_mask, batch.completion_tokens
    )
    states = predictor_states(prompt, completion)
    return states, model.output_head(params).astype(states.dtype)


def scored_mask(batch: CompletionBatch) -> Bool[Array, "B n C"]:
    """``completion_mask`` without the first token of rows that have nothing to predict it from.

    With an empty prompt (no BOS either) the token at index 0 is given, not predicted.
    """
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


def _logits(hidden, head):
    return jnp.einsum("bncd,dv->bncv", hidden, head, preferred_element_type=jnp.float32)


def token_logprobs(
    hidden: Float[Array, "B n C D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B n C"],
    *,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> Float[Array, "B n C"]:
    """Log-prob of each token under ``softmax(hidden @ head)``, float32, in nats.

    ``chunk_tokens`` bounds the rows of logits alive at once. Differentiable in
    ``hidden`` and ``head`` (any order); positions that are not scored get a value too,
    mask them.
    """
    return _token_logprobs(int(chunk_tokens), hidden, head, tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(chunk_tokens, hidden, head, tokens):
    return _token_logprobs_forward(chunk_tokens, hidden, head, tokens)[0]


def _token_logprobs_forward(chunk_tokens, hidden, head, tokens):
    batch, branches, length, _ = hidden.shape
    chunk = _chunk_length(batch, branches, length, chunk_tokens)

    def body(_, piece):
        states, targets = piece
        logits = _logits(states, head)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return None, (picked - normalizer, normalizer)

    pieces = (_to_chunks(hidden, chunk), _to_chunks(tokens, chunk))
    _, (logprobs, normalizer) = jax.lax.scan(body, None, pieces)
    logprobs, normalizer = _from_chunks(logprobs, length), _from_chunks(normalizer, length)
    return logprobs, (hidden, head, tokens, normalizer)


def _token_logprobs_backward(chunk_tokens, residuals, cotangent):
    """``d logits = ct (onehot - softmax)``, a chunk at a time; the head's gradient adds up."""
    hidden, head, tokens, normalizer = residuals
    batch, branches, length, _ = hidden.shape
    chunk = _chunk_length(batch, branches, length, chunk_tokens)

    # Differentiated once more (by an unrolled solver), a chunk is recomputed, not kept.
    @jax.checkpoint
    def body(head_gradient, piece):
        states, targets, log_z, ct = piece
        probabilities = jnp.exp(_logits(states, head) - log_z[..., None])
        is_target = jnp.arange(head.shape[1], dtype=targets.dtype) == targets[..., None]
        logit_gradient = ct[..., None] * (is_target - probabilities)
        logit_gradient = logit_gradient.astype(head.dtype)
        state_gradient = jnp.einsum("bncv,dv->bncd", logit_gradient, head)
        head_gradient = head_gradient + jnp.einsum(
            "bncd,bncv->dv", states, logit_gradient, preferred_element_type=jnp.float32
        )
        return head_gradient, state_gradient

    # float32 whatever the head's dtype: thousands of small terms are added here.
    start = jnp.zeros(head.shape, jnp.float32)
    pieces = tuple(_to_chunks(x, chunk) for x in (hidden, tokens, normalizer, cotangent))
    head_gradient, state_gradient = jax.lax.scan(body, start, pieces)
    return _from_chunks(state_gradient, length), head_gradient.astype(head.dtype), None


_token_logprobs.defvjp(_token_logprobs_forward, _token_logprobs_backward)


def token_spread(
    hidden: Float[Array, "B n C D"],
    head: Float[Array, "D V"],
    *,
    top_k: int,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> tuple[Float[Array, "B n C"], Float[Array, "B n C"]]:
    """How spread out ``p = softmax(hidden @ head)`` is at each position, float32.

    ``-sum p log p`` over the whole vocabulary, in nats, and the probability that the ``top_k``
    likeliest tokens have together. ``chunk_tokens`` is as in ``token_logprobs``.
    """
    batch, branches, length, _ = hidden.shape
    chunk = _chunk_length(batch, branches, length, chunk_tokens)

    def body(_, states):
        logprobs = jax.nn.log_softmax(_logits(states, head), axis=-1)
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        likeliest, _ = jax.lax.top_k(logprobs, top_k)
        return None, (entropy, jnp.sum(jnp.exp(likeliest), axis=-1))

    _, (entropy, mass) = jax.lax.scan(body, None, _to_chunks(hidden, chunk))
    return _from_chunks(entropy, length), _from_chunks(mass, length)

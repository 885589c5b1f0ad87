"""Batched sampling with a KV cache."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from spo_jax.models import Cache, Model
from spo_jax.types import Params


def generate(
    model: Model,
    params: Params,
    prompt_tokens: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    *,
    max_new_tokens: int,
    temperature: float,
    eos_ids: tuple[int, ...],
    pad_id: int = 0,
    keys: UInt32[Array, "B 2"] | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, "B max_new_tokens"]:
    """Continue right-aligned prompts; each row is the completion with its EOS, then ``pad_id``.

    ``temperature=0`` takes the likeliest token. Otherwise token ``t`` of a row is drawn
    with ``fold_in(keys[row], t)``, so what is drawn for a prompt does not depend on which
    rows are beside it; from the ``top_k`` likeliest tokens, of these from the fewest that
    hold ``top_p`` of their mass at that temperature (``truncate``). Compiled once for each
    shape; stops when every row has its EOS.

    Raises:
        ValueError: a setting out of its range, or one that the greedy choice would ignore.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: use at least 1")
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: use 0 (greedy) or more")
    if temperature > 0 and keys is None:
        raise ValueError(f"temperature={temperature} draws at random: pass keys, one a row")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError(
            f"top_k={top_k}, top_p={top_p} would be ignored: temperature 0 takes the likeliest "
            "token"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: use at least 1, or none")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: use more than 0, up to 1")
    return _generate(
        model,
        params,
        prompt_tokens,
        prompt_mask,
        keys if temperature > 0 else None,
        jnp.float32(temperature),
        None if top_p is None else jnp.float32(top_p),
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        eos_ids=tuple(eos_ids),
        pad_id=pad_id,
    )


def truncate(
    logits: Float[Array, "B V"], *, top_k: int | None, top_p: Float[Array, ""] | None
) -> Float[Array, "B V"]:
    """Logits with what is not drawn from at ``-inf``: all but the ``top_k`` largest, then the tail.

    The tail is what remains behind the fewest largest that hold ``top_p`` of the mass; the
    largest always stays. Equal logits stay or go together. Source: Holtzman et al., arXiv
    1904.09751.
    """
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is None:
        return logits
    falling = jnp.sort(logits, axis=-1, descending=True)
    mass = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass
    # The first has nothing before it, whatever the rounding.
    kept = (before < top_p).at[:, 0].set(True)
    least = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


class _Progress(NamedTuple):
    step: Int[Array, ""]
    tokens: Int[Array, "B max_new_tokens"]
    done: Bool[Array, "B"]
    hidden: Float[Array, "B D"]
    cache: Cache


@functools.partial(
    jax.jit, static_argnames=("model", "max_new_tokens", "eos_ids", "pad_id", "top_k")
)
def _generate(
    model,
    params,
    prompt_tokens,
    prompt_mask,
    keys,
    temperature,
    top_p,
    *,
    top_k,
    max_new_tokens,
    eos_ids,
    pad_id,
):
    B, P = prompt_tokens.shape
    head = model.output_head(params).astype(model.execution.compute_dtype)
    eos = jnp.asarray(eos_ids, jnp.int32)

    def choose(hidden, step):
        logits = jnp.dot(hidden, head, preferred_element_type=jnp.float32)
        if keys is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        drawn = jax.vmap(
            lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row)
        )(keys, truncate(logits / temperature, top_k=top_k, top_p=top_p))
        return drawn.astype(jnp.int32)

    def unfinished(progress):
        return (progress.step < max_new_tokens) & ~jnp.all(progress.done)

    def advance(progress):
        step, tokens, done, hidden, cache = progress
        token = jnp.where(done, pad_id, choose(hidden, step))
        done |= jnp.any(token[:, None] == eos, axis=1)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, axis=1)
        hidden, cache = model.decode_step(params, cache, token)
        return _Progress(step + 1, tokens, done, hidden, cache)

    cache = model.init_cache(B, P + max_new_tokens)
    hidden, cache = model.prefill(params, cache, prompt_tokens, prompt_mask)
    start = _Progress(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((B, max_new_tokens), pad_id, jnp.int32),
        done=jnp.zeros((B,), bool),
        hidden=hidden,
        cache=cache,
    )
    return jax.lax.while_loop(unfinished, advance, start).tokens

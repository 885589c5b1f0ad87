"""Batched sampling with a KV cache."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from spo_jax.models import Cache, Model, grow_cache
from spo_jax.types import Params

NOT_FINITE = -1
"""The token of a row whose logits hold NaN or infinity: nothing is drawn from those."""


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
    hold ``top_p`` of their mass at that temperature (``truncate``). Stops when every row has
    its EOS. The cache grows in a few steps (``room_steps``), each compiled once a shape, so
    that short completions do not attend to the room that long ones would need. Where the logits
    of a row are not finite its token is ``NOT_FINITE`` and it ends.

    Raises:
        ValueError: a setting out of its range, or one that the greedy choice would ignore.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    if temperature > 0 and keys is None:
        raise ValueError(f"temperature={temperature} draws at random: pass keys, one a row")
    draw = _Draw(
        keys=keys if temperature > 0 else None,
        temperature=jnp.float32(temperature),
        top_p=None if top_p is None else jnp.float32(top_p),
    )
    settings = {"top_k": top_k, "eos_ids": tuple(eos_ids), "pad_id": pad_id}
    P = prompt_tokens.shape[1]
    rooms = room_steps(max_new_tokens)
    progress = _start(
        model, params, prompt_tokens, prompt_mask, draw,
        room=rooms[0], max_new_tokens=max_new_tokens, **settings,
    )  # fmt: skip
    for i, room in enumerate(rooms):
        if i:
            progress = progress._replace(cache=_grow(progress.cache, length=P + room))
        progress, finished = _advance(model, params, progress, draw, until=room, **settings)
        # Under an outer jit nothing is known yet: the steps to come then find nothing to do.
        if not isinstance(finished, jax.core.Tracer) and finished:
            break
    return progress.tokens


def check_sampling(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Raise ``ValueError`` for a setting out of its range, or that greedy would ignore."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: use at least 1")
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: use 0 (greedy) or more")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError(
            f"top_k={top_k}, top_p={top_p} would be ignored: temperature 0 takes the likeliest "
            "token"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: use at least 1, or none")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: use more than 0, up to 1")


_FIRST_ROOM = 128


def room_steps(max_new_tokens: int) -> tuple[int, ...]:
    """New tokens the cache has room for, step by step: 128, then doubled, up to the limit."""
    rooms = []
    room = _FIRST_ROOM
    while room < max_new_tokens:
        rooms.append(room)
        room *= 2
    return (*rooms, max_new_tokens)


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


class _Draw(NamedTuple):
    """How a token is drawn; without keys the likeliest is taken."""

    keys: UInt32[Array, "B 2"] | None
    temperature: Float[Array, ""]
    top_p: Float[Array, ""] | None


class _Progress(NamedTuple):
    """``step`` tokens are chosen; ``token``, the last of them, is not in the cache yet."""

    step: Int[Array, ""]
    tokens: Int[Array, "B max_new_tokens"]
    token: Int[Array, "B"]
    done: Bool[Array, "B"]
    cache: Cache


def _choose(head, hidden, step, draw: _Draw, top_k: int | None) -> Int[Array, "B"]:
    logits = jnp.dot(hidden, head, preferred_element_type=jnp.float32)
    # A NaN or an infinity comes through the largest; argmax alone would make a token of it.
    finite = jnp.isfinite(jnp.max(logits, axis=-1))
    if draw.keys is None:
        return jnp.where(finite, jnp.argmax(logits, axis=-1), NOT_FINITE).astype(jnp.int32)
    logits = truncate(logits / draw.temperature, top_k=top_k, top_p=draw.top_p)
    drawn = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))
    return jnp.where(finite, drawn(draw.keys, logits), NOT_FINITE).astype(jnp.int32)


def _put(progress: _Progress, chosen, cache: Cache, eos_ids, pad_id) -> _Progress:
    """Write down what was chosen for the rows that have no EOS yet."""
    token = jnp.where(progress.done, pad_id, chosen)
    ends = jnp.asarray([*eos_ids, NOT_FINITE], jnp.int32)
    ended = jnp.any(token[:, None] == ends, axis=1)
    tokens = jax.lax.dynamic_update_slice_in_dim(
        progress.tokens, token[:, None], progress.step, axis=1
    )
    return _Progress(progress.step + 1, tokens, token, progress.done | ended, cache)


_STATIC = ("model", "top_k", "eos_ids", "pad_id")


@functools.partial(jax.jit, static_argnames=(*_STATIC, "room", "max_new_tokens"))
def _start(
    model, params, prompt_tokens, prompt_mask, draw, *, room, max_new_tokens, top_k, eos_ids, pad_id
):
    B, P = prompt_tokens.shape
    cache = model.init_cache(B, P + room)
    hidden, cache = model.prefill(params, cache, prompt_tokens, prompt_mask)
    nothing = _Progress(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((B, max_new_tokens), pad_id, jnp.int32),
        token=jnp.zeros((B,), jnp.int32),
        done=jnp.zeros((B,), bool),
        cache=cache,
    )
    head = model.output_head(model.decode_params(params))
    return _put(nothing, _choose(head, hidden, 0, draw, top_k), cache, eos_ids, pad_id)


@functools.partial(jax.jit, static_argnames="length")
def _grow(cache, length):
    return grow_cache(cache, length)


@functools.partial(jax.jit, static_argnames=(*_STATIC, "until"), donate_argnames="progress")
def _advance(model, params, progress, draw, *, until, top_k, eos_ids, pad_id):
    """Choose tokens up to number ``until``; also whether every row is done."""
    params = model.decode_params(params)
    head = model.output_head(params)

    def unfinished(progress):
        return (progress.step < until) & ~jnp.all(progress.done)

    def advance(progress):
        hidden, cache = model.decode_step(params, progress.cache, progress.token)
        chosen = _choose(head, hidden, progress.step, draw, top_k)
        return _put(progress, chosen, cache, eos_ids, pad_id)

    progress = jax.lax.while_loop(unfinished, advance, progress)
    return progress, jnp.all(progress.done)

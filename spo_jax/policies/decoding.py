"""Batched sampling with a KV cache."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt32

from spo_jax.models import Cache, Model, grow_cache, take_rows
from spo_jax.parallel.constraints import platform
from spo_jax.parallel.processes import everywhere
from spo_jax.policies.live_rows import (
    count_live,
    live_first,
    pick_rows,
    put_rows,
    row_groups,
    row_steps,
)
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
    its EOS; those that have it leave the batch when half of its rows would do (``row_steps``),
    where that is worth compiling for the rest (``worth_steps``).
    The cache grows in a few steps (``room_steps``), each compiled once a shape, so that short
    completions do not attend to the room that long ones would need. Where the logits of a row
    are not finite its token is ``NOT_FINITE`` and it ends.

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
    B, P = prompt_tokens.shape
    rooms = room_steps(max_new_tokens)
    progress = _start(
        model, params, prompt_tokens, prompt_mask, draw,
        room=rooms[0], max_new_tokens=max_new_tokens, **settings,
    )  # fmt: skip
    # Behind the prompts: what those need beside the parameters is free again.
    params = _decode_params(model, params)
    groups = row_groups(model.mesh, B)
    # Under an outer jit nothing is known yet: no row is dropped, and the steps that come behind
    # the last EOS find nothing to do.
    traced = isinstance(progress.step, jax.core.Tracer)
    sizes = (B,) if traced else row_steps(B, groups)
    dropped, step, live = None, 1, B
    for room in rooms:
        while step < room and live:
            if max_new_tokens - step < worth_steps(model.mesh):
                sizes = sizes[:1]
            while len(sizes) > 1 and live <= sizes[1]:
                sizes = sizes[1:]
            if sizes[0] < len(progress.done):
                progress, draw, dropped = _drop(
                    model, progress, draw, dropped, size=sizes[0], groups=groups
                )
            if progress.cache.valid.shape[1] < P + room:
                progress = progress._replace(cache=_grow(progress.cache, length=P + room))
            fewer = sizes[1] if len(sizes) > 1 else 0
            progress, seen = _advance(
                model, params, progress, draw, fewer, until=room, groups=groups, **settings
            )
            if traced:
                break
            step, live = everywhere(seen).tolist()
    return progress.tokens if dropped is None else _together(model, progress.tokens, dropped)


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


def worth_steps(mesh: Mesh | None) -> int:
    """With fewer tokens to come, compiling for a smaller batch takes longer than it saves.

    An accelerator reads all weights at every step, for many rows as for few: milliseconds, and to
    compile takes seconds.
    """
    return 32 if platform(mesh) == "cpu" else 1024


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


class _Dropped(NamedTuple):
    """Tokens of all rows, and where those that are still computed belong in their group."""

    tokens: Int[Array, "B max_new_tokens"]
    places: Int[Array, "groups n"]


def _first_largest(x: Float[Array, "B V"]) -> Int[Array, "B"]:
    """``argmax`` in two passes: into one, a CPU draws the noise number by number."""
    largest = jnp.max(x, axis=-1, keepdims=True)
    places = jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(x == largest, places, x.shape[-1]), axis=-1)


def _choose(logits, step, draw: _Draw, top_k: int | None, mesh: Mesh | None) -> Int[Array, "B"]:
    # A NaN or an infinity comes through the largest; argmax alone would make a token of it.
    finite = jnp.isfinite(jnp.max(logits, axis=-1))
    if draw.keys is None:
        return jnp.where(finite, jnp.argmax(logits, axis=-1), NOT_FINITE).astype(jnp.int32)
    logits = truncate(logits / draw.temperature, top_k=top_k, top_p=draw.top_p)
    # As in jax.random.categorical.
    noise = jax.vmap(
        lambda key: jax.random.gumbel(jax.random.fold_in(key, step), logits.shape[1:], logits.dtype)
    )(draw.keys)
    noisy = noise + logits
    drawn = _first_largest(noisy) if platform(mesh) == "cpu" else jnp.argmax(noisy, axis=-1)
    return jnp.where(finite, drawn, NOT_FINITE).astype(jnp.int32)


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
    logits = model.decode_logits(model.decode_params(params), hidden)
    chosen = _choose(logits, 0, draw, top_k, model.mesh)
    return _put(nothing, chosen, cache, eos_ids, pad_id)


@functools.partial(jax.jit, static_argnames="model")
def _decode_params(model, params):
    return model.decode_params(params)


@functools.partial(jax.jit, static_argnames="length")
def _grow(cache, length):
    return grow_cache(cache, length)


@functools.partial(jax.jit, static_argnames=("model", "size", "groups"))
def _drop(model, progress, draw, dropped, *, size, groups):
    """Go on with ``size`` rows: the unfinished ones, and others where groups differ."""
    first = live_first(progress.done, groups, size)
    if dropped is None:
        tokens, places = progress.tokens, first
    else:
        tokens = _together(model, progress.tokens, dropped)
        places = jnp.take_along_axis(dropped.places, first, axis=1)

    def take(x):
        return pick_rows(x, first, model.mesh)

    own, token, done = (take(x) for x in (progress.tokens, progress.token, progress.done))
    progress = _Progress(progress.step, own, token, done, take_rows(progress.cache, take))
    keys = None if draw.keys is None else take(draw.keys)
    return progress, draw._replace(keys=keys), _Dropped(tokens, places)


@functools.partial(jax.jit, static_argnames="model")
def _together(model, tokens, dropped):
    return put_rows(dropped.tokens, dropped.places, tokens, model.mesh)


@functools.partial(
    jax.jit, static_argnames=(*_STATIC, "until", "groups"), donate_argnames="progress"
)
def _advance(model, params, progress, draw, fewer, *, until, groups, top_k, eos_ids, pad_id):
    """Choose tokens up to number ``until``, or until ``fewer`` rows would do.

    Also the number of tokens chosen and of rows needed.
    """

    def unfinished(progress):
        return (progress.step < until) & (count_live(progress.done, groups) > fewer)

    def advance(progress):
        hidden, cache = model.decode_step(params, progress.cache, progress.token)
        logits = model.decode_logits(params, hidden)
        chosen = _choose(logits, progress.step, draw, top_k, model.mesh)
        return _put(progress, chosen, cache, eos_ids, pad_id)

    progress = jax.lax.while_loop(unfinished, advance, progress)
    return progress, jnp.stack([progress.step, count_live(progress.done, groups)])

"""Second derivatives for fused kernels, which bring a first one only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name


def pullback_of_gradient(
    plain: Callable[..., Any], given: tuple[Any, ...], cotangent: Any, cotangents: Any
) -> tuple[Any, ...]:
    """Where the gradient of ``plain(*given)`` is differentiated: what its inputs get of it.

    ``cotangent`` is what that gradient was pulled back from, ``cotangents`` are those of its
    results. Returns those of ``given`` and, last, of ``cotangent``.
    """

    def gradient(*inputs):
        *given, cotangent = inputs
        return jax.vjp(plain, *given)[1](cotangent)

    return jax.vjp(gradient, *given, cotangent)[1](cotangents)


OUT = 4
"""The place of the output among what a pullback may hold."""


def with_second_derivative(kernel: Callable[..., Any], plain: Callable[..., Any], name: str):
    """``kernel(q, k, v, segment_ids, window)`` with its own gradient, and ``plain``'s beyond it.

    A fused kernel's backward pass is a kernel again, that nothing can differentiate; an
    unrolled solver has to. ``plain`` is the same function in ordinary operations: where the
    gradient is differentiated, and only there, its derivative is taken. What the kernel keeps for
    its backward pass is called ``name``, for rematerialization to save: not what it was given, nor
    what it makes of ``segment_ids``, which are whatever tells what may be seen.
    """

    def attention(q, k, v, segment_ids, window):
        pullbacks = []  # how the kernel's is built: known as soon as the forward pass is traced

        @jax.custom_vjp
        def forward(q, k, v, segment_ids):
            out, pullback = jax.vjp(lambda *x: kernel(*x, segment_ids, window), q, k, v)
            leaves, structure = jax.tree.flatten(pullback)
            known = (q, k, v, segment_ids, out)
            places = [next((i for i, x in enumerate(known) if x is leaf), None) for leaf in leaves]
            pullbacks.append((structure, places))
            return out, [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]

        def forward_pass(q, k, v, segment_ids):
            out, kept = forward(q, k, v, segment_ids)
            kept_out = None
            if OUT in pullbacks[-1][1]:
                out = kept_out = checkpoint_name(out, name)  # one array, saved once
            kept = [x if x.shape == segment_ids.shape else checkpoint_name(x, name) for x in kept]
            return (out, kept), (q, k, v, segment_ids, kept_out, kept)

        def forward_pullback(saved, cotangents):
            return *backward(*saved, cotangents[0]), None

        @jax.custom_vjp
        def backward(q, k, v, segment_ids, out, kept, cotangent):
            structure, places = pullbacks[-1]
            known, own = (q, k, v, segment_ids, out), iter(kept)
            leaves = [next(own) if place is None else known[place] for place in places]
            return jax.tree.unflatten(structure, leaves)(cotangent)

        def backward_pass(q, k, v, segment_ids, out, kept, cotangent):
            found = backward(q, k, v, segment_ids, out, kept, cotangent)
            return found, (q, k, v, segment_ids, cotangent)

        def backward_pullback(saved, cotangents):
            q, k, v, segment_ids, cotangent = saved

            def seen(q, k, v):
                return plain(q, k, v, segment_ids, window)

            # The output and what was kept are functions of q, k and v: their derivative is whole.
            *found, last = pullback_of_gradient(seen, (q, k, v), cotangent, cotangents)
            return *found, None, None, None, last

        forward.defvjp(forward_pass, forward_pullback)
        backward.defvjp(backward_pass, backward_pullback)
        return forward(q, k, v, segment_ids)[0]

    return attention

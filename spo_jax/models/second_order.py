"""Second derivatives for fused kernels, which bring a first one only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name


def with_second_derivative(kernel: Callable[..., Any], plain: Callable[..., Any], name: str):
    """``kernel(q, k, v, segment_ids, window)`` with its own gradient, and ``plain``'s beyond it.

    A fused kernel's backward pass is a kernel again, that nothing can differentiate; an
    unrolled solver has to. ``plain`` is the same function in ordinary operations: where the
    gradient is differentiated, and only there, its derivative is taken. What the kernel keeps for
    its backward pass is called ``name``, for rematerialization to save.
    """

    def attention(q, k, v, segment_ids, window):
        structures = []  # of the kernel's pullback: known as soon as the forward pass is traced

        @jax.custom_vjp
        def forward(q, k, v, segment_ids):
            out, pullback = jax.vjp(lambda *x: kernel(*x, segment_ids, window), q, k, v)
            kept, structure = jax.tree.flatten(pullback)
            structures.append(structure)
            return out, kept

        def forward_pass(q, k, v, segment_ids):
            out, kept = forward(q, k, v, segment_ids)
            kept = [checkpoint_name(x, name) for x in kept]
            return (out, kept), (q, k, v, segment_ids, kept)

        def forward_pullback(saved, cotangents):
            return *backward(*saved, cotangents[0]), None

        @jax.custom_vjp
        def backward(q, k, v, segment_ids, kept, cotangent):
            return jax.tree.unflatten(structures[-1], kept)(cotangent)

        def backward_pass(q, k, v, segment_ids, kept, cotangent):
            found = backward(q, k, v, segment_ids, kept, cotangent)
            return found, (q, k, v, segment_ids, cotangent)

        def backward_pullback(saved, cotangents):
            q, k, v, segment_ids, cotangent = saved

            def gradient(q, k, v, cotangent):
                return jax.vjp(lambda *x: plain(*x, segment_ids, window), q, k, v)[1](cotangent)

            # What the kernel kept is a function of q, k and v, and their derivative is whole.
            *found, last = jax.vjp(gradient, q, k, v, cotangent)[1](cotangents)
            return *found, None, None, last

        forward.defvjp(forward_pass, forward_pullback)
        backward.defvjp(backward_pass, backward_pullback)
        return forward(q, k, v, segment_ids)[0]

    return attention

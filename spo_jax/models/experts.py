"""The MLPs of experts: each computes the tokens that picked it, and no others.

Tokens are sorted by expert. A scan over the experts has one's matrices at hand at a time; inside,
a loop goes over as many blocks of its tokens as there are, the last one filled up. No token is left
out, whatever the router does. ``every_expert`` is the same function in ordinary operations, each
expert on each token: where a gradient is differentiated, its derivative is taken.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from spo_jax.models.second_order import pullback_of_gradient
from spo_jax.parallel.constraints import ROWS, parts

LARGEST_BLOCK, SMALLEST_BLOCK = 512, 16
"""Tokens that are multiplied with an expert's matrices at once. Half of what an expert has on
average: a last block that is half empty is then a quarter more work."""


class Matrices(NamedTuple):
    """Of all experts: ``down(activation(gate(x)) * up(x))``."""

    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]


Activation = Callable[[Any], Any]


def every_expert(
    x: Float[Array, "B T D"],
    shares: Float[Array, "B T k"],
    matrices: Matrices,
    picked: Int[Array, "B T k"],
    *,
    activation: Activation,
) -> Float[Array, "B T D"]:
    """``sum_k shares_k MLP_{picked_k}(x)`` in float32, by every expert on every token.

    In memory for one expert, and ``E / k`` times the arithmetic that is needed.
    """
    chosen = picked[..., None] == jnp.arange(matrices.gate.shape[0])
    weights = jnp.sum(jnp.where(chosen, shares[..., None], 0), axis=-2)

    @jax.checkpoint
    def add(total, expert):
        (gate, up, down), weight = jax.tree.map(lambda m: m.astype(x.dtype), expert[0]), expert[1]
        inner = activation(x @ gate) * (x @ up)
        out = jnp.matmul(inner, down, preferred_element_type=jnp.float32)
        return total + weight[..., None] * out, None

    start = jnp.zeros(x.shape, jnp.float32)
    return jax.lax.scan(add, start, (matrices, jnp.moveaxis(weights, -1, 0)))[0]


def picked_experts(
    x: Float[Array, "B T D"],
    shares: Float[Array, "B T k"],
    matrices: Matrices,
    picked: Int[Array, "B T k"],
    *,
    activation: Activation,
    mesh: Mesh | None = None,
) -> Float[Array, "B T D"]:
    """``every_expert`` at the cost of those that are picked.

    On a ``mesh`` each device takes its rows, cut over ``data`` and ``fsdp``, and its columns of
    the matrices, cut over ``tensor``; the matrices of one expert at a time are gathered over
    ``fsdp``. What its axes do not divide is not cut.
    """
    run = _placed(x.shape, matrices.gate.shape, activation, mesh)

    @jax.custom_vjp
    def forward(x, shares, matrices, picked):
        return run.forward(x, shares, matrices, picked)

    def forward_pass(x, shares, matrices, picked):
        return forward(x, shares, matrices, picked), (x, shares, matrices, picked)

    def forward_pullback(saved, cotangent):
        return *backward(*saved, cotangent), None

    @jax.custom_vjp
    def backward(x, shares, matrices, picked, cotangent):
        return run.backward(x, shares, matrices, picked, cotangent)

    def backward_pass(*given):
        return backward(*given), given

    def backward_pullback(saved, cotangents):
        *given, picked, cotangent = saved

        def plain(x, shares, matrices):
            return every_expert(x, shares, matrices, picked, activation=activation)

        *found, last = pullback_of_gradient(plain, tuple(given), cotangent, cotangents)
        return *found, None, last

    forward.defvjp(forward_pass, forward_pullback)
    backward.defvjp(backward_pass, backward_pullback)
    return forward(x, shares, matrices, picked)


class _Run(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]


class _Axes(NamedTuple):
    """The mesh axes that rows, the width of the model and that of an expert are cut over."""

    rows: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()


def _placed(shape, gate_shape, activation: Activation, mesh: Mesh | None) -> _Run:
    if mesh is None or mesh.size == 1:
        options = {"activation": activation, "axes": _Axes()}
        return _Run(functools.partial(_forward, **options), functools.partial(_backward, **options))
    axes = _Axes(
        ROWS if shape[0] % parts(ROWS, mesh) == 0 else (),
        ("fsdp",) if gate_shape[1] % mesh.shape["fsdp"] == 0 else (),
        ("tensor",) if gate_shape[2] % mesh.shape["tensor"] == 0 else (),
    )
    options = {"activation": activation, "axes": axes}
    rows, up = P(axes.rows or None), P(None, axes.model or None, axes.wide or None)
    matrices = Matrices(up, up, P(None, axes.wide or None, axes.model or None))
    # A loop as long as a device's own tokens does not say over which axes its results vary.
    shard = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    given = (rows, rows, matrices, rows)
    return _Run(
        shard(functools.partial(_forward, **options), in_specs=given, out_specs=rows),
        shard(
            functools.partial(_backward, **options),
            in_specs=(*given, rows),
            out_specs=(rows, rows, matrices),
        ),
    )


class _Routes(NamedTuple):
    """A device's tokens by expert: pair ``i`` is choice ``i % k`` of token ``i // k``."""

    order: Int[Array, " M"]
    """Pairs, those of the first expert first."""
    places: Int[Array, " M"]
    """Where each pair stands in that order."""
    starts: Int[Array, " E"]
    counts: Int[Array, " E"]
    block: int

    @staticmethod
    def of(picked: Int[Array, "N k"], experts: int) -> _Routes:
        flat = picked.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        counts = jnp.bincount(flat, length=experts)
        average = max(1, flat.size // (2 * experts))
        block = max(SMALLEST_BLOCK, min(LARGEST_BLOCK, 1 << (average - 1).bit_length()))
        starts = jnp.cumsum(counts) - counts
        return _Routes(order, jnp.argsort(order), starts, counts, min(block, flat.size))

    def each_block(self, count, body, carry):
        """``body(number, carry)`` for the blocks that hold ``count`` pairs.

        The scope says, for ``spo-jax plan``, how many they are if all experts are equally busy.
        """
        average = self.order.size / (self.counts.size * self.block)
        with jax.named_scope(f"about_{math.ceil(average)}_turns"):
            return jax.lax.fori_loop(0, -(-count // self.block), body, carry)

    def rows(self, start, count, number):
        """Of block ``number`` of an expert: its place in the order, its pairs, which are real."""
        place = start + number * self.block
        at = place + jnp.arange(self.block)
        return place, self.order[jnp.minimum(at, self.order.size - 1)], at < start + count

    def room(self, width: tuple[int, ...], dtype) -> Array:
        """For a value of each pair in that order; a last block may reach beyond the end."""
        return jnp.zeros((self.order.size + self.block, *width), dtype)


def _gathered(expert: Matrices, axes: _Axes, dtype) -> Matrices:
    """The whole of what a device multiplies with."""
    expert = jax.tree.map(lambda m: m.astype(dtype), expert)
    if not axes.model:
        return expert
    whole = functools.partial(jax.lax.all_gather, axis_name=axes.model, tiled=True)
    return Matrices(
        whole(expert.gate, axis=0), whole(expert.up, axis=0), whole(expert.down, axis=1)
    )


def _summed(grads: Matrices, axes: _Axes, dtype) -> Matrices:
    """Over the devices that have other rows, each with its part as the matrices are cut.

    They travel in the dtype of the products, as the partitioner sends those of other matrices.
    """
    if axes.rows:
        grads = jax.tree.map(lambda x: x.astype(dtype), grads)
    others = tuple(name for name in axes.rows if name not in axes.model)
    if others:
        grads = jax.tree.map(lambda x: jax.lax.psum(x, others), grads)
    if not axes.model:
        return grads
    if not axes.rows:  # the same rows everywhere: each takes its part

        def part(x, axis):
            size = x.shape[axis] // jax.lax.axis_size(axes.model[0])
            at = jax.lax.axis_index(axes.model[0]) * size
            return jax.lax.dynamic_slice_in_dim(x, at, size, axis)
    else:

        def part(x, axis):
            return jax.lax.psum_scatter(x, axes.model, scatter_dimension=axis, tiled=True)

    return Matrices(part(grads.gate, 0), part(grads.up, 0), part(grads.down, 1))


def _over(names: tuple[str, ...], value):
    return jax.lax.psum(value, names) if names else value


def _forward(x, shares, matrices, picked, *, activation: Activation, axes: _Axes):
    """A device's rows: ``[B, T, D]`` in float32."""
    rows, k = x.reshape(-1, x.shape[-1]), picked.shape[-1]
    routes = _Routes.of(picked.reshape(-1, k), matrices.gate.shape[0])

    def one(out, expert):
        mine, start, count = expert
        gate, up, down = _gathered(mine, axes, x.dtype)

        def block(number, out):
            place, pairs, _ = routes.rows(start, count, number)
            tokens = rows[pairs // k]
            inner = activation(tokens @ gate) * (tokens @ up)
            # What is written beyond the expert's own rows, the next one writes over.
            return jax.lax.dynamic_update_slice_in_dim(out, inner @ down, place, 0)

        return routes.each_block(count, block, out), None

    room = routes.room(rows.shape[1:], x.dtype)
    out, _ = jax.lax.scan(one, room, (matrices, routes.starts, routes.counts))
    found = out[routes.places].reshape(-1, k, rows.shape[1]).astype(jnp.float32)
    total = jnp.einsum("nk,nkd->nd", shares.reshape(-1, k), found)
    return _over(axes.wide, total).reshape(x.shape)


def _backward(x, shares, matrices, picked, cotangent, *, activation: Activation, axes: _Axes):
    """Gradients of ``x``, ``shares`` and ``matrices``; the forward pass is computed again."""
    rows, k = x.reshape(-1, x.shape[-1]), picked.shape[-1]
    routes = _Routes.of(picked.reshape(-1, k), matrices.gate.shape[0])
    weights, above = shares.reshape(-1), cotangent.reshape(rows.shape)

    def one(carry, expert):
        mine, start, count = expert
        gate, up, down = whole = _gathered(mine, axes, x.dtype)

        def block(number, carry):
            out, share_out, grads = carry
            place, pairs, real = routes.rows(start, count, number)
            tokens = rows[pairs // k]
            weight = weights[pairs]
            from_above = jnp.where(real[:, None], above[pairs // k], 0).astype(x.dtype)

            def inner_of(gated, upped):
                return activation(gated) * upped

            inner, pull = jax.vjp(inner_of, tokens @ gate, tokens @ up)
            to_inner = from_above @ down.T
            share_grad = jnp.sum((inner * to_inner).astype(jnp.float32), axis=-1)
            to_gate, to_up = pull((weight[:, None] * to_inner).astype(x.dtype))
            weighed = (weight[:, None] * from_above).astype(x.dtype)
            grads = jax.tree.map(
                lambda total, left, right: (
                    total + jnp.matmul(left.T, right, preferred_element_type=jnp.float32)
                ),
                grads,
                Matrices(tokens, tokens, inner),
                Matrices(to_gate, to_up, weighed),
            )
            token_grad = to_gate @ gate.T + to_up @ up.T
            write = jax.lax.dynamic_update_slice_in_dim
            return write(out, token_grad, place, 0), write(share_out, share_grad, place, 0), grads

        zeros = jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.float32), whole)
        *carry, grads = routes.each_block(count, block, (*carry, zeros))
        grads = _summed(grads, axes, x.dtype)
        return tuple(carry), jax.tree.map(lambda g, m: g.astype(m.dtype), grads, mine)

    room = routes.room(rows.shape[1:], x.dtype), routes.room((), jnp.float32)
    (out, share_out), grads = jax.lax.scan(one, room, (matrices, routes.starts, routes.counts))
    found = out[routes.places].reshape(-1, k, rows.shape[1]).astype(jnp.float32)
    to_x = _over(axes.wide, jnp.sum(found, axis=1)).astype(x.dtype).reshape(x.shape)
    to_shares = _over(axes.wide, share_out[routes.places]).reshape(shares.shape)
    return to_x, to_shares.astype(shares.dtype), grads

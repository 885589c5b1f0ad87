"""Attention a block of queries at a time: equal to XLA's, and nothing as large as its scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.models.attention import BranchAttention, Layout, in_blocks, split_branches
from spo_jax.models.blocked import BLOCK, MOST_BLOCKS, _blocks
from tests.hlo import largest_array_elements
from tests.models.test_splash import mesh_of


def problem(prompt, branches, completion, dtype=jnp.float32):
    """Queries, keys, values and readout weights of three rows; the second is padded, one empty."""
    rng = np.random.default_rng(prompt + completion)
    packed, heads, groups, width = prompt + branches * completion, 4, 2, 16
    q, k, v, g = (
        jnp.asarray(rng.normal(size=(3, packed, n, width)), dtype)
        for n in (heads, groups, groups, heads)
    )
    real = np.ones((3, packed), bool)
    real[1, : prompt // 2] = False
    real[2, :prompt] = False
    return (q, k, v), g, jnp.asarray(real), Layout(prompt, branches, completion)


def attended(name, real, layout, window):
    segments = split_branches(real, layout).astype(jnp.int32)
    context = BranchAttention(segments, layout, name, None)
    return lambda q, k, v: context.attend(q, k, v, window, None)[0]


def readout(attend, real, weights):
    """A number whose gradient is one of every real output."""

    def value(q, k, v):
        out = jnp.where(real[..., None, None], attend(q, k, v), 0).astype(jnp.float32)
        return jnp.sum(jnp.sin(out) * weights.astype(jnp.float32)), out

    return value


@pytest.mark.wide
@pytest.mark.parametrize(
    ("prompt", "branches", "completion", "window"),
    [
        (150, 2, 200, None),
        (128, 2, 128, 40),
        (20, 3, 150, 170),
        (20, 2, 300, 40),
        (300, 1, 0, 7),
        (0, 1, 130, None),
        (3, 2, 5, 2),
        (150, 2, 140, jnp.asarray(33)),
    ],
)
def test_equals_xla_in_values_and_gradients(prompt, branches, completion, window):
    inputs, weights, real, layout = problem(prompt, branches, completion)
    found, expected = (
        jax.jit(jax.value_and_grad(readout(attended(*of), real, weights), (0, 1, 2), has_aux=True))(
            *inputs
        )
        for of in (("blocked", real, layout, window), ("xla", real, layout, window))
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.wide
@pytest.mark.parametrize(("dtype", "close"), [(jnp.bfloat16, 0.03), (jnp.float16, 0.004)])
def test_sixteen_bits_are_close_to_32(dtype, close):
    inputs, _, real, layout = problem(140, 2, 30, dtype)
    out = attended("blocked", real, layout, None)(*inputs)
    assert out.dtype == dtype
    expected = attended("xla", real, layout, None)(*(x.astype(jnp.float32) for x in inputs))
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=close, atol=close)


@pytest.mark.parametrize("window", [None, 170])
def test_no_gradient_is_padded_to_the_whole(window):
    """What a slice would do, once for each block."""
    inputs, weights, real, layout = problem(150, 2, 200)
    attend = readout(attended("blocked", real, layout, window), real, weights)
    gradient = jax.jit(jax.grad(lambda *x: attend(*x)[0], (0, 1, 2)))
    assert "stablehlo.pad" not in gradient.lower(*inputs).as_text()


@pytest.mark.slow
def test_second_derivatives_equal_xlas():
    """Unrolled solvers differentiate a gradient."""
    (q, k, v), weights, real, layout = problem(130, 2, 6)

    def derivative(name):
        value = readout(attended(name, real, layout, 50), real, weights)

        def norm_of_gradient(q):
            found = jax.grad(value, (0, 1, 2), has_aux=True)(q, k, v)[0]
            return sum(jnp.sum(x**2) for x in found)

        return jax.jit(jax.grad(norm_of_gradient))(q)

    np.testing.assert_allclose(derivative("blocked"), derivative("xla"), rtol=1e-3, atol=1e-3)


def test_prompt_and_branches_see_nothing_of_a_branch_beside_them():
    inputs, _, real, layout = problem(10, 2, 140)
    attend = attended("blocked", real, layout, None)
    other = tuple(x.at[:, 10:150].add(1.0) for x in inputs)  # branch 0
    changed = np.asarray(attend(*inputs) != attend(*other)).any((0, 2, 3))
    assert changed[10:150].all()
    assert not changed[:10].any()
    assert not changed[150:].any()


def test_no_array_is_as_large_as_the_scores():
    (q, k, v), weights, real, layout = problem(256, 2, 512)
    gradient = jax.grad(readout(attended("blocked", real, layout, None), real, weights), (0, 1, 2),
                        has_aux=True)  # fmt: skip
    text = jax.jit(gradient).lower(q, k, v).compile().as_text()
    rows, heads, length = 3 * 2, 4, 256 + 512
    # One block's scores of one branch, all keys in sight.
    assert largest_array_elements(text) <= max(q.size * 2, 3 * heads * BLOCK * length)
    assert 3 * heads * BLOCK * length < rows * heads * length**2 / 8


@pytest.mark.parametrize("completion", [100, 5000, 100_000])
def test_blocks_are_few_and_cover_every_query_once(completion):
    found = list(_blocks(1000, 2, completion, None))
    assert len(found) <= 2 * (MOST_BLOCKS + 2)
    places = [(b.branch, i) for b in found for i in range(b.start, b.stop)]
    expected = [(0, i) for i in range(1000)]
    expected += [(b, 1000 + i) for b in range(2) for i in range(completion)]
    assert places == expected
    assert all(b.first == 0 for b in found)


@pytest.mark.on_cpu
def test_where_it_is_taken():
    assert in_blocks("auto", None)  # tests run on a CPU
    assert in_blocks("blocked", None)
    assert not in_blocks("xla", None)
    assert in_blocks("auto", mesh_of("gpu"), 50.0)  # no other has a cap on the scores
    assert not in_blocks("auto", mesh_of("gpu"))

"""Loops and bytes read off compiled modules: small programs whose counts are known."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from spo_jax.models.experts import Matrices, picked_experts
from spo_jax.parallel.mesh import make_mesh
from spo_jax.plan.counts import Unreadable, collectives, count, memory_traffic, products
from spo_jax.plan.hlo import Array, read_module, trip_count, unknown_loops, visits


def module_of(function, *arguments):
    return read_module(jax.jit(function).lower(*arguments).compile().as_text())


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def unmarked(function, *arguments):
    """The module without XLA's own note of how often loops turn, as a TPU's has none."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert "known_trip_count" in text
    return read_module(re.sub(r'"known_trip_count":\{[^}]*\},?', "", text))


def loops(module):
    found = (v for v in visits(module) if v.instruction.opcode == "while")
    return [trip_count(module, v.computation, v.instruction) for v in found]


def stacked(x, w):
    return jax.lax.scan(lambda c, wi: (jnp.tanh(c @ wi), None), x, w)[0]


def nested(x, w):
    def outer(c, _):
        return stacked(c, w), None

    return jax.lax.scan(outer, x, length=3)[0]


def counted(x, w, *, first, last, step=1):
    def turn(carry):
        i, x = carry
        return i + step, jnp.tanh(x @ w)

    return jax.lax.while_loop(lambda carry: carry[0] < last, turn, (first, x))[1]


@pytest.mark.parametrize("read", [module_of, unmarked])
def test_a_product_in_a_loop_counts_as_often_as_the_loop_turns(read):
    module = read(stacked, shape(4, 8), shape(5, 8, 8))
    assert loops(module) == [5]
    assert products(module).flops == 5 * 2 * 4 * 8 * 8


@pytest.mark.parametrize("read", [module_of, unmarked])
def test_a_loop_in_a_loop_multiplies(read):
    module = read(nested, shape(4, 8), shape(5, 8, 8))
    assert sorted(loops(module)) == [3, 5]
    assert products(module).flops == 3 * 5 * 2 * 4 * 8 * 8


@pytest.mark.parametrize(
    ("first", "last", "step", "turns"), [(0, 7, 1, 7), (2, 11, 1, 9), (0, 7, 2, 4), (9, 3, 1, 0)]
)
def test_turns_from_start_limit_and_step(first, last, step, turns):
    function = partial(counted, first=first, last=last, step=step)
    if turns == 0:
        text = jax.jit(partial(counted, first=0, last=3)).lower(shape(4, 8), shape(8, 8))
        text = re.sub(r'"known_trip_count":\{[^}]*\},?', "", text.compile().as_text())
        module = read_module(re.sub(r"constant\(3\)", "constant(-2)", text))
    else:
        module = unmarked(function, shape(4, 8), shape(8, 8))
    assert loops(module) == [turns]
    assert unknown_loops(module) == 0


def test_a_loop_that_data_ends_is_counted_once_and_said_so():
    def until_small(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x @ w, x)

    module = module_of(until_small, shape(4, 8), shape(8, 8))
    assert loops(module) == [None]
    assert unknown_loops(module) == 1
    assert products(module).flops == 2 * 4 * 8 * 8


def test_a_loop_that_says_how_often_it_turns_on_average_is_counted_so():
    """An expert's tokens: 512 choices, 8 experts, blocks of 32."""
    given = shape(4, 64, 16), shape(4, 64, 2), shape(8, 16, 32), shape(8, 16, 32), shape(8, 32, 16)

    def layer(x, shares, *matrices):
        picked = jnp.zeros(shares.shape, jnp.int32)
        return picked_experts(x, shares, Matrices(*matrices), picked, activation=jnp.tanh)

    module = module_of(layer, *given)
    assert unknown_loops(module) == 0
    assert 2 in loops(module)
    in_products = 8 * 2 * 32 * 3 * 2 * 16 * 32
    assert products(module).flops == pytest.approx(in_products, rel=0.02)  # and the weighing


def test_batched_products_and_their_gradient():
    def attention(q, k):
        return jnp.sum(jnp.einsum("bqhd,bkhd->bhqk", q, k) ** 2)

    q, k = shape(2, 6, 3, 8), shape(2, 5, 3, 8)
    once = 2 * 2 * 3 * 6 * 5 * 8
    assert products(module_of(attention, q, k)).flops == once
    assert products(module_of(jax.grad(attention, argnums=(0, 1)), q, k)).flops == 3 * once


# Collectives

MESH = make_mesh(data=4, tensor=2)
ELEMENTS = 24
"""Of float32 on each device: 96 bytes."""


def on_mesh(function, *, turns=1, axis="data"):
    """``function`` of a device's 24 numbers, ``turns`` times in a loop."""

    def body(x):
        def turn(carry, _):
            # A use that keeps the loop's collective inside of it.
            return carry * 1.5 + jnp.sum(function(carry)), None

        return jax.lax.scan(turn, x, length=turns)[0]

    names = ("data", "tensor")
    local = jax.shard_map(body, mesh=MESH, in_specs=P(names), out_specs=P(names), check_vma=False)
    return [row for row in collectives(module_of(local, shape(8 * ELEMENTS))) if row.kind]


KINDS = {
    "all-reduce": (lambda x: jax.lax.psum(x, "data"), 4, 96, 2 * 96 * 3 // 4),
    "all-gather": (lambda x: jax.lax.all_gather(x, "data"), 4, 96, 96 * 3),
    "reduce-scatter": (
        lambda x: jax.lax.psum_scatter(x, "data", tiled=True), 4, 96, 96 * 3 // 4,
    ),
    "all-to-all": (
        lambda x: jax.lax.all_to_all(x.reshape(4, 6), "data", 0, 0), 4, 96, 96 * 3 // 4,
    ),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)]), 2, 96, 96,
    ),
}  # fmt: skip


@pytest.mark.parametrize("turns", [1, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_a_collective(kind, turns):
    function, group, given, sent = KINDS[kind]
    found = [row for row in on_mesh(function, turns=turns) if row.kind == kind]
    assert found == [(kind, group, turns, turns * given, turns * sent)]


def test_groups_are_those_of_the_axis():
    found = on_mesh(lambda x: jax.lax.psum(x, "tensor"))
    assert [(row.kind, row.group) for row in found] == [("all-reduce", 2)]


# A TPU's text, written by hand

TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%start (p: bf16[64,128]) -> (bf16[256,128], s32[2]) {
  %p = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %begun = (bf16[256,128]{1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[64,128], q: bf16[8,16,64], r: bf16[8,32,64]) -> bf16[8,16,32] {
  %p.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[8,16,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %r = bf16[8,32,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(2)
  %gather.2 = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %product = bf16[8,16,32]{2,1,0:T(8,128)(2,1)} convolution(%q, %r), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->0bf
}

%all-reduce-scatter.3 (s: f32[4,32]) -> f32[1,32] {
  %s = f32[4,32]{1,0:T(8,128)} parameter(0)
  %reduced = f32[4,32]{1,0:T(8,128)} all-reduce(%s), channel_id=9, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %zero = s32[]{:T(128)} constant(0)
  ROOT %mine = f32[1,32]{1,0:T(8,128)} dynamic-slice(%reduced, %zero, %zero), dynamic_slice_sizes={1,32}
}

%elsewhere (t: f32[10,32]) -> f32[5,32] {
  %t = f32[10,32]{1,0:T(8,128)} parameter(0)
  ROOT %half = f32[5,32]{1,0:T(8,128)} slice(%t), slice={[0:5], [0:32]}
}, execution_thread="sparsecore"

ENTRY %main (w: bf16[64,128], x: bf16[8,16,64], y: bf16[8,32,64], z: f32[4,32], stack: f32[10,32]) -> bf16[8,16,32] {
  %w = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[8,16,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %y = bf16[8,32,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(2)
  %z = f32[4,32]{1,0:T(8,128)} parameter(3)
  %stack = f32[10,32]{1,0:T(8,128)} parameter(4)
  %one = s32[]{:T(128)} constant(1)
  %fused.1 = (bf16[256,128]{1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}) fusion(%w), kind=kCustom, calls=%start
  %fused.2 = bf16[8,16,32]{2,1,0:T(8,128)(2,1)} fusion(%w, %x, %y), kind=kOutput, calls=%beside
  %fused.3 = f32[1,32]{1,0:T(8,128)} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.3
  %small = f32[4,32]{1,0:T(8,128)} all-reduce(%z), channel_id=10, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, to_apply=%add
  %row = f32[1,32]{1,0:T(8,128)} dynamic-slice(%stack, %one, %one), dynamic_slice_sizes={1,32}
  %kernel.1 = f32[4,32]{1,0:T(8,128)} custom-call(%z), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"note":"goes on over the line }"
}}, metadata={op_name="mine"}
  %begin = ((f32[10,32]{1,0:T(8,128)}), f32[5,32]{1,0:T(8,128)}, u32[]{:S(8)}) async-start(%stack), async_execution_thread="sparsecore", calls=%elsewhere
  %end = f32[5,32]{1,0:T(8,128)} async-done(%begin)
  %ahead = (f32[4,32]{1,0:T(8,128)S(1)}, f32[4,32]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%z)
  %there = f32[4,32]{1,0:T(8,128)S(1)} copy-done(%ahead)
  %quick = f32[4,32]{1,0:T(8,128)S(1)} negate(%there)
  ROOT %result = bf16[8,16,32]{2,1,0:T(8,128)(2,1)} copy(%fused.2)
}
"""  # noqa: E501


def test_a_collective_written_into_several_fusions_is_one():
    found = {(row.kind, row.group): row[2:] for row in collectives(read_module(TPU))}
    gathered = 64 * 128 * 2
    assert found == {
        ("all-gather", 4): (1, gathered, 3 * gathered),
        ("reduce-scatter", 2): (1, 512, 256),
        ("all-reduce", 2): (1, 512, 512),
    }


def test_a_batched_product_as_a_tpu_writes_it():
    found = products(read_module(TPU))
    assert found.flops == 2 * 8 * 16 * 32 * 64
    assert found.opaque == {"tpu_custom_call": 1}


def test_what_a_kernel_says_of_itself_is_counted():
    said = 'custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"777"}}'
    text = TPU.replace('custom_call_target="tpu_custom_call"', said)
    found = products(read_module(text))
    assert (found.flops, found.opaque) == (2 * 8 * 16 * 32 * 64 + 777, {})


def test_splash_attention_counts_the_blocks_it_visits():
    operands = "%grid, %grid, %q"
    text = f"""\
HloModule jit_step

ENTRY %main (grid: s8[1,4,4], q: bf16[2,3,64,16]) -> bf16[2,3,64,16] {{
  %grid = s8[1,4,4]{{2,1,0}} parameter(0)
  %q = bf16[2,3,64,16]{{3,2,1,0}} parameter(1)
  ROOT %splash_mha_fwd_segmented.3 = bf16[2,3,64,16]{{3,2,1,0}} custom-call({operands}), custom_call_target="tpu_custom_call"
}}
"""  # noqa: E501
    pairs = 10 * 16 * 16  # of 4 x 4 blocks of 16 those on and below the diagonal
    assert products(read_module(text)).flops == 2 * 2 * 2 * 3 * 16 * pairs
    text = text.replace("fwd", "dkv")
    assert products(read_module(text)).flops == 4 * 2 * 2 * 3 * 16 * pairs
    text = text.replace("1,4,4", "1,4,2")  # a window: no more than two blocks a row
    assert products(read_module(text)).flops == 4 * 2 * 2 * 3 * 16 * 7 * 16 * 16


def test_memory_traffic_leaves_out_fast_memory_and_counts_slices():
    weights, gathered, out = 64 * 128 * 2, 256 * 128 * 2, 8 * 16 * 32 * 2
    start = weights + gathered
    beside = weights + out  # its other operands lie in memory space 1
    scattered = 512 + 128
    small, kernel = 512 + 512, 512 + 512
    row = 2 * 32 * 4  # of the stack one row, read and written
    copied = 2 * out
    half, ahead = 2 * 5 * 32 * 4, 512  # in another thread; into faster memory
    expected = start + beside + scattered + small + kernel + row + copied + half + ahead
    assert memory_traffic(read_module(TPU)) == expected


def test_a_slice_taken_in_a_fusion_within_a_fusion_is_no_whole_array():
    text = """\
HloModule jit_step

%layer (i: s32[], stack: bf16[24,8,4]) -> bf16[8,4] {
  %stack = bf16[24,8,4]{2,1,0} parameter(1)
  %i = s32[] parameter(0)
  %zero = s32[] constant(0)
  %own = bf16[1,8,4]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,8,4}
  ROOT %flat = bf16[8,4]{1,0} bitcast(%own)
}

%product (x: bf16[2,8], all: bf16[24,8,4], at: s32[]) -> bf16[2,4] {
  %x = bf16[2,8]{1,0} parameter(0)
  %at = s32[] parameter(2)
  %all = bf16[24,8,4]{2,1,0} parameter(1)
  %weights = bf16[8,4]{1,0} fusion(%at, %all), kind=kLoop, calls=%layer
  ROOT %out = bf16[2,4]{1,0} convolution(%x, %weights), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[2,8], all: bf16[24,8,4], at: s32[]) -> bf16[2,4] {
  %x = bf16[2,8]{1,0} parameter(0)
  %all = bf16[24,8,4]{2,1,0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %result = bf16[2,4]{1,0} fusion(%x, %all, %at), kind=kOutput, calls=%product
}
"""
    index = 4
    assert memory_traffic(read_module(text)) == 2 * (2 * 8 + 8 * 4 + 2 * 4) + index
    used_whole = text.replace("%stack, %i, %zero, %zero), dynamic", "%stack), dynamic")
    used_whole = used_whole.replace("dynamic-slice(", "negate(")
    assert memory_traffic(read_module(used_whole)) == 2 * (2 * 8 + 24 * 8 * 4 + 2 * 4)


def test_arrays_of_odd_dtypes():
    assert Array("pred", (3, 5)).bytes == 15
    assert Array("s4", (8,)).bytes == 4
    assert Array("f8e4m3fn", (8,)).bytes == 8
    assert Array("f32", ()).bytes == 4


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        read_module("HloModule empty\n")
    for text in ("HloModule empty\n", TPU.replace("%beside (", "%gone (")):
        with pytest.raises(Unreadable, match=r"ValueError|KeyError"):
            count(text)


def test_everything_is_counted_at_once():
    module, found = read_module(TPU), count(TPU)
    assert found.products == products(module)
    assert found.collectives == collectives(module)
    assert (found.memory_traffic, found.unknown_loops) == (memory_traffic(module), 0)


GPU = """\
HloModule jit_step

%into (p.0: bf16[28,64,32], p.1: s32[], p.2: bf16[64,32]) -> bf16[28,64,32] {
  %p.0 = bf16[28,64,32]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %p.2 = bf16[64,32]{1,0} parameter(2)
  %row = bf16[1,64,32]{2,1,0} bitcast(%p.2)
  %zero = s32[] constant(0)
  ROOT %put = bf16[28,64,32]{2,1,0} dynamic-update-slice(%p.0, %row, %p.1, %zero, %zero)
}

%from (q.0: f32[28,64], q.1: s32[]) -> f32[1,64] {
  %q.0 = f32[28,64]{1,0} parameter(0)
  %q.1 = s32[] parameter(1)
  %first = s32[] constant(0)
  ROOT %cut = f32[1,64]{1,0} dynamic-slice(%q.0, %q.1, %first), dynamic_slice_sizes={1,64}
}

ENTRY %main (stack: bf16[28,64,32], i: s32[], x: bf16[64,32], scales: f32[28,64]) -> bf16[28,64,32] {
  %stack = bf16[28,64,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[64,32]{1,0} parameter(2)
  %scales = f32[28,64]{1,0} parameter(3)
  %begin.1 = ((f32[28,64]{1,0}, s32[]), f32[1,64]{1,0}, u32[]) fusion-start(%scales, %i), kind=kLoop, calls=%from
  %end.1 = f32[1,64]{1,0} fusion-done(%begin.1)
  %begin.2 = ((bf16[28,64,32]{2,1,0}, s32[], bf16[64,32]{1,0}), bf16[28,64,32]{2,1,0}, u32[]) fusion-start(%stack, %i, %x), kind=kLoop, calls=%into
  ROOT %end.2 = bf16[28,64,32]{2,1,0} fusion-done(%begin.2)
}
"""  # noqa: E501


def test_a_fusion_that_is_only_started_is_one_kernel_too():
    """As an H100's program has them: a row of a stack read, and one written in place."""
    index, row, scales = 4, 64 * 32 * 2, 64 * 4
    read, written = (scales + index) + scales, (index + row) + row
    assert memory_traffic(read_module(GPU)) == read + written


@pytest.mark.parametrize(("mask", "pairs"), [("CAUSAL", 512 * 512 // 2), ("NO_MASK", 512 * 512)])
def test_cudnn_attention_counts_its_products(mask, pairs):
    """Two forward; five backward, where scores are computed again."""
    said = f'backend_config={{"bmm1":{{"lhs_contracting_dimensions":["3"]}},"mask_type":"{mask}"}}'
    text = f"""\
HloModule jit_step

ENTRY %main (q: bf16[16,512,12,128], k: bf16[16,512,2,128]) -> bf16[16,12,512,128] {{
  %q = bf16[16,512,12,128]{{3,2,1,0}} parameter(0)
  %k = bf16[16,512,2,128]{{3,2,1,0}} parameter(1)
  ROOT %out = (bf16[16,12,512,128]{{3,1,2,0}}, f32[16,12,512]{{2,1,0}}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaScaleBiasSoftmax", {said}
}}
"""  # noqa: E501
    once = 2 * 16 * 12 * 128 * pairs
    assert products(read_module(text)).flops == 2 * once
    backward = text.replace("BiasSoftmax", "BiasSoftmaxBackward")
    assert products(read_module(backward)).flops == 5 * once

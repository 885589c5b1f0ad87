"""Adapters in the tree of parameters: off they are nothing, on they are a low-rank term."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.models import (
    Lora,
    add_scales,
    as_base,
    init_model,
    join,
    make_adapters,
    merge,
    split,
    with_dropout,
)
from tests.models.tiny_models import HF_CONFIGS
from tests.tiny import random_batch, tiny_logprobs, tiny_model, tiny_params

LORA = Lora(rank=3, alpha=6.0, targets=("*_proj",))


def adapted(base, lora=LORA, seed=0, spread=0.0):
    """``base`` with adapters, moved by ``spread`` from where they begin."""
    keys = jax.random.split(jax.random.key(seed), 2)
    adapters = make_adapters(base, lora, keys[0])
    leaves, structure = jax.tree.flatten(adapters)
    moves = jax.random.split(keys[1], len(leaves))
    moved = [x + spread * jax.random.normal(k, x.shape) for x, k in zip(leaves, moves, strict=True)]
    return join(add_scales(base, lora), structure.unflatten(moved))


@pytest.fixture(scope="module")
def tiny():
    model = tiny_model()
    return model, tiny_params(model), jax.jit(tiny_logprobs(model)), random_batch(reference=False)


@pytest.mark.slow
def test_an_adapted_model_begins_as_its_base_bit_for_bit(tiny):
    _, base, logprobs, batch = tiny
    whole = adapted(base)
    np.testing.assert_array_equal(logprobs(whole, batch), logprobs(base, batch))
    trained, _ = split(whole)
    a, b = (trained["layers"]["mlp"]["down_lora"][name] for name in ("a", "b"))
    assert (a.shape, b.shape) == ((2, 24, 3), (2, 3, 16))
    assert float(jnp.abs(a).max()) <= 24**-0.5
    assert float(jnp.abs(a).max()) > 0.8 * 24**-0.5
    assert not b.any()


@pytest.mark.slow
def test_the_term_is_what_merging_adds_to_the_kernel(tiny):
    _, base, logprobs, batch = tiny
    whole = adapted(base, spread=0.1)
    merged = merge(whole)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    trained, _ = split(whole)
    up, adapter = (x["layers"]["mlp"] for x in (merged, trained))
    term = 2.0 * np.asarray(adapter["up_lora"]["a"][1]) @ np.asarray(adapter["up_lora"]["b"][1])
    expected = np.asarray(base["layers"]["mlp"]["up"]["kernel"][1]) + term
    np.testing.assert_allclose(up["up"]["kernel"][1], expected, rtol=1e-5, atol=1e-6)
    found = logprobs(whole, batch)
    np.testing.assert_allclose(found, logprobs(merged, batch), rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(found - logprobs(base, batch)).max()) > 0.1


@pytest.mark.long
def test_beside_biases_and_norms_of_the_families():
    for name in ("llama_tied", "qwen3"):
        model = init_model(HF_CONFIGS[name])
        whole = adapted(model.init(jax.random.key(1)), spread=0.3)
        tokens = jnp.arange(14).reshape(2, 7)
        mask = jnp.ones((2, 7), bool)
        hidden = jax.jit(model.hidden_plain)
        on, merged = (hidden(p, tokens, mask) for p in (whole, merge(whole)))
        np.testing.assert_allclose(on, merged, rtol=2e-4, atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_generation_reads_the_merged_matrices(tiny):
    model, base, _, _ = tiny
    whole = adapted(base, spread=0.1)
    tokens, mask = jnp.arange(8).reshape(2, 4), jnp.ones((2, 4), bool)

    @jax.jit
    def logits(params):
        last, cache = model.prefill(params, model.init_cache(2, 6), tokens, mask)
        ready = model.decode_params(params)
        hidden, _ = model.decode_step(ready, cache, jnp.asarray([3, 5]))
        return model.decode_logits(ready, last), model.decode_logits(ready, hidden)

    ready, plain = (jax.eval_shape(model.decode_params, p) for p in (whole, base))
    assert jax.tree.structure(ready) == jax.tree.structure(plain)
    for on, merged in zip(logits(whole), logits(merge(whole)), strict=True):
        np.testing.assert_allclose(on, merged, rtol=1e-4, atol=1e-4)


def test_split_takes_adapters_and_base_apart_and_join_puts_them_together(tiny):
    _, base, _, _ = tiny
    lora = Lora(rank=2, alpha=1.0, targets=("q_proj", "*down*"))
    whole = adapted(base, lora)
    trained, frozen = split(whole)
    names = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(trained)}
    assert names == {
        f"['layers']['{block}']['{name}_lora']['{side}']"
        for block, name in (("attention", "q"), ("mlp", "down"))
        for side in "ab"
    }
    assert not {id(x) for x in jax.tree.leaves(trained)} & {id(x) for x in jax.tree.leaves(frozen)}
    again = join(frozen, trained)
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (again, whole)), strict=True))
    assert split(base) == (base, None)
    assert join(None, base) is base


def test_targets_are_names_or_patterns():
    def found(*targets):
        return Lora(rank=1, alpha=1.0, targets=targets).projections

    assert found("v_proj", "q_proj") == ("q_proj", "v_proj")
    assert found("[kv]_proj", "*e_proj") == ("k_proj", "v_proj", "gate_proj")
    assert len(found("*")) == 7
    with pytest.raises(ValueError, match="'w_proj' is no projection: choose of q_proj, k_proj"):
        found("q_proj", "w_proj")


def test_a_rank_above_that_of_the_matrix_is_refused(tiny):
    with pytest.raises(ValueError, match=r"rank=9: k_proj is a matrix of 16 by 8.* at most 8"):
        make_adapters(tiny[1], Lora(9, 1.0, ("*_proj",)), jax.random.key(0))


@pytest.mark.slow
def test_products_are_taken_in_the_compute_dtype_and_adapters_stay_float32():
    model = tiny_model(compute_dtype="bfloat16", param_dtype="bfloat16")
    whole = adapted(tiny_params(model), spread=0.1)
    assert {x.dtype for x in jax.tree.leaves(split(whole)[0])} == {jnp.dtype("float32")}
    assert merge(whole)["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    tokens, mask = jnp.arange(8).reshape(2, 4), jnp.ones((2, 4), bool)
    text = str(jax.make_jaxpr(model.hidden_plain)(whole, tokens, mask))
    products = [line.split(" = ")[0] for line in text.splitlines() if " = dot_general" in line]
    low = [line for line in products if f",{LORA.rank}]" in line]
    assert len(low) == 7
    assert all("bf16" in line for line in low)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["elementwise", "dots_no_batch"])
def test_the_backward_pass_finds_the_sum_saved_and_not_its_terms(remat):
    """A second array as wide as each projection would cost what adapters save."""
    model = tiny_model(remat=remat)
    base, batch = tiny_params(model), random_batch(reference=False)
    trained, frozen = split(adapted(base))
    logprobs = tiny_logprobs(model)

    def wide(function, params):
        kept = jax.eval_shape(lambda p: jax.vjp(function, p)[1], params)
        kept = [x.shape for x in jax.tree.leaves(kept)]
        return sum(int(np.prod(shape)) for shape in kept if shape[:2] == (2, 8 * 17))

    plain = wide(lambda p: logprobs(p, batch).sum(), base)
    own = wide(lambda t: logprobs(join(frozen, t), batch).sum(), trained)
    low = 7 * 2 * 8 * 17 * LORA.rank  # of each projection the narrow product
    assert plain > 0
    assert own <= plain + low


def test_experts_get_no_adapters_and_say_so():
    model = init_model(HF_CONFIGS["mixtral"])
    params = model.init(jax.random.key(0))
    everywhere = Lora(rank=2, alpha=4.0, targets=("*_proj",))
    with pytest.raises(ValueError, match=r"has experts.*q_proj, k_proj"):
        make_adapters(params, everywhere, jax.random.key(1))
    attention = Lora(rank=2, alpha=4.0, targets=("q_proj", "o_proj"))
    assert make_adapters(params, attention, jax.random.key(1))["layers"].keys() == {"attention"}
    with pytest.raises(ValueError, match="experts are not stored in four bits"):
        as_base(params, dataclasses.replace(attention, quantize="nf4"))


@pytest.mark.slow
def test_dropout_leaves_inputs_of_the_terms_out_and_keeps_their_mean(tiny):
    _, base, logprobs, batch = tiny
    lora = dataclasses.replace(LORA, dropout=0.25)
    whole = adapted(base, spread=0.02)
    found = logprobs(whole, batch)
    drawn = [logprobs(with_dropout(whole, lora, jax.random.key(seed)), batch) for seed in range(40)]
    assert float(jnp.abs(drawn[0] - drawn[1]).max()) > 1e-3
    spread = np.std(drawn, axis=0).mean()
    assert abs(np.mean(drawn, axis=0) - found).mean() < spread / 2
    # Terms that are zero have nothing to leave out.
    nothing = with_dropout(adapted(base), lora, jax.random.key(0))
    np.testing.assert_array_equal(logprobs(nothing, batch), logprobs(base, batch))


def test_every_layer_and_term_draws_by_a_key_of_its_own(tiny):
    drawn = with_dropout(
        adapted(tiny[1]), dataclasses.replace(LORA, dropout=0.5), jax.random.key(0)
    )
    leaves = jax.tree_util.tree_leaves_with_path(drawn)
    keys = [x for path, x in leaves if path[-1].key == "key"]
    assert len({tuple(row) for x in keys for row in x.tolist()}) == 7 * 2
    assert {float(v) for path, x in leaves if path[-1].key == "keep" for v in x} == {0.5}

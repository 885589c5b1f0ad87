"""What devices send each other in an update: never the table, the head in a loop, or logits.

Read off the compiled text of the update that training runs, with a vocabulary, a width and
lengths that no other dimension equals.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spo_jax.config.validation import checked_config
from spo_jax.objective import logprobs as logprobs
from spo_jax.plan import compile_pair_update
from tests.hlo import Collective, collectives

V, D = 1856, 208
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 304,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
PROMPT, COMPLETION, ROWS = 24, 28, 16
WARNING = "Involuntary full rematerialization"

MESHES = {
    "fsdp": {"data": 1, "fsdp": 8},
    "data and fsdp": {"data": 2, "fsdp": 4},
    "tensor": {"data": 1, "tensor": 8},
    "tensor and data": {"data": 4, "tensor": 2},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}


def compiled_text(sizes, *, tied=True, accumulation=1):
    tree = {
        "model": {"path": "nowhere", "remat": "full", "logprob_chunk": 16},
        "data": {"train": "nowhere.jsonl"},
        "loss": {"name": "dpo", "beta": 0.1},
        "solver": {"name": "penalty"},
        "outer": {"learning_rate": 1e-3},
        "train": {"steps": 4, "batch_size": ROWS, "gradient_accumulation": accumulation},
        "mesh": sizes,
    }
    return compile_pair_update(
        checked_config(tree),
        {**ARCHITECTURE, "tie_word_embeddings": tied},
        devices=jax.devices(),
        prompt_length=PROMPT,
        completion_length=COMPLETION,
    ).as_text()


def vocabulary_exchanges(found, sizes):
    """``(exchange, its shapes)`` for each that has a dimension of the vocabulary or of a part."""
    fsdp, tensor = sizes.get("fsdp", 1), sizes.get("tensor", 1)
    lengths = {V // parts for parts in (1, fsdp, tensor, fsdp * tensor)}
    pairs = ((e, [s for s in e.shapes if lengths & set(s)]) for e in found)
    return [(exchange, shapes) for exchange, shapes in pairs if shapes]


def check_no_logits(exchanges, sizes):
    """A vocabulary dimension comes with one of the width (or of a part) and no other.

    Logits, whole or cut, come with rows and tokens instead.
    """
    widths = {D // sizes.get("fsdp", 1), D}
    for exchange, shapes in exchanges:
        assert exchange.entry, f"in every chunk: {exchange}"
        for shape in shapes:
            others = sorted(d for d in shape if d > 1)[:-1]
            assert len(others) == 1, exchange
            assert others[0] in widths, exchange


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.long
def test_neither_table_nor_head_nor_logits_are_gathered(kind, tied, capfd):
    """Of table and head no device ever gets more than its part, and each part moves once.

    Allowed: the parts change from columns to words and back (all-to-all), and their gradients
    are summed over ``data`` (all-reduce).
    """
    sizes = MESHES[kind]
    found = collectives(compiled_text(sizes, tied=tied))
    assert WARNING not in capfd.readouterr().err
    exchanges = vocabulary_exchanges(found, sizes)
    check_no_logits(exchanges, sizes)
    for exchange, shapes in exchanges:
        assert exchange.kind in ("all-to-all", "all-reduce", "reduce-scatter"), exchange
        most = V * D // (sizes.get("fsdp", 1) * sizes.get("tensor", 1))
        assert all(np.prod(shape) <= most for shape in shapes), exchange
    if sizes.get("fsdp", 1) > 1:
        moved = [e for e, _ in exchanges if e.kind == "all-to-all"]
        assert len(moved) == 2, "the head there, and its gradient back"
        assert any(e.kind == "all-gather" for e in found), "the layers' weights are"


@pytest.mark.long
def test_accumulation_moves_no_more_than_that_in_each_micro_batch(capfd):
    sizes = MESHES["data and fsdp"]
    found = collectives(compiled_text(sizes, accumulation=2))
    assert WARNING not in capfd.readouterr().err
    for exchange, shapes in vocabulary_exchanges(found, sizes):
        assert exchange.kind != "all-gather", exchange
        for shape in shapes:
            assert len([d for d in shape if d > 1]) == 2, exchange
            assert np.prod(shape) <= V * D // 4, exchange


@pytest.mark.long
def test_with_many_tokens_the_head_is_gathered_and_once(monkeypatch, capfd):
    monkeypatch.setattr(logprobs, "SPARE_TRAFFIC", 0)
    sizes = MESHES["fsdp"]
    exchanges = vocabulary_exchanges(collectives(compiled_text(sizes)), sizes)
    assert WARNING not in capfd.readouterr().err
    check_no_logits(exchanges, sizes)
    gathered = [e for e, _ in exchanges if e.kind == "all-gather"]
    assert len(gathered) in (1, 2), "for the forward and for the backward pass at most"
    summed = [e for e, _ in exchanges if e.kind in ("all-reduce", "reduce-scatter")]
    assert len(summed) == 1, "the head's gradient, after the last chunk"


@pytest.mark.eight_devices
def test_how_the_head_is_cut():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    few, many = (8, 2, 10), (8, 2, 1000)
    cut = logprobs._cut(mesh, few, 64)
    assert (cut.rows, cut.vocabulary) == (("data",), ("tensor", "fsdp"))
    cut = logprobs._cut(mesh, many, 64)
    assert (cut.rows, cut.vocabulary) == (("data", "fsdp"), ("tensor",))
    cut = logprobs._cut(mesh, few, 62)
    assert (cut.rows, cut.vocabulary) == (("data", "fsdp"), ("tensor",))
    cut = logprobs._cut(mesh, few, 63)
    assert (cut.rows, cut.vocabulary) == (("data", "fsdp"), ())
    cut = logprobs._cut(jax.make_mesh((8, 1, 1), ("data", "fsdp", "tensor")), few, 64)
    assert (cut.rows, cut.vocabulary) == (("data", "fsdp"), ())
    for nothing in (logprobs._cut(mesh, (6, 2, 10), 64), logprobs._cut(None, few, 64)):
        assert nothing == logprobs._Cut()


@pytest.mark.eight_devices
def test_the_warning_is_written_where_it_is_looked_for(capfd):
    """Else its absence above would say nothing. Two axes of 2 and 3 are swapped."""
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(2, 3), ("a", "b"))
    one, other = NamedSharding(mesh, P("a", "b")), NamedSharding(mesh, P("b", "a"))
    x = jax.ShapeDtypeStruct((24, 24), jnp.float32, sharding=one)
    jax.jit(jnp.sin, out_shardings=other).lower(x).compile()
    assert WARNING in capfd.readouterr().err


def test_exchanges_are_read_from_text():
    text = """
%body.1 (x: f32[2]) -> f32[8] {
  %g = f32[8]{0} all-gather(f32[2]{0} %x), dimensions={0}
  ROOT %d = (bf16[4,2]{1,0}, f32[]) all-reduce-start(bf16[4,2]{1,0} %g, f32[] %y), to_apply=%add
  %e = bf16[4,2]{1,0} all-reduce-done(%d)
}

ENTRY %main (x: f32[2]) -> f32[8] {
  %p = s32[3,5]{1,0} all-to-all(s32[3,5]{1,0} %y)
  %q = f32[8]{0} add(f32[8]{0} %all-gather.1, f32[8]{0} %z)
}
"""
    assert collectives(text) == [
        Collective("all-gather", ((8,),), False),
        Collective("all-reduce", ((4, 2),), False),
        Collective("all-to-all", ((3, 5),), True),
    ]

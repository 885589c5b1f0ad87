"""Generation equals re-running the full forward, and ``transformers`` where it is installed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spo_jax.models import init_model, load_model, load_params
from spo_jax.parallel.mesh import make_mesh
from spo_jax.policies import decoding
from spo_jax.policies.completions import complete
from spo_jax.policies.decoding import NOT_FINITE, generate, room_steps, truncate
from tests.data.tiny_data import make_char_tokenizer
from tests.models.make_fixtures import transformers_model
from tests.models.test_splash import mesh_of
from tests.models.tiny_models import HF_CONFIGS, padded_tokens, write_folder
from tests.tiny import ARCHITECTURE, tiny_model, tiny_params

NEW = 9


@pytest.fixture
def load(tmp_path):
    def load(name):
        folder = write_folder(tmp_path, HF_CONFIGS[name])
        model = load_model(folder)
        return model, load_params(folder, model)

    return load


def prompts(lengths=(7, 3, 1), width=7):
    tokens, mask = padded_tokens(0, list(lengths), width)
    return jnp.asarray(tokens), jnp.asarray(mask)


def greedy(model, params, tokens, mask, eos_ids=(), **settings):
    return np.asarray(
        generate(
            model,
            params,
            tokens,
            mask,
            max_new_tokens=NEW,
            temperature=0.0,
            eos_ids=eos_ids,
            **settings,
        )
    )


def step_by_step(model, params, tokens, mask):
    """Greedy continuation that runs the whole sequence anew for every token."""
    width = tokens.shape[1]
    tokens = jnp.concatenate([tokens, jnp.zeros((len(tokens), NEW), jnp.int32)], axis=1)
    mask = jnp.concatenate([mask, jnp.ones((len(mask), NEW), bool)], axis=1)
    forward = jax.jit(model.hidden_plain)
    for t in range(width, width + NEW):
        logits = forward(params, tokens, mask)[:, t - 1] @ model.output_head(params)
        tokens = tokens.at[:, t].set(jnp.argmax(logits, axis=-1))
    return np.asarray(tokens[:, width:])


@pytest.mark.wide
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_greedy_equals_the_full_forward_step_by_step(name, load):
    model, params = load(name)
    tokens, mask = prompts()
    np.testing.assert_array_equal(
        greedy(model, params, tokens, mask), step_by_step(model, params, tokens, mask)
    )


@pytest.mark.wide
@pytest.mark.parametrize("name", HF_CONFIGS)
def test_greedy_equals_transformers(name, load, tmp_path):
    torch = pytest.importorskip("torch")
    model, params = load(name)
    tokens, mask = prompts()
    expected = transformers_model(tmp_path).generate(
        torch.tensor(np.asarray(tokens), dtype=torch.long),
        attention_mask=torch.tensor(np.asarray(mask), dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    np.testing.assert_array_equal(
        greedy(model, params, tokens, mask), expected[:, tokens.shape[1] :].numpy()
    )


def test_rows_end_with_any_eos_and_are_padded_after_it(load):
    model, params = load("llama")
    tokens, mask = prompts()
    free = greedy(model, params, tokens, mask)
    eos_ids = (int(free[0, 2]), int(free[1, 4]))
    stopped = greedy(model, params, tokens, mask, eos_ids=eos_ids, pad_id=39)
    for row, whole in zip(stopped, free, strict=True):
        ends = np.flatnonzero(np.isin(whole, eos_ids))
        length = ends[0] + 1 if len(ends) else NEW
        np.testing.assert_array_equal(row[:length], whole[:length])
        assert (row[length:] == 39).all()


@pytest.mark.slow
def test_a_sample_depends_on_its_key_and_not_on_its_batch(load):
    model, params = load("llama")
    tokens, mask = prompts((7, 3, 1, 5))
    keys = jax.random.split(jax.random.PRNGKey(0), 4)

    def sample(rows, keys, temperature=1.0):
        settings = {"max_new_tokens": NEW, "temperature": temperature, "eos_ids": ()}
        out = generate(model, params, tokens[rows], mask[rows], keys=keys, **settings)
        return np.asarray(out)

    whole = sample(jnp.arange(4), keys)
    others = jnp.array([2, 1, 1, 0])
    np.testing.assert_array_equal(sample(others, keys[others]), whole[others])
    same_prompt = sample(jnp.zeros(4, jnp.int32), keys)
    assert len({tuple(row) for row in same_prompt}) > 1
    cold = sample(jnp.arange(4), keys, temperature=1e-4)
    np.testing.assert_array_equal(cold, greedy(model, params, tokens, mask))


def test_of_equal_ones_the_first_is_the_largest():
    x = jnp.array([[1.0, 3.0, 3.0], [2.0, 2.0, -jnp.inf], [-jnp.inf, -5.0, -jnp.inf]])
    assert decoding._first_largest(x).tolist() == jnp.argmax(x, axis=-1).tolist() == [1, 0, 1]


@pytest.mark.parametrize("name", ["cpu", "tpu"])
def test_a_token_is_that_of_jax_random_categorical(name, monkeypatch):
    monkeypatch.setattr(decoding, "platform", lambda mesh: name)
    logits = jax.random.normal(jax.random.key(0), (64, 50)) * 3
    keys = jax.random.split(jax.random.PRNGKey(1), 64)
    draw = decoding._Draw(keys, jnp.float32(0.7), None)
    found = jax.jit(lambda x, draw: decoding._choose(x, 5, draw, None, None))(logits, draw)
    expected = [
        jax.random.categorical(jax.random.fold_in(key, 5), row / jnp.float32(0.7))
        for key, row in zip(keys, logits, strict=True)
    ]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_samples_follow_the_model(load):
    model, params = load("llama")
    tokens, mask = prompts((3,), 3)
    rows = 4000
    drawn = generate(
        model,
        params,
        jnp.repeat(tokens, rows, 0),
        jnp.repeat(mask, rows, 0),
        max_new_tokens=1,
        temperature=2.0,
        eos_ids=(),
        keys=jax.random.split(jax.random.PRNGKey(1), rows),
    )
    frequency = np.bincount(np.asarray(drawn)[:, 0], minlength=40) / rows
    logits = model.hidden_plain(params, tokens, mask)[0, -1] @ model.output_head(params)
    probability = np.asarray(jax.nn.softmax(logits / 2.0))
    assert np.abs(frequency - probability).max() < 5 * np.sqrt(0.25 / rows)


def test_settings_that_make_no_sense_are_errors(load):
    model, params = load("llama")
    tokens, mask = prompts()
    with pytest.raises(ValueError, match="pass keys"):
        generate(model, params, tokens, mask, max_new_tokens=1, temperature=1.0, eos_ids=())
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate(model, params, tokens, mask, max_new_tokens=0, temperature=0.0, eos_ids=())
    with pytest.raises(ValueError, match="temperature=-1"):
        generate(model, params, tokens, mask, max_new_tokens=1, temperature=-1.0, eos_ids=())


def kept(logits, top_k=None, top_p=None):
    """Indices that can still be drawn, row by row."""
    found = truncate(
        jnp.asarray(logits), top_k=top_k, top_p=None if top_p is None else jnp.float32(top_p)
    )
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(found)]


def test_what_is_drawn_from_by_hand():
    """Probabilities 0.5, 0.25, 0.15, 0.1 in two orders."""
    p = np.log([[0.5, 0.25, 0.15, 0.1], [0.1, 0.15, 0.25, 0.5]]).astype(np.float32)
    assert kept(p) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert kept(p, top_k=2) == [[0, 1], [2, 3]]
    assert kept(p, top_k=9) == kept(p)
    assert kept(p, top_p=0.4) == [[0], [3]]
    assert kept(p, top_p=0.7) == [[0, 1], [2, 3]]
    assert kept(p, top_p=0.8) == [[0, 1, 2], [1, 2, 3]]
    assert kept(p, top_p=1.0) == kept(p)
    # Of the two that are left the first has two thirds of the mass.
    assert kept(p, top_k=2, top_p=0.6) == [[0], [3]]
    assert kept(p, top_k=2, top_p=0.7) == [[0, 1], [2, 3]]
    assert kept(p, top_p=1e-9) == [[0], [3]]


def test_truncation_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(size=(16, 50)).astype(np.float32) * 3
    for top_k, top_p in ((5, None), (None, 0.3), (None, 0.95), (20, 0.8)):
        theirs = torch.tensor(logits)
        if top_k is not None:
            theirs = TopKLogitsWarper(top_k)(None, theirs)
        if top_p is not None:
            theirs = TopPLogitsWarper(top_p)(None, theirs)
        expected = [np.flatnonzero(np.isfinite(row)).tolist() for row in theirs.numpy()]
        assert kept(logits, top_k, top_p) == expected


def test_samples_stay_among_the_tokens_left(load):
    """Of one token there is no choice: ``top_k=1`` at any temperature is greedy."""
    model, params = load("llama")
    tokens, mask = prompts()
    keys = jax.random.split(jax.random.PRNGKey(0), len(tokens))
    drawn = generate(
        model, params, tokens, mask, max_new_tokens=NEW, temperature=1.0, eos_ids=(), keys=keys,
        top_k=1,
    )  # fmt: skip
    np.testing.assert_array_equal(drawn, greedy(model, params, tokens, mask))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"temperature": 0.0, "top_k": 3}, "top_k=3"),
        ({"temperature": 0.0, "top_p": 0.5}, "would be ignored"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0: use at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0\.0: use more than 0"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p=1\.5"),
    ],
)
def test_settings_of_sampling_that_cannot_be(load, settings, word):
    model, params = load("llama")
    tokens, mask = prompts()
    keys = jax.random.split(jax.random.PRNGKey(0), len(tokens))
    with pytest.raises(ValueError, match=word):
        generate(model, params, tokens, mask, max_new_tokens=2, eos_ids=(), keys=keys, **settings)


def test_the_cache_grows_by_doubling():
    assert room_steps(1) == (1,)
    assert room_steps(128) == (128,)
    assert room_steps(129) == (128, 129)
    assert room_steps(700) == (128, 256, 512, 700)


@pytest.mark.wide
@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_a_cache_that_grows_changes_nothing(load, monkeypatch, name):
    """Windows included; and a row that ends in the first room is padded behind it."""
    model, params = load(name)
    tokens, mask = prompts()
    at_once = greedy(model, params, tokens, mask)
    monkeypatch.setattr("spo_jax.policies.decoding._FIRST_ROOM", 2)
    assert room_steps(NEW) == (2, 4, 8, NEW)
    np.testing.assert_array_equal(greedy(model, params, tokens, mask), at_once)
    ends = tuple(int(row[0]) for row in at_once)
    stopped = greedy(model, params, tokens, mask, eos_ids=ends, pad_id=39)
    np.testing.assert_array_equal(stopped[:, 0], at_once[:, 0])
    assert (stopped[:, 1:] == 39).all()


@pytest.mark.slow
def test_rooms_that_are_not_needed_are_not_compiled(load, monkeypatch):
    """Every row has its EOS in the first room."""
    model, params = load("llama")
    tokens, mask = prompts()
    ends = tuple(int(i) for i in greedy(model, params, tokens, mask)[:, 1])
    monkeypatch.setattr("spo_jax.policies.decoding._FIRST_ROOM", 4)

    def refuse(cache, length):
        raise AssertionError(f"grown to {length}")

    monkeypatch.setattr("spo_jax.policies.decoding._grow", refuse)
    assert greedy(model, params, tokens, mask, eos_ids=ends).shape == (3, NEW)
    with pytest.raises(AssertionError, match="grown to 15"):
        greedy(model, params, tokens, mask)


def ending_early(model, params, rows, temperature, mesh=None):
    """What ``rows`` prompts give, what they give without EOS, and the ids that are one."""
    rng = np.random.default_rng(0)
    tokens, mask = prompts(tuple(rng.integers(1, 8, rows)))
    if mesh is not None:
        cut = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        tokens, mask = jax.device_put((tokens, mask), cut)
    settings = {
        "max_new_tokens": NEW, "temperature": temperature, "pad_id": 39,
        "keys": jax.random.split(jax.random.PRNGKey(0), rows),
    }  # fmt: skip
    free = np.asarray(generate(model, params, tokens, mask, eos_ids=(), **settings))
    early = tuple(int(i) for i in np.unique(free[: rows // 2, 3]))
    return np.asarray(generate(model, params, tokens, mask, eos_ids=early, **settings)), free, early


def check_dropping(monkeypatch, model, params, rows, temperature, mesh=None):
    whole, free, early = ending_early(model, params, rows, temperature, mesh)
    for row, unstopped in zip(whole, free, strict=True):
        ends = np.flatnonzero(np.isin(unstopped, early))
        length = ends[0] + 1 if len(ends) else NEW
        np.testing.assert_array_equal(row[:length], unstopped[:length])
        assert (row[length:] == 39).all()
    sizes = []
    drop = decoding._drop

    def spy(*args, size, groups):
        sizes.append(size)
        return drop(*args, size=size, groups=groups)

    monkeypatch.setattr(decoding, "_drop", spy)
    monkeypatch.setattr(decoding, "worth_steps", lambda mesh: 0)
    monkeypatch.setattr(decoding, "_FIRST_ROOM", 4)
    monkeypatch.setattr("spo_jax.policies.live_rows._FEWEST", 1)
    np.testing.assert_array_equal(ending_early(model, params, rows, temperature, mesh)[0], whole)
    return sizes


@pytest.mark.slow
def test_no_row_is_dropped_that_goes_on(load, monkeypatch):
    """Rooms of a step each, so that every number of rows left is met between two of them."""
    monkeypatch.setattr(decoding, "room_steps", lambda most: list(range(2, most + 1)))
    sizes = check_dropping(monkeypatch, *load("mistral"), 16, 1.0)
    assert len(sizes) > 1


@pytest.mark.wide
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_ended_are_dropped_and_nothing_changes(load, monkeypatch, temperature):
    sizes = check_dropping(monkeypatch, *load("mistral"), 16, temperature)
    assert len(sizes) > 1
    assert set(sizes) <= {8, 4, 2}


@pytest.mark.long
def test_rows_are_dropped_where_they_are(monkeypatch):
    """On a mesh each device keeps as many rows as the one with most unfinished ones needs."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    model = tiny_model(mesh=mesh)
    sizes = check_dropping(monkeypatch, model, tiny_params(model), 32, 1.0, mesh)
    assert sizes
    assert set(sizes) <= {16, 8, 4}


@pytest.mark.slow
def test_generation_can_be_part_of_a_compiled_function(load, monkeypatch):
    model, params = load("llama")
    tokens, mask = prompts()
    plain = greedy(model, params, tokens, mask)
    monkeypatch.setattr("spo_jax.policies.decoding._FIRST_ROOM", 4)
    settings = {"max_new_tokens": NEW, "temperature": 0.0, "eos_ids": ()}
    inside = jax.jit(lambda p, t, m: generate(model, p, t, m, **settings))
    np.testing.assert_array_equal(inside(params, tokens, mask), plain)


@pytest.mark.slow
def test_inside_a_compiled_function_no_row_is_dropped(load, monkeypatch):
    model, params = load("llama")
    tokens, mask = prompts()
    ends = tuple(int(i) for i in greedy(model, params, tokens, mask)[:2, 1])
    stopped = greedy(model, params, tokens, mask, eos_ids=ends)
    monkeypatch.setattr("spo_jax.policies.live_rows._FEWEST", 1)
    monkeypatch.setattr(decoding, "worth_steps", lambda mesh: 0)
    settings = {"max_new_tokens": NEW, "temperature": 0.0, "eos_ids": ends}
    inside = jax.jit(lambda p, t, m: generate(model, p, t, m, **settings))
    np.testing.assert_array_equal(inside(params, tokens, mask), stopped)


@pytest.mark.on_cpu
def test_matrices_are_cast_once():
    model = tiny_model(compute_dtype="bfloat16")
    params = model.decode_params(tiny_params(model))
    dtypes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert dtypes["embed"] == dtypes["layers/0/attention/q/kernel"] == jnp.bfloat16
    assert dtypes["final_norm/scale"] == dtypes["layers/0/mlp_norm/scale"] == jnp.float32


@pytest.mark.wide
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_drawn_from_logits_that_are_no_numbers(temperature):
    tokenizer = make_char_tokenizer()
    model = init_model({**ARCHITECTURE, "vocab_size": len(tokenizer)})
    params = model.init(jax.random.key(0))
    settings = {"max_new_tokens": 3, "temperature": temperature}
    assert len(complete(model, params, tokenizer, ["ab", "c"], **settings)) == 2
    spoiled = jax.tree.map(lambda x: x.at[:].set(jnp.nan), params)
    with pytest.raises(ValueError, match="the logits of 2 of 2 prompts are not finite"):
        complete(model, spoiled, tokenizer, ["ab", "c"], **settings)
    tokens, mask = jnp.ones((2, 4), jnp.int32), jnp.ones((2, 4), bool)
    keys = jax.random.split(jax.random.key(1), 2) if temperature else None
    keys = None if keys is None else jax.random.key_data(keys)
    found = generate(model, spoiled, tokens, mask, eos_ids=(2,), pad_id=7, keys=keys, **settings)
    assert found.tolist() == [[NOT_FINITE, 7, 7]] * 2


def test_an_accelerator_compiles_for_fewer_rows_only_when_much_is_to_come():
    assert decoding.worth_steps(None) == (32 if jax.default_backend() == "cpu" else 1024)
    assert decoding.worth_steps(mesh_of("gpu")) == decoding.worth_steps(mesh_of("tpu")) == 1024

"""Spoiled model folders: the same numbers as ``transformers``, or one of our errors."""

from __future__ import annotations

import copy
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.cli import _is_ours
from spo_jax.models import (
    FAMILIES,
    decoder_config_from_hf,
    load_model,
    load_params,
    save_pretrained,
)
from spo_jax.models.blocked import capped
from spo_jax.models.positions import positions_to_hf
from spo_jax.models.tensor_files import read_index
from tests.models.tiny_models import HF_CONFIGS, padded_tokens, write_folder

ODD = (None, True, False, 0, 1, 2, -1, 3.5, 1e9, "16", "", [], {}, [1], {"a": 1}, float("nan"))
FOREIGN = (
    "logit_scale", "final_logit_softcapping", "residual_multiplier", "is_causal", "num_experts",
    "per_layer_config", "original_max_position_embeddings", "qk_layernorm", "sliding_windows",
    "use_cache", "pretraining_tp", "attention_dropout", "auto_map", "quantization_config",
    "text_config", "id2label", "torch_dtype", "dtype", "use_qk_norm", "rope_interleaved",
    "partial_rotary_factor", "no_rope_layers", "attention_chunk_size", "clip_qkv", "alibi",
    "use_bidirectional_attention", "parallel_residual", "hidden_activation", "norm_type",
)  # fmt: skip
ROPES = (
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 5e5},
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "linear", "factor": 2, "attention_factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"full_attention": {"rope_type": "linear", "factor": 2.0}},
    {"factor": 2.0},
    {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.0, 3.0]},
)


def spoil(config: dict, rng: random.Random) -> dict:
    """One to three changes: a value, a missing key, a foreign one, positions, another family."""
    config = copy.deepcopy(config)
    own = (*config, "head_dim", "sliding_window", "use_sliding_window", "layer_types",
           "attention_bias", "mlp_bias", "max_window_layers", "num_key_value_heads")  # fmt: skip
    for _ in range(rng.randint(1, 3)):
        way = rng.randrange(7)
        if way == 0:
            config[rng.choice(own)] = copy.deepcopy(rng.choice(ODD))
        elif way == 1:
            config.pop(rng.choice(list(config)), None)
        elif way == 2:
            config[rng.choice(FOREIGN)] = copy.deepcopy(rng.choice(ODD))
        elif way == 3:
            key = rng.choice(("rope_scaling", "rope_parameters"))
            config[key] = copy.deepcopy(rng.choice(ROPES))
        elif way == 4:
            config["model_type"] = rng.choice(list(FAMILIES))
        elif way == 5:
            config["rope_theta"] = rng.choice((1e4, 5e5, 10_000))
        else:
            kinds = ("full_attention", "sliding_attention", "attention")
            count = rng.choice((3, 3, 2))
            config["layer_types"] = [rng.choice(kinds[: rng.choice((1, 2, 3))])] * count
    return config


def their_config(config: dict):
    """The configuration of ``transformers``, or ``None`` where it has none."""
    import transformers

    try:
        return transformers.AutoConfig.for_model(**copy.deepcopy(config))
    except Exception:  # it fails in many ways
        return None


def windows(ours) -> list[int | None]:
    sliding = ours.sliding_layers or (ours.sliding_window is not None,) * ours.num_layers
    return [ours.sliding_window if on else None for on in sliding]


def their_windows(theirs) -> list[int | None]:
    if theirs.model_type in ("llama", "olmo2"):
        return [None] * theirs.num_hidden_layers
    if theirs.model_type in ("mistral", "phi3", "qwen3_moe", "mixtral"):
        return [theirs.sliding_window] * theirs.num_hidden_layers
    sliding = (kind == "sliding_attention" for kind in theirs.layer_types)
    return [theirs.sliding_window if on else None for on in sliding]


def what_decides(ours, theirs) -> tuple[dict, dict]:
    """What the logits depend on, as both read it."""
    rope = dict(theirs.rope_parameters)
    local, rope = rope.get("sliding_attention"), rope.get("full_attention", rope)
    kind = rope["rope_type"]
    scaling = ours.rope_scaling
    family = theirs.model_type
    never = family in ("mistral", "mixtral", "qwen2", "phi3")  # whatever a key says
    attention_bias = not never and theirs.attention_bias
    gemma, experts = family.startswith("gemma"), family in ("qwen3_moe", "mixtral")
    act = theirs.hidden_activation if gemma else theirs.hidden_act
    scalar = ("query_pre_attn_scalar", ours.head_dim)
    turned = ours.rope_layers or (True,) * ours.num_layers
    pairs = {
        "vocabulary": (ours.vocab_size, theirs.vocab_size),
        "width": (ours.hidden_size, theirs.hidden_size),
        "inside": (ours.intermediate_size, theirs.intermediate_size),
        "layers": (ours.num_layers, theirs.num_hidden_layers),
        "heads": (ours.num_heads, theirs.num_attention_heads),
        "kv": (ours.num_kv_heads, theirs.num_key_value_heads),
        "head": (
            ours.head_dim,
            getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        ),
        "eps": (ours.rms_norm_eps, theirs.rms_norm_eps),
        "positions": (ours.max_position_embeddings, theirs.max_position_embeddings),
        "tied": (ours.tie_word_embeddings, theirs.tie_word_embeddings),
        "act": (ours.activation, "silu" if act == "swish" else act),
        "scores": (ours.score_width or ours.head_dim, getattr(theirs, *scalar)),
        "caps": (
            [ours.score_cap, ours.logit_cap],
            [getattr(theirs, f"{of}_logit_softcapping", None) for of in ("attn", "final")],
        ),
        "gemma": ((ours.unit_norms, ours.scaled_embeddings), (gemma, gemma)),
        "theta": (ours.rope_theta, rope["rope_theta"]),
        "kind": (scaling.rope_type if scaling else "default", kind),
        "windows": (windows(ours), their_windows(theirs)),
        "qkv": (ours.qkv_bias, attention_bias or family == "qwen2"),
        "o": (ours.o_bias, attention_bias),
        "mlp": (ours.mlp_bias, family in ("llama", "smollm3") and theirs.mlp_bias),
        "norms": (
            ours.norms,
            {"olmo2": "post", "gemma2": "both", "gemma3_text": "both"}.get(family, "pre"),
        ),
        "norms of heads": (ours.qk_norm, family in ("qwen3", "qwen3_moe", "gemma3_text")),
        "local": (
            ours.sliding_rope_theta,
            local["rope_theta"] if local and ours.sliding_layers else None,
        ),
        "norms of queries": (ours.full_qk_norm, family == "olmo2"),
        "share": (ours.turned, int(ours.head_dim * rope.get("partial_rotary_factor", 1.0))),
        "turned": (list(turned), [bool(on) for on in getattr(theirs, "no_rope_layers", turned)]),
        "experts": (
            (ours.num_experts, ours.experts_per_token),
            (theirs.num_local_experts, theirs.num_experts_per_tok) if experts else (0, 0),
        ),
        "routes": (ours.normed_routes, family != "qwen3_moe" or theirs.norm_topk_prob),
        "their width": (
            ours.expert_size,
            getattr(theirs, "moe_intermediate_size", theirs.intermediate_size) if experts else 0,
        ),
        "causal": (True, getattr(theirs, "is_causal", True)),
        "each layer": (False, theirs.is_heterogeneous),
    }
    if scaling:
        numbers = positions_to_hf(scaling)
        numbers.pop("rope_type")
        if kind == "longrope":  # the class computes it where it is needed
            ratio = theirs.max_position_embeddings / rope["original_max_position_embeddings"]
            rope.setdefault("factor", ratio)
        pairs["scaling"] = (numbers, {key: rope[key] for key in numbers})
    return tuple({key: pair[side] for key, pair in pairs.items()} for side in (0, 1))


def spoiled_configs(count: int, seed: int):
    rng = random.Random(seed)
    for _ in range(count):
        yield spoil(HF_CONFIGS[rng.choice(list(HF_CONFIGS))], rng)


def ours_or_error(make):
    """What ``make`` gives, or ``None`` for an error of ours; another one is raised."""
    try:
        return make()
    except (ValueError, FileNotFoundError) as error:
        if not _is_ours(error):
            raise
        return None


def test_a_spoiled_configuration_is_read_as_transformers_reads_it_or_refused():
    read = compared = 0
    for config in spoiled_configs(600, seed=0):
        ours = ours_or_error(lambda config=config: decoder_config_from_hf(config))
        if ours is None:
            continue
        read += 1
        theirs = their_config(config)
        if theirs is not None:
            compared += 1
            mine, others = what_decides(ours, theirs)
            assert mine == others, config
    assert read > 80
    assert compared > 60


@pytest.mark.long
def test_the_logits_of_what_is_read_are_those_of_transformers(tmp_path):
    pytest.importorskip("torch")
    from tests.models.make_fixtures import transformers_logits

    compiled = {}
    tokens, mask = padded_tokens(3, [20, 9], 20)
    compared = 0
    for number, config in enumerate(spoiled_configs(300, seed=1)):
        ours = ours_or_error(lambda config=config: decoder_config_from_hf(config))
        if ours is None or their_config(config) is None or ours.vocab_size < 40:
            continue
        if ours not in compiled and len(compiled) == 6:  # each costs seconds of compiling
            continue
        # Of some families the class has one that lies beyond a tiny vocabulary; on an empty
        # quantization_config, which says nothing, transformers fails.
        spared = {"pad_token_id": None, "quantization_config": None}
        folder = write_folder(tmp_path / str(number), config | spared)
        model = load_model(folder)
        run = compiled.setdefault(ours, jax.jit(model.hidden_plain))
        params = load_params(folder, model)
        hidden = run(params, jnp.asarray(tokens), jnp.asarray(mask))
        logits = np.asarray(capped(hidden @ model.output_head(params), model.logit_cap))
        expected = transformers_logits(folder, tokens, mask)
        assert np.abs(logits - expected)[mask].max() <= 1e-4, config
        compared += 1
        if compared == 12:
            return
    raise AssertionError(f"only {compared} could be compared")


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """A file cut, a byte changed, a piece doubled or taken out."""
    at, size = rng.randrange(len(data)), rng.randint(1, 40)
    return {
        0: lambda: data[:at],
        1: lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
        2: lambda: data[:at] + data[at : at + size] + data[at:],
        3: lambda: data[:at] + data[at + size :],
    }[rng.randrange(4)]()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    whole = tmp_path_factory.mktemp("shards")
    folder = write_folder(whole / "source", HF_CONFIGS["llama_tied"])
    model = load_model(folder)
    params = load_params(folder, model)
    save_pretrained(whole / "cut", params, model, source=folder, max_shard_bytes=9000)
    return whole / "cut"


def test_spoiled_files_are_read_whole_or_refused(shards):
    """Of a header or an index that still can be read, every tensor lies inside of its file."""
    rng = random.Random(2)
    first = min(shards.glob("model-00001-*"))
    index = shards / "model.safetensors.index.json"
    expected = {name: tensor.shape for name, tensor in read_index(shards).items()}
    refused = 0
    for number in range(300):
        file = (first, index)[number % 2]
        before = file.read_bytes()
        head = len(before) if file is index else 8 + int.from_bytes(before[:8], "little")
        file.write_bytes(spoil_bytes(before[:head], rng) + before[head:])
        found = ours_or_error(lambda: read_index(shards))
        if found is None:
            refused += 1
        else:
            for tensor in found.values():
                if tensor.dtype_code == "F32":
                    assert tensor.array().shape == tensor.shape
            assert len(found) == len(expected)
        file.write_bytes(before)
    assert refused > 200


def test_spoiled_tensors_are_refused_by_name(shards):
    """An exponent of all ones is a NaN or an infinity; any other bit stays a number."""
    rng = random.Random(3)
    model = load_model(shards)
    tensors = read_index(shards)
    for _ in range(12):
        name = rng.choice(sorted(tensors))
        tensor = tensors[name]
        before = tensor.file.read_bytes()
        place = tensor.offset + 4 * rng.randrange(int(np.prod(tensor.shape)))
        bits = int.from_bytes(before[place : place + 4], "little") | 0x7F800000
        spoiled = bits.to_bytes(4, "little")
        tensor.file.write_bytes(before[:place] + spoiled + before[place + 4 :])
        with pytest.raises(ValueError, match=f"{name} holds"):
            load_params(shards, model)
        tensor.file.write_bytes(before)


def test_broken_json_of_every_kind_is_refused_by_name(tmp_path):
    rng = random.Random(4)
    folder = write_folder(tmp_path, HF_CONFIGS["qwen2"])
    file = folder / "config.json"
    whole = file.read_bytes()
    expected = load_model(folder).config
    read = 0
    for _ in range(300):
        file.write_bytes(spoil_bytes(whole, rng))
        model = ours_or_error(lambda: load_model(folder))
        if model is None:
            continue
        read += 1
        config = json.loads(file.read_text())
        theirs = their_config(config)
        if model.config != expected and theirs is not None:
            mine, others = what_decides(model.config, theirs)
            assert mine == others, config
    assert read > 1

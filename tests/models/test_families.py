"""``config.json`` <-> ``DecoderConfig``, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from spo_jax.models import (
    FAMILIES,
    RopeScaling,
    decoder_config_from_hf,
    decoder_config_to_hf,
    init_model,
)
from spo_jax.models.rope import amplitude
from tests.models.tiny_models import HF_CONFIGS

LONGROPE = HF_CONFIGS["phi3"]


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_configuration_survives_the_way_back(name):
    config = decoder_config_from_hf(HF_CONFIGS[name])
    hf_config = decoder_config_to_hf(config, HF_CONFIGS[name]["model_type"])
    assert decoder_config_from_hf(hf_config) == config


def test_old_and_new_rope_keys_agree():
    old = HF_CONFIGS["llama"]
    new = {key: value for key, value in old.items() if not key.startswith("rope_")}
    new["rope_parameters"] = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    config = decoder_config_from_hf(old)
    assert decoder_config_from_hf(new) == config
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 16)


def test_windows_are_read_as_each_family_means_them():
    assert decoder_config_from_hf(HF_CONFIGS["mistral"]).shared_window == 5
    qwen = decoder_config_from_hf(HF_CONFIGS["qwen2"])
    assert qwen.sliding_layers == (False, True, True)
    assert list(qwen.layer_windows[1:]) == [6, 6]
    unused = HF_CONFIGS["qwen2"] | {"use_sliding_window": False}
    assert decoder_config_from_hf(unused).sliding_window is None


def longrope(**change):
    return {"rope_scaling": LONGROPE["rope_scaling"] | change}


def test_longrope_is_read_wherever_it_stands():
    config = HF_CONFIGS["phi3"]
    scaling = decoder_config_from_hf(config).rope_scaling
    assert scaling == RopeScaling(
        "longrope", 4.0, original_max_position_embeddings=64,
        short_factor=(1.0, 1.3, 2.5), long_factor=(1.1, 4.0, 20.0),
    )  # fmt: skip
    new = {key: value for key, value in config.items() if "rope_" not in key and "part" not in key}
    rope = config["rope_scaling"] | {"rope_theta": 1e4, "partial_rotary_factor": 0.75}
    assert decoder_config_from_hf(new | {"rope_parameters": rope}) == decoder_config_from_hf(config)
    assert decoder_config_from_hf(config).context == ("original_max_position_embeddings", 64)
    given = decoder_config_from_hf(config | longrope(attention_factor=1.5, factor=8.0))
    assert (amplitude(given), given.rope_scaling.factor) == (1.5, 8.0)
    assert amplitude(decoder_config_from_hf(config | longrope(factor=1.0))) == 1.0


def test_a_text_beyond_the_short_factors_is_refused():
    model = init_model(HF_CONFIGS["phi3"])
    tokens, mask = jnp.zeros((1, 65), int), jnp.ones((1, 65), bool)
    params = model.abstract_params()
    jax.eval_shape(model.hidden_plain, params, tokens[:, :64], mask[:, :64])
    with pytest.raises(ValueError, match=r"rows of 65 tokens .*=64: .*long_factor"):
        jax.eval_shape(model.hidden_plain, params, tokens, mask)


def test_layers_without_positions_are_those_of_the_interval_or_the_list():
    config = HF_CONFIGS["smollm3"]
    assert decoder_config_from_hf(config).rope_layers == (True, False, True)
    assert decoder_config_from_hf(config | {"no_rope_layers": [1, 1, 1]}).rope_layers is None
    interval = config | {"no_rope_layers": None, "no_rope_layer_interval": 2}
    assert decoder_config_from_hf(interval).rope_layers == (True, False, True)
    window = interval | {"use_sliding_window": True, "sliding_window": 5}
    assert decoder_config_from_hf(window).sliding_layers == (False, True, False)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "llama",
            {"model_type": "gpt2"},
            f"use one of {', '.join(FAMILIES)}",
        ),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn' is not implemented"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"vocab_size": None}, "lacks vocab_size"),
        ("mistral", {"num_local_experts": 8}, "num_local_experts=8"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types in a mistral"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "2 entries for num_hidden_layers=3"),
        ("smollm3", {"no_rope_layers": [1, 0, 2]}, "expected a list of 0 and 1"),
        ("phi3", {"partial_rotary_factor": 1.5}, "expected a number above 0, at most 1"),
        ("phi3", {"partial_rotary_factor": 0.4}, "rotary_dim=3"),
        ("phi3", longrope(partial_rotary_factor=0.5), "factor is 0.5 and 0.75"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not impl"),
        ("phi3", LONGROPE | {"original_max_position_embeddings": 300}, "from 2 to .*=256"),
        ("phi3", longrope(short_factor=[1.0]), "short_factor of rope_scaling has 1 numbers: exp"),
        ("phi3", longrope(long_factor=2.0), "rope_scaling.long_factor=2.0: expected a list"),
        ("phi3", longrope(long_factor=None), "lacks long_factor"),
        ("phi3", longrope(attention_factor=0), "attention_factor=0: expected a number above 0"),
        ("phi3", longrope(mscale=1.0), "mscale=1.0"),
        ("phi3", longrope(original_max_position_embeddings=32), "=64 and .*=32 disagree"),
        ("phi3", {"full_attn_mod": 2}, "full_attn_mod=2"),
        ("qwen3", {"layer_types": ["linear_attention"] * 3}, "layer_types linear_attention"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window is off"),
    ],
)
def test_what_is_not_implemented_is_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        decoder_config_from_hf(HF_CONFIGS[name] | change)


def test_family_that_cannot_express_a_decoder_is_refused():
    for name, trait in (("qwen3", "qk_norm"), ("olmo2", "norms, full_qk_norm")):
        with pytest.raises(ValueError, match=f"cannot express {trait}"):
            decoder_config_to_hf(decoder_config_from_hf(HF_CONFIGS[name]), "llama")

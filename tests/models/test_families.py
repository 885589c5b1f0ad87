"""``config.json`` <-> ``DecoderConfig``, and what is refused."""

from __future__ import annotations

import pytest

from spo_jax.models import FAMILIES, RopeScaling, decoder_config_from_hf, decoder_config_to_hf
from tests.models.tiny_models import HF_CONFIGS


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

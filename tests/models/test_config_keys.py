"""Every key of a ``config.json`` is used, known to change nothing here, or refused by name."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest

from spo_jax.models import FAMILIES, decoder_config_from_hf, load_hf_config
from spo_jax.models.config_keys import KINDS, REQUIRED, unused_settings
from tests.models.tiny_models import HF_CONFIGS

LLAMA3 = HF_CONFIGS["llama"]["rope_scaling"]
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("name", HF_CONFIGS)
@pytest.mark.parametrize("whole", [True, False])
def test_what_transformers_writes_is_read(name, whole):
    """Also with what its configuration class adds to a model's own keys."""
    import transformers

    config = transformers.AutoConfig.for_model(**copy.deepcopy(HF_CONFIGS[name]))
    written = json.loads(config.to_json_string(use_diff=not whole))
    assert decoder_config_from_hf(written) == decoder_config_from_hf(HF_CONFIGS[name])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_keys_are_what_transformers_takes(model_type):
    import transformers

    shape = {
        "vocab_size": 40,
        "hidden_size": 64,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
    }
    config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(shape))
    ours = decoder_config_from_hf({"model_type": model_type, **shape, "head_dim": 2})
    assert ours.num_kv_heads == config.num_key_value_heads
    assert ours.rms_norm_eps == config.rms_norm_eps
    rope = config.rope_parameters
    assert ours.rope_theta == rope.get("full_attention", rope)["rope_theta"]
    if "sliding_attention" in rope:
        assert ours.sliding_rope_theta == rope["sliding_attention"]["rope_theta"]
    assert ours.max_position_embeddings == config.max_position_embeddings
    windowed = model_type in ("mistral", "gemma2", "gemma3_text")
    assert ours.shared_window == (config.sliding_window if windowed else None)
    assert ours.tie_word_embeddings == config.tie_word_embeddings


@pytest.mark.parametrize(
    "harmless",
    [
        {"pretraining_tp": 2, "use_cache": False, "is_decoder": True, "torchscript": False},
        {"id2label": {"0": "a"}, "num_labels": 1, "problem_type": None},
        {"architectures": None},
        {"architectures": []},
        {"dtype": "bfloat16", "torch_dtype": "torch.bfloat16"},
        {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": -1},
        {"attention_dropout": 0.1, "temperature": 0.6},  # not used, and named where it is loaded
        {"logit_scale": None, "use_mrope": False, "is_causal": True, "quantization_config": None},
        {"chunk_size_feed_forward": 0, "partial_rotary_factor": 1.0, "auto_map": {}},
        {"layer_types": ["full_attention"] * 3},
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"a": 1}},
        {"max_sequence_length": 64, "_name_or_path": "x", "unsloth_version": "2025.1"},
        {"_model_name_or_path": "some checkpoint", "_made_by": {"step": 3}},
    ],
)
def test_what_changes_nothing_is_read_past(harmless):
    llama = HF_CONFIGS["llama"]
    assert decoder_config_from_hf(llama | harmless) == decoder_config_from_hf(llama)


def test_keys_of_gemma_that_say_one_thing_twice():
    gemma = HF_CONFIGS["gemma2"]
    twice = gemma | {"hidden_act": "gelu_pytorch_tanh", "sliding_window_size": 13}
    assert decoder_config_from_hf(twice) == decoder_config_from_hf(gemma)
    uncapped = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = decoder_config_from_hf(gemma | uncapped)
    assert (config.score_cap, config.logit_cap) == (None, None)
    all_full = decoder_config_from_hf(gemma | {"layer_types": ["full_attention"] * 3})
    assert all_full.sliding_window is None


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"logit_scale": 0.5}, "logit_scale=0.5. A key that does not .* removed from"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("llama", {"embedding_multiplier": 12}, "embedding_multiplier=12"),
        ("llama", {"residual_multiplier": 0.2}, "residual_multiplier=0.2"),
        ("llama", {"sliding_window": 4}, "sliding_window=4"),
        ("llama", {"max_sequence_length": 65}, "max_sequence_length=65"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved=True"),
        ("llama", {"num_key_value_head": 2}, "did you mean 'num_key_value_heads'"),
        ("llama", {"is_causal": False}, "is_causal=False"),
        ("llama", {"per_layer_config": {"0": {"head_dim": 2}}}, "per_layer_config"),
        ("llama", {"original_max_position_embeddings": 8}, "original_max_position_embeddings=8"),
        ("llama", {"auto_map": {"AutoModel": "m.py"}}, "auto_map.*never run"),
        ("llama", {"compression_config": {"format": "int8"}}, "compression_config"),
        ("mistral", {"attention_bias": True}, "attention_bias=True"),
        ("mistral", {"use_sliding_window": False}, "use_sliding_window=False.*disagree"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias=True"),
        ("olmo2", {"mlp_bias": True}, "mlp_bias=True"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2.*not implemented"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\].*not implemented"),
        ("qwen3_moe", {"num_local_experts": 6}, "num_experts=5 and num_local_experts=6 disagree"),
        ("qwen3_moe", {"num_experts_per_tok": 6}, "experts_per_token=6.*num_experts=5"),
        ("qwen3_moe", {"use_sliding_window": True, "max_window_layers": 2}, "remove it"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8"),
        ("mixtral", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("gemma2", {"hidden_act": "gelu"}, "hidden_act='gelu' .only 'gelu_pytorch_tanh'"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation='silu' .only 'gelu_py"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma2", {"sliding_window": None}, "null, and layers 0, 2 have a window"),
        ("gemma2", {"sliding_window_size": 14}, "sliding_window_size=14"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "softcapping=0.0: expected .* above 0 or null"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ("qwen2", {"attention_bias": False}, "always has biases"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForCausalLM"),
        ("llama", {"architectures": ["LlamaModel"]}, "expected LlamaForCausalLM"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "expected a list of texts"),
        ("llama", {"dtype": "float32", "torch_dtype": "float16"}, "disagree: keep one"),
        ("llama", {"text_config": {"model_type": "llama"}}, "a part of a larger model"),
        ("llama", {"model_type": ["llama"]}, "is not supported"),
        ("llama", {"layer_types": ["full_attention"] * 2}, "2 entries for num_hidden_layers=3"),
        ("llama", {"layer_types": "full"}, "expected a list of texts"),
        ("qwen2", {"layer_types": ["full_attention"] * 4}, "4 entries for num_hidden_layers=3"),
        ("llama", {"head_dim": None, "num_attention_heads": 32}, "head_dim=0: hidden_size=16"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(name, change, message):
    with pytest.raises(ValueError, match=message):
        decoder_config_from_hf(HF_CONFIGS[name] | change)


@pytest.mark.parametrize("key", KINDS)
@pytest.mark.parametrize("value", ["64", 1.5, -1, 0, [], {}, True, None, 2**40, float("nan")])
def test_values_of_a_wrong_type_are_refused_by_name(key, value):
    """Or they are right: a value of the kind that the key takes."""
    wanted, takes = KINDS[key]
    foreign = key not in {*FAMILIES["llama"].defaults, *REQUIRED, "model_type"}
    takes_null = value is None and (foreign or decoder_takes_null(key))
    says_none = value == 0 and key in ("num_experts", "num_local_experts")
    config = HF_CONFIGS["llama"] | {key: value}
    if takes(value) or takes_null or says_none:
        with contextlib.suppress(ValueError):  # of a shape that does not fit the others
            decoder_config_from_hf(config)
        return
    with pytest.raises(ValueError, match=rf"{key}|num_{key}") as error:
        decoder_config_from_hf(config)
    assert any(words in str(error.value) for words in (wanted, "lacks", "emove", "use", "only"))


def decoder_takes_null(key):
    return key in {
        "head_dim", "num_key_value_heads", "rope_scaling", "rope_parameters", "layer_types",
        "architectures",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 4.0}}, "disagree"),
        ({"rope_scaling": LLAMA3, "rope_parameters": LINEAR}, "disagree"),
        ({"rope_theta": 1e4, "rope_parameters": LINEAR | {"rope_theta": 5e5}}, "rope_theta=50000"),
        ({"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 5e5}}, "disagree"),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "keep one"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not impl"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "'longrope' is not"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "is not implemented"),
        ({"rope_scaling": LINEAR | {"attention_factor": 1.2}}, "attention_factor=1.2"),
        ({"rope_scaling": {"factor": 4.0}}, "factor=4.0, which would not be used"),
        ({"rope_scaling": LINEAR | {"mscale": 1.0}}, "mscale=1.0"),
        ({"rope_parameters": {"full_attention": LINEAR}}, "full_attention"),
        ({"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        ({"rope_scaling": LINEAR | {"factor": "2"}}, "factor='2': expected a number above 0"),
        ({"rope_scaling": LINEAR | {"factor": 0}}, "factor=0: expected a number above 0"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "expected the second above"),
        ({"rope_scaling": "linear"}, "expected a mapping"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4'"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0"),
    ],
)
def test_positions_say_one_thing(rope, message):
    config = {k: v for k, v in HF_CONFIGS["llama"].items() if not k.startswith("rope_")} | rope
    with pytest.raises(ValueError, match=message):
        decoder_config_from_hf(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": LINEAR}, "expected a mapping for each of full_attention and sliding_"),
        ({"rope_parameters": {"sliding_attention": LINEAR}}, "'linear' is not .*of sliding_attent"),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 2.0}}}, "2.0 and rope_theta=50"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 2.0}}}, "disagree"),
        ({"rope_parameters": {"full_attention": 3}}, "expected a mapping for each"),
        ({"rope_local_base_freq": -1.0}, "rope_local_base_freq=-1.0"),
        ({"attn_logit_softcapping": 50.0}, "transformers leaves it out .* gemma2"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern=0"),
    ],
)
def test_positions_of_two_kinds_of_layers_say_one_thing(change, message):
    with pytest.raises(ValueError, match=message):
        decoder_config_from_hf(HF_CONFIGS["gemma3"] | change)


def test_positions_of_two_kinds_of_layers_are_read_in_both_writings():
    old = HF_CONFIGS["gemma3"]
    config = decoder_config_from_hf(old)
    assert config.sliding_layers == (True, True, False)
    assert (config.rope_theta, config.sliding_rope_theta) == (5e5, 50.0)
    new = {key: value for key, value in old.items() if not key.startswith("rope_")}
    full = old["rope_scaling"] | {"rope_theta": 5e5}
    sliding = {"rope_type": "default", "rope_theta": 50.0}
    new["rope_parameters"] = {"full_attention": full, "sliding_attention": sliding}
    assert decoder_config_from_hf(new) == config
    whole = decoder_config_from_hf(old | {"layer_types": ["full_attention"] * 3})
    assert (whole.sliding_window, whole.sliding_rope_theta) == (None, None)


def test_positions_said_twice_alike_are_read():
    config = HF_CONFIGS["llama"]
    rope = config["rope_scaling"] | {"rope_theta": config["rope_theta"], "type": "llama3"}
    assert decoder_config_from_hf(config | {"rope_parameters": rope}) == decoder_config_from_hf(
        config
    )


def test_a_mistyped_key_of_model_init_names_the_nearest():
    for key, value in (("hidden_sise", 16), ("tie_word_embedding", False), ("mlp_bia", None)):
        with pytest.raises(ValueError, match=rf"model\.init: .*{key}.*did you mean"):
            decoder_config_from_hf(HF_CONFIGS["llama"] | {key: value}, "model.init")
    with pytest.raises(ValueError, match=r"model\.init lacks hidden_size"):
        decoder_config_from_hf(HF_CONFIGS["llama"] | {"hidden_size": None}, "model.init")


def test_unused_settings_are_those_that_say_something():
    assert unused_settings({"temperature": 1.0, "top_k": 50, "attention_dropout": 0.0}) == {}
    said = {"temperature": 0.7, "suppress_tokens": [1], "attention_dropout": 0.1}
    assert unused_settings(said | {"eos_token_id": 2}) == said
    router = {"router_aux_loss_coef": 0.02, "router_jitter_noise": 0.1}
    assert unused_settings(router) == router
    assert decoder_config_from_hf(HF_CONFIGS["mixtral"] | router).num_experts == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[1]", "holds a list, expected a JSON object"),
        (b'{"hidden_size": 16, "hidden_size": 32}', "'hidden_size' stands twice"),
    ],
)
def test_a_broken_file_is_named(text, message, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        load_hf_config(tmp_path)


def test_an_adapter_is_not_passed_over(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/base"}')
    with pytest.raises(ValueError, match=r"an adapter for a/base .*merge_and_unload"):
        load_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIGS["llama"]))
    with pytest.raises(ValueError, match="would not be applied"):
        load_hf_config(tmp_path)

"""Hugging Face model families: the keys of their ``config.json`` and their tensors' names.

To add a family, add an entry to ``FAMILIES``: the defaults its configuration class
fills in for absent keys, and a function from its keys to what sets it apart. A family
with other tensor names brings its own table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spo_jax.models.config_keys import check_is_language_model, shown_value
from spo_jax.models.names import (
    LLAMA_NAMES,
    MIXTRAL_NAMES,
    OUT_NORM_NAMES,
    PHI3_NAMES,
    QWEN3_MOE_NAMES,
    TensorName,
)
from spo_jax.models.positions import USUAL
from spo_jax.models.traits import (
    HFConfig,
    gemma2_traits,
    gemma3_traits,
    llama_traits,
    mistral_traits,
    mixtral_traits,
    olmo2_traits,
    phi3_traits,
    qwen2_traits,
    qwen3_moe_traits,
    qwen3_traits,
    smollm3_traits,
)


@dataclass(frozen=True)
class Family:
    """One ``model_type``: its keys with ``defaults`` of absent ones, read by ``traits``.

    ``names`` are those of its tensors, ``positions`` the kinds of rotary positions it may have,
    ``activation`` the one that its MLP may have.
    """

    architecture: str
    defaults: HFConfig
    traits: Callable[[HFConfig], dict[str, Any]]
    names: Mapping[str, TensorName] = field(default_factory=lambda: LLAMA_NAMES)
    positions: tuple[str, ...] = USUAL
    activation: str = "silu"


_COMMON = {
    "hidden_act": "silu",
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
_QWEN = {
    **_COMMON,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA = {
    **_COMMON,
    "hidden_act": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        {**_COMMON, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
        llama_traits,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {
            **_COMMON,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
        },
        mistral_traits,
    ),
    "qwen2": Family("Qwen2ForCausalLM", {**_QWEN, "attention_bias": True}, qwen2_traits),
    "qwen3": Family(
        "Qwen3ForCausalLM", {**_QWEN, "head_dim": 128, "attention_bias": False}, qwen3_traits
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            **_COMMON,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        smollm3_traits,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {
            **_COMMON,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "attention_bias": False,
        },
        olmo2_traits,
        OUT_NORM_NAMES,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {
            **_COMMON,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
            "sliding_window": None,
        },
        phi3_traits,
        PHI3_NAMES,
        positions=("default", "longrope"),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {
            **_GEMMA,
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        gemma2_traits,
        OUT_NORM_NAMES,
        activation="gelu_pytorch_tanh",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {
            **_GEMMA,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
        },
        gemma3_traits,
        OUT_NORM_NAMES,
        activation="gelu_pytorch_tanh",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            **_COMMON,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": None,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
            "moe_intermediate_size": 768,
            "num_experts": None,
            "num_local_experts": None,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        qwen3_moe_traits,
        QWEN3_MOE_NAMES,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {
            **_COMMON,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        mixtral_traits,
        MIXTRAL_NAMES,
    ),
}


def family_of(hf_config: HFConfig, where: str = "config.json") -> Family:
    """Look up the family by ``model_type``; an unknown one is an error that names the known."""
    check_is_language_model(hf_config, where)
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"{where}: model_type={shown_value(model_type)} is not supported: "
            f"use one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]

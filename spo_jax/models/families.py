"""Hugging Face model families: the keys of their ``config.json`` and their tensors' names.

To add a family, add an entry to ``FAMILIES``: the defaults its configuration class
fills in for absent keys, and a function from its keys to what sets it apart. A family
with other tensor names brings its own table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

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

HFConfig: TypeAlias = Mapping[str, Any]
"""The content of a ``config.json``."""


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


def _llama_traits(hf: HFConfig) -> dict[str, Any]:
    bias = hf["attention_bias"]
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": hf["mlp_bias"]}


def _mistral_traits(hf: HFConfig) -> dict[str, Any]:
    if hf.get("use_sliding_window") is False and hf["sliding_window"] is not None:
        raise ValueError(
            f"config.json: use_sliding_window=False and sliding_window={hf['sliding_window']} "
            "disagree (a mistral model has no such switch): remove the first, or set "
            "sliding_window to null"
        )
    return {"sliding_window": hf["sliding_window"]}


def _qwen2_traits(hf: HFConfig) -> dict[str, Any]:
    if not hf["attention_bias"]:
        raise ValueError(
            "config.json: attention_bias=False: a qwen2 model always has biases on queries, keys "
            "and values; remove the key, or set model_type to the family of the weights"
        )
    return {"qkv_bias": True, **_qwen_windows(hf)}


def _qwen3_traits(hf: HFConfig) -> dict[str, Any]:
    bias = hf["attention_bias"]
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, **_qwen_windows(hf)}


def _qwen_windows(hf: HFConfig) -> dict[str, Any]:
    """The first ``max_window_layers`` layers attend fully, unless ``layer_types`` rules."""
    layers = range(hf["num_hidden_layers"])
    return _switched_windows(hf, tuple(i >= hf["max_window_layers"] for i in layers))


def _switched_windows(hf: HFConfig, sliding: tuple[bool, ...]) -> dict[str, Any]:
    """Windows where ``use_sliding_window`` is on: by ``layer_types``, else in ``sliding``."""
    if not hf["use_sliding_window"] or hf["sliding_window"] is None:
        if "sliding_attention" in (hf.get("layer_types") or ()):
            raise ValueError(
                "config.json: layer_types asks for sliding_attention but use_sliding_window is "
                "off: set use_sliding_window and sliding_window, or drop layer_types"
            )
        return {}
    if hf.get("layer_types"):
        sliding = tuple(kind == "sliding_attention" for kind in hf["layer_types"])
    return (
        {"sliding_window": hf["sliding_window"], "sliding_layers": sliding} if any(sliding) else {}
    )


def _smollm3_traits(hf: HFConfig) -> dict[str, Any]:
    """Positions in all layers but each ``no_rope_layer_interval``-th, or as the list says."""
    bias, count = hf["attention_bias"], hf["num_hidden_layers"]
    listed = hf["no_rope_layers"]
    if listed is not None and len(listed) != count:
        raise ValueError(
            f"config.json: no_rope_layers has {len(listed)} entries for "
            f"num_hidden_layers={count}: give one a layer, 0 where it has no positions"
        )
    turns = tuple(
        bool(listed[i]) if listed else (i + 1) % hf["no_rope_layer_interval"] != 0
        for i in range(count)
    )
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": hf["mlp_bias"],
        "rope_layers": None if all(turns) else turns,
        **_switched_windows(hf, tuple(not on for on in turns)),
    }


def _phi3_traits(hf: HFConfig) -> dict[str, Any]:
    return {"sliding_window": hf["sliding_window"]}


def _olmo2_traits(hf: HFConfig) -> dict[str, Any]:
    bias = hf["attention_bias"]
    return {"qkv_bias": bias, "o_bias": bias, "norms": "post", "full_qk_norm": True}


def _gemma2_traits(hf: HFConfig) -> dict[str, Any]:
    """Every second layer has a window, unless ``layer_types`` rules."""
    alternating = tuple(i % 2 == 0 for i in range(hf["num_hidden_layers"]))
    return {
        **_gemma_traits(hf),
        **_typed_windows(hf, alternating),
        "score_cap": _number(hf["attn_logit_softcapping"]),
    }


def _gemma3_traits(hf: HFConfig) -> dict[str, Any]:
    """Each ``sliding_window_pattern``-th layer has no window, unless ``layer_types`` rules."""
    if hf["attn_logit_softcapping"] is not None:
        raise ValueError(
            f"config.json: attn_logit_softcapping={hf['attn_logit_softcapping']}: transformers "
            "leaves it out of a gemma3_text model; set it to null, or model_type to gemma2"
        )
    pattern, layers = hf["sliding_window_pattern"], range(hf["num_hidden_layers"])
    return {
        **_gemma_traits(hf),
        **_typed_windows(hf, tuple((i + 1) % pattern != 0 for i in layers)),
        "qk_norm": True,
    }


def _gemma_traits(hf: HFConfig) -> dict[str, Any]:
    bias = hf["attention_bias"]
    width = hf["query_pre_attn_scalar"]
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "norms": "both",
        "unit_norms": True,
        "scaled_embeddings": True,
        "score_width": None if width == hf["head_dim"] else float(width),
        "logit_cap": _number(hf["final_logit_softcapping"]),
    }


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)


def _typed_windows(hf: HFConfig, sliding: tuple[bool, ...]) -> dict[str, Any]:
    """Windows by ``layer_types``, else in ``sliding``."""
    if hf["layer_types"]:
        sliding = tuple(kind == "sliding_attention" for kind in hf["layer_types"])
    if not any(sliding):
        return {}
    if hf["sliding_window"] is None:
        raise ValueError(
            "config.json: sliding_window is null, and layers "
            f"{', '.join(str(i) for i, on in enumerate(sliding) if on)} have a window: set it, or "
            "layer_types to full_attention for each"
        )
    return {"sliding_window": hf["sliding_window"], "sliding_layers": sliding}


def _qwen3_moe_traits(hf: HFConfig) -> dict[str, Any]:
    """Every layer has experts; a mixture with layers that have an MLP is not implemented."""
    if hf["decoder_sparse_step"] != 1 or hf["mlp_only_layers"]:
        raise ValueError(
            f"config.json: decoder_sparse_step={hf['decoder_sparse_step']}, mlp_only_layers="
            f"{hf['mlp_only_layers']}: layers with an MLP beside layers with experts are not "
            "implemented (only 1 and an empty list)"
        )
    if hf["use_sliding_window"] and hf["max_window_layers"] is not None:
        raise ValueError(
            "config.json: use_sliding_window with max_window_layers="
            f"{hf['max_window_layers']}: transformers leaves the second out of a qwen3_moe model, "
            "all of whose layers have the window; remove it"
        )
    counts = {hf[key] for key in ("num_experts", "num_local_experts")} - {None}
    if len(counts) > 1:
        raise ValueError(
            f"config.json: num_experts={hf['num_experts']} and num_local_experts="
            f"{hf['num_local_experts']} disagree: keep one of them"
        )
    bias = hf["attention_bias"]
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "qk_norm": True,
        "sliding_window": hf["sliding_window"] if hf["use_sliding_window"] else None,
        "num_experts": next(iter(counts), 128),
        "experts_per_token": hf["num_experts_per_tok"],
        "expert_size": hf["moe_intermediate_size"],
        "normed_routes": hf["norm_topk_prob"],
    }


def _mixtral_traits(hf: HFConfig) -> dict[str, Any]:
    return {
        "sliding_window": hf["sliding_window"],
        "num_experts": hf["num_local_experts"],
        "experts_per_token": hf["num_experts_per_tok"],
        "expert_size": hf["intermediate_size"],
    }


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
        _llama_traits,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {
            **_COMMON,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
        },
        _mistral_traits,
    ),
    "qwen2": Family("Qwen2ForCausalLM", {**_QWEN, "attention_bias": True}, _qwen2_traits),
    "qwen3": Family(
        "Qwen3ForCausalLM", {**_QWEN, "head_dim": 128, "attention_bias": False}, _qwen3_traits
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
        _smollm3_traits,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {
            **_COMMON,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "attention_bias": False,
        },
        _olmo2_traits,
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
        _phi3_traits,
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
        _gemma2_traits,
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
        _gemma3_traits,
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
        _qwen3_moe_traits,
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
        _mixtral_traits,
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

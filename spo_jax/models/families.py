"""Hugging Face model families: their ``config.json`` and tensor names <-> ours.

To add a family, add an entry to ``FAMILIES``: the defaults its configuration class
fills in for absent keys, and a function from its keys to what sets it apart. A family
with other tensor names brings its own table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from spo_jax.models.architecture import DecoderConfig
from spo_jax.models.config_keys import check_config_keys, check_is_language_model, shown_value
from spo_jax.models.names import LLAMA_NAMES, OUT_NORM_NAMES, PHI3_NAMES, TensorName
from spo_jax.models.positions import USUAL, positions_to_hf, read_positions

HFConfig: TypeAlias = Mapping[str, Any]
"""The content of a ``config.json``."""


@dataclass(frozen=True)
class Family:
    """One ``model_type``: its keys with ``defaults`` of absent ones, read by ``traits``.

    ``names`` are those of its tensors, ``positions`` the kinds of rotary positions it may have.
    """

    architecture: str
    defaults: HFConfig
    traits: Callable[[HFConfig], dict[str, Any]]
    names: Mapping[str, TensorName] = field(default_factory=lambda: LLAMA_NAMES)
    positions: tuple[str, ...] = USUAL


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


def decoder_config_from_hf(hf_config: HFConfig, where: str = "config.json") -> DecoderConfig:
    """Translate the content of a ``config.json``; what we do not implement is an error.

    So is a key that we do not know (``config_keys``), and what contradicts itself. ``where`` is
    what errors call the content. Dropout is left aside: it is off here.
    """
    family = family_of(hf_config, where)
    _refuse_unimplemented(hf_config, family)
    check_config_keys(
        hf_config, defaults=family.defaults, architecture=family.architecture, where=where
    )
    hf = {**family.defaults, **hf_config}
    positions = read_positions(hf_config, family.defaults, family.positions)
    num_heads = hf["num_attention_heads"]
    head_dim = hf["head_dim"] or hf["hidden_size"] // num_heads
    rotary_dim = int(head_dim * positions.share)
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=hf["num_key_value_heads"] or num_heads,
        head_dim=head_dim,
        rope_theta=positions.theta,
        rope_scaling=positions.scaling,
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
        rms_norm_eps=float(hf["rms_norm_eps"]),
        max_position_embeddings=hf["max_position_embeddings"],
        tie_word_embeddings=hf["tie_word_embeddings"],
        initializer_range=float(hf["initializer_range"]),
        **family.traits(hf),
    )


def decoder_config_to_hf(config: DecoderConfig, model_type: str) -> dict[str, Any]:
    """Write a ``config.json`` for a decoder that has none, as one of the known families.

    Raises ``ValueError`` when that family cannot express the decoder.
    """
    family = family_of({"model_type": model_type})
    sliding = config.sliding_window is not None
    types = [
        "sliding_attention" if on else "full_attention"
        for on in config.sliding_layers or (sliding,) * config.num_layers
    ]
    hf: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": positions_to_hf(config.rope_scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
    }
    traits = {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "use_sliding_window": sliding,
        "sliding_window": config.sliding_window,
        "layer_types": types,
        "partial_rotary_factor": config.turned / config.head_dim,
        "original_max_position_embeddings": config.context[1],
        "no_rope_layers": [int(on) for on in config.rope_layers or (True,) * config.num_layers],
    }
    hf |= {key: value for key, value in traits.items() if key in family.defaults}
    read_back = decoder_config_from_hf(hf)
    differing = [name for name, value in vars(config).items() if getattr(read_back, name) != value]
    if differing:
        raise ValueError(
            f"model_type={model_type!r} cannot express {', '.join(differing)}: "
            f"choose another of {', '.join(FAMILIES)}"
        )
    return hf


def _refuse_unimplemented(hf: HFConfig, family: Family) -> None:
    refused = []
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        refused.append(f"hidden_act={shown_value(hf['hidden_act'])} (only 'silu')")
    if hf.get("quantization_config"):
        refused.append("quantization_config (export the model in a float dtype first)")
    partial = hf.get("partial_rotary_factor") not in (None, 1.0)
    if partial and "partial_rotary_factor" not in family.defaults:
        refused.append(f"partial_rotary_factor={hf['partial_rotary_factor']!r} (only 1.0)")
    if hf.get("auto_map"):
        refused.append(
            f"auto_map={shown_value(hf['auto_map'])} (code of the folder is never run; remove the "
            f"key if the model is a plain {family.architecture})"
        )
    types = hf.get("layer_types") or ()
    types = types if isinstance(types, list | tuple) else ()
    unknown = sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"})
    if unknown:
        refused.append(f"layer_types {', '.join(unknown)}")
    mixed = "sliding_attention" in types or (types and hf.get("sliding_window"))
    if mixed and "layer_types" not in family.defaults:
        refused.append(f"layer_types in a {hf['model_type']} model")
    if refused:
        raise ValueError(f"config.json asks for what is not implemented: {'; '.join(refused)}")
    layers = hf.get("num_hidden_layers")
    if types and isinstance(layers, int) and len(types) != layers:
        raise ValueError(
            f"config.json: layer_types has {len(types)} entries for num_hidden_layers={layers}: "
            "give one a layer"
        )

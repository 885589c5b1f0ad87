"""What sets each family apart: keys of its ``config.json`` -> keywords of ``DecoderConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

HFConfig: TypeAlias = Mapping[str, Any]
"""The content of a ``config.json``."""


def llama_traits(hf: HFConfig) -> dict[str, Any]:
    """Biases as the configuration has them."""
    bias = hf["attention_bias"]
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": hf["mlp_bias"]}


def mistral_traits(hf: HFConfig) -> dict[str, Any]:
    """A window in every layer, or in none."""
    if hf.get("use_sliding_window") is False and hf["sliding_window"] is not None:
        raise ValueError(
            f"config.json: use_sliding_window=False and sliding_window={hf['sliding_window']} "
            "disagree (a mistral model has no such switch): remove the first, or set "
            "sliding_window to null"
        )
    return {"sliding_window": hf["sliding_window"]}


def qwen2_traits(hf: HFConfig) -> dict[str, Any]:
    """Biases of queries, keys and values; windows behind a switch."""
    if not hf["attention_bias"]:
        raise ValueError(
            "config.json: attention_bias=False: a qwen2 model always has biases on queries, keys "
            "and values; remove the key, or set model_type to the family of the weights"
        )
    return {"qkv_bias": True, **_qwen_windows(hf)}


def qwen3_traits(hf: HFConfig) -> dict[str, Any]:
    """Queries and keys are normed head by head; windows behind a switch."""
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


def smollm3_traits(hf: HFConfig) -> dict[str, Any]:
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


def phi3_traits(hf: HFConfig) -> dict[str, Any]:
    """A window in every layer, or in none."""
    return {"sliding_window": hf["sliding_window"]}


def olmo2_traits(hf: HFConfig) -> dict[str, Any]:
    """Norms behind attention and MLP; queries and keys normed over all heads."""
    bias = hf["attention_bias"]
    return {"qkv_bias": bias, "o_bias": bias, "norms": "post", "full_qk_norm": True}


def gemma2_traits(hf: HFConfig) -> dict[str, Any]:
    """Every second layer has a window, unless ``layer_types`` rules."""
    alternating = tuple(i % 2 == 0 for i in range(hf["num_hidden_layers"]))
    return {
        **_gemma_traits(hf),
        **_typed_windows(hf, alternating),
        "score_cap": _number(hf["attn_logit_softcapping"]),
    }


def gemma3_traits(hf: HFConfig) -> dict[str, Any]:
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


def qwen3_moe_traits(hf: HFConfig) -> dict[str, Any]:
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


def mixtral_traits(hf: HFConfig) -> dict[str, Any]:
    """Every layer has experts, as wide as the MLP of the configuration."""
    return {
        "sliding_window": hf["sliding_window"],
        "num_experts": hf["num_local_experts"],
        "experts_per_token": hf["num_experts_per_tok"],
        "expert_size": hf["intermediate_size"],
    }

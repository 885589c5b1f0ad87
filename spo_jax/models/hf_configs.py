"""The content of a ``config.json`` <-> ``DecoderConfig``; what is not implemented is refused."""

from __future__ import annotations

from typing import Any

from spo_jax.models.architecture import DecoderConfig
from spo_jax.models.config_keys import check_config_keys, shown_value
from spo_jax.models.families import FAMILIES, Family, HFConfig, family_of
from spo_jax.models.positions import positions_to_hf, read_positions, read_sliding_theta


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
    full, sliding_theta = read_sliding_theta(hf_config, family.defaults)
    positions = read_positions(full, family.defaults, family.positions)
    traits = family.traits(hf)
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
        activation=family.activation,
        initializer_range=float(hf["initializer_range"]),
        sliding_rope_theta=sliding_theta if traits.get("sliding_layers") else None,
        **traits,
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
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": positions_to_hf(config.rope_scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
    }
    width = config.score_width or config.head_dim
    width = int(width) if width == int(width) else width
    traits = {
        "hidden_act": family.activation,
        "hidden_activation": family.activation,
        "query_pre_attn_scalar": width,
        "attn_logit_softcapping": config.score_cap,
        "final_logit_softcapping": config.logit_cap,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "use_sliding_window": sliding,
        "sliding_window": config.sliding_window,
        "layer_types": types,
        "num_experts": config.num_experts,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_size,
        "norm_topk_prob": config.normed_routes,
        "rope_local_base_freq": config.sliding_rope_theta
        or family.defaults.get("rope_local_base_freq"),
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
    only = family.activation
    for key in ("hidden_act", "hidden_activation"):
        given = hf.get(key, only) if key in family.defaults else only
        if given != only and (only, given) != ("silu", "swish"):
            refused.append(f"{key}={shown_value(given)} (only {only!r})")
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

"""Every key of a ``config.json``: what we read, what changes nothing here, and the rest.

The rest is an error, for it may name a feature that ``transformers`` computes and we do not.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

_MOST = 2**31 - 1
_MOST_LAYERS = 10_000


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any, least: int, most: int = _MOST) -> bool:
    return type(value) is int and least <= value <= most


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(part, str) for part in value)


_SIZE = (f"a whole number from 1 to {_MOST}", lambda value: _is_whole(value, 1))
_LAYERS = (f"a whole number from 1 to {_MOST_LAYERS}", lambda v: _is_whole(v, 1, _MOST_LAYERS))
_COUNT = ("a whole number from 0 on", lambda value: _is_whole(value, 0))
_NUMBER = ("a finite number from 0 on", lambda value: _is_number(value) and value >= 0)
_ABOVE_ZERO = ("a finite number above 0", lambda value: _is_number(value) and value > 0)
_SHARE = ("a number above 0, at most 1", lambda value: _is_number(value) and 0 < value <= 1)
_FLAG = ("true or false", lambda value: isinstance(value, bool))
_TEXT = ("text", lambda value: isinstance(value, str))
_TEXTS = ("a list of texts", _is_texts)
_SWITCHES = (
    "a list of 0 and 1",
    lambda value: isinstance(value, list | tuple) and all(x in (0, 1) for x in value),
)
_COUNTS = (
    "a list of whole numbers from 0 on",
    lambda value: isinstance(value, list | tuple) and all(_is_whole(x, 0) for x in value),
)
_MAPPING = ("a mapping", lambda value: isinstance(value, Mapping))

KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model_type": _TEXT,
    "vocab_size": _SIZE,
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _SIZE,
    "num_key_value_heads": _SIZE,
    "head_dim": _SIZE,
    "hidden_act": _TEXT,
    "max_position_embeddings": _SIZE,
    "rms_norm_eps": _NUMBER,
    "rope_theta": _ABOVE_ZERO,
    "rope_scaling": _MAPPING,
    "rope_parameters": _MAPPING,
    "initializer_range": _NUMBER,
    "tie_word_embeddings": _FLAG,
    "attention_bias": _FLAG,
    "mlp_bias": _FLAG,
    "use_sliding_window": _FLAG,
    "sliding_window": _SIZE,
    "max_window_layers": _COUNT,
    "layer_types": _TEXTS,
    "architectures": _TEXTS,
    "partial_rotary_factor": _SHARE,
    "original_max_position_embeddings": _SIZE,
    "hidden_activation": _TEXT,
    "num_experts": _SIZE,
    "num_local_experts": _SIZE,
    "num_experts_per_tok": _SIZE,
    "moe_intermediate_size": _SIZE,
    "norm_topk_prob": _FLAG,
    "decoder_sparse_step": _SIZE,
    "mlp_only_layers": _COUNTS,
    "rope_local_base_freq": _ABOVE_ZERO,
    "sliding_window_pattern": _SIZE,
    "query_pre_attn_scalar": _ABOVE_ZERO,
    "attn_logit_softcapping": _ABOVE_ZERO,
    "final_logit_softcapping": _ABOVE_ZERO,
    "no_rope_layers": _SWITCHES,
    "no_rope_layer_interval": _SIZE,
}
"""Keys whose values are used, and what those have to be."""

_NULLABLE = {
    "num_key_value_heads", "rope_scaling", "rope_parameters", "sliding_window", "layer_types",
    "architectures", "attn_logit_softcapping", "final_logit_softcapping",
}  # fmt: skip

_ONLY: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "partial_rotary_factor": (1.0,),
    "use_bidirectional_attention": (False,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "pruned_heads": ({}, []),
}
"""Keys of which one value is what we compute; null counts as absent."""

DROPOUTS = (
    "attention_dropout", "hidden_dropout", "resid_dropout", "residual_dropout", "embd_pdrop",
    "resid_pdrop", "attn_pdrop", "classifier_dropout",
)  # fmt: skip
"""Off while a model is evaluated, and off here while it trains."""

OF_THE_ROUTER = ("router_aux_loss_coef", "router_jitter_noise")
"""Of training a model with experts: a loss that keeps them evenly busy, noise. Neither is done."""

NEUTRAL_GENERATION: dict[str, Any] = {
    "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0,
    "top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "num_beams": 1,
    "num_beam_groups": 1, "early_stopping": False, "length_penalty": 1.0,
    "diversity_penalty": 0.0, "penalty_alpha": None, "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "sequence_bias": None, "exponential_decay_length_penalty": None, "guidance_scale": 1.0,
    "max_length": 20, "max_new_tokens": None, "min_length": 0, "min_new_tokens": None,
    "max_time": None, "stop_strings": None, "num_return_sequences": 1,
    "renormalize_logits": False, "remove_invalid_values": False, "constraints": None,
    "force_words_ids": None, "watermarking_config": None, "token_healing": False,
    "dola_layers": None,
}  # fmt: skip
"""Settings of generation in a model folder, which we do not take from there: what says nothing."""

HARMLESS = {
    # where it came from, by what it was written
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "unsloth_version",
    "unsloth_fixed", "_from_model_config", "transformers.js_config", "tokenizer_class",
    "is_llama_config", "neftune_noise_alpha",
    # the dtype of the stored values, which every tensor says for itself (``check_config_keys``
    # looks whether the two agree)
    "dtype", "torch_dtype", "use_bfloat16",
    # ids: of EOS ``policies.stop_ids`` takes care, the others are the tokenizer's
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id",
    "mask_token_id", "unk_token_id", "decoder_start_token_id", "prefix",
    # how it runs, not what it computes; pretraining_tp cuts the same sums into parts
    "use_cache", "pretraining_tp", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "_attn_implementation_internal", "torchscript",
    "gradient_checkpointing", "use_flash_attn", "_flash_attn_2_enabled", "is_decoder",
    "tf_legacy_loss", "cache_implementation", "low_memory", "use_mtp", "disable_compile",
    # what is handed out beside the logits
    "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict", "return_dict_in_generate", "output_router_logits",
    # of other heads than the one for the next token
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params", "tie_encoder_decoder", "cross_attention_hidden_size",
}  # fmt: skip
"""Keys that change nothing of what we compute, whatever their value."""

_PARTS = ("text_config", "vision_config", "audio_config", "llm_config", "language_config")


def check_config_keys(
    hf: Mapping[str, Any], *, defaults: Mapping[str, Any], architecture: str, where: str
) -> None:
    """Raise ``ValueError`` for keys we do not know, values of a wrong type, and contradictions.

    ``defaults`` are the keys of the family with what stands in for absent ones; ``where`` is
    the file or the section of the configuration. An unknown key of a ``config.json`` is let
    pass where it says nothing: null, false, or what ``transformers`` writes by itself.
    """
    own = {*defaults, *REQUIRED, "model_type"}
    strict = where != "config.json"
    unknown = [
        key
        for key, value in hf.items()
        if not (key in own or _is_known(key, value))
        and not (key in _SECOND_NAMES and value == hf.get(_SECOND_NAMES[key]))
        and (strict or not _says_nothing(hf["model_type"], key, value))
    ]
    if unknown:
        listed = "; ".join(_name_unknown(key, hf[key], own) for key in unknown)
        raise ValueError(
            f"{where}: not known for model_type={hf['model_type']!r}: {listed}. A key that does "
            f"not change what the model computes can be removed from {where}"
        )
    missing = [key for key in REQUIRED if hf.get(key) is None]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: take the model's own config")
    for key in hf:
        if key in own or key in ("architectures", "layer_types"):
            _check_value(key, hf[key], defaults, where)
    named = hf.get("architectures") or []
    if any(name != architecture for name in named):
        raise ValueError(
            f"{where}: architectures={list(named)}: expected {architecture}, for a "
            f"{hf['model_type']} model that predicts the next token. If its weights are of that "
            f'class, write "architectures": ["{architecture}"]'
        )
    dtypes = [hf[key] for key in ("dtype", "torch_dtype") if hf.get(key) is not None]
    if len({str(name).removeprefix("torch.") for name in dtypes}) > 1:
        raise ValueError(
            f"{where}: dtype={dtypes[0]!r} and torch_dtype={dtypes[1]!r} disagree: keep one"
        )


def check_is_language_model(hf: Mapping[str, Any], where: str) -> None:
    """Raise ``ValueError`` for a model of which the text decoder is only a part."""
    part = next((name for name in _PARTS if isinstance(hf.get(name), Mapping)), None)
    if part is not None:
        inside = hf.get("text_config") or hf[part]
        raise ValueError(
            f"{where}: {part} describes a part of a larger model "
            f"(model_type={hf.get('model_type')!r}, inside {inside.get('model_type')!r}): only "
            "decoders of text are supported, so save the language model in a folder of its own"
        )


def unused_settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a ``config.json`` or a ``generation_config.json`` that say something, unused."""
    found = {key: hf[key] for key in (*DROPOUTS, *OF_THE_ROUTER) if hf.get(key)}
    for key, neutral in NEUTRAL_GENERATION.items():
        if hf.get(key) is not None and hf[key] != neutral:
            found[key] = hf[key]
    return found


def shown_value(value: Any) -> str:
    """A value for an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_known(key: str, value: Any) -> bool:
    if key in _ONLY:
        return value is None or any(
            value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
            for allowed in _ONLY[key]
        )
    return key in {*HARMLESS, *DROPOUTS, *OF_THE_ROUTER, *NEUTRAL_GENERATION, *_HANDLED}


_SECOND_NAMES = {
    "max_sequence_length": "max_position_embeddings",
    "sliding_window_size": "sliding_window",
}
"""Keys that are let pass where they say what another says."""

_HANDLED = {"architectures", "layer_types", "quantization_config", "auto_map"}
"""Keys with checks of their own, in every family."""


def _says_nothing(model_type: str, key: str, value: Any) -> bool:
    """Whether ``transformers`` has the key at this value by default, or it is null or false.

    Nor does a key that begins with an underscore: a note of whoever wrote the file.
    """
    if key in _ONLY:
        return False
    if value is None or value is False or key.startswith("_"):
        return True
    from transformers import AutoConfig

    default = getattr(AutoConfig.for_model(model_type), key, None)
    return type(default) is type(value) and bool(default == value)


def _name_unknown(key: str, value: Any, own: set[str]) -> str:
    near = difflib.get_close_matches(str(key), sorted(own), n=1, cutoff=0.75)
    hint = f" (did you mean {near[0]!r}?)" if near and near[0] != key else ""
    return f"{key}={shown_value(value)}{hint}"


def _check_value(key: str, value: Any, defaults: Mapping[str, Any], where: str) -> None:
    nullable = key in _NULLABLE or (key in defaults and defaults[key] is None)
    expected, is_valid = KINDS[key]
    if (value is None and nullable) or is_valid(value):
        return
    raise ValueError(
        f"{where}: {key}={shown_value(value)}: expected {expected}"
        f"{' or null' if nullable else ''}; take the model's own config.json"
    )

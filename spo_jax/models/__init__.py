"""Decoder language models: the Flax decoder, Hugging Face families, weights in and out."""

from __future__ import annotations

from spo_jax.models.architecture import DecoderConfig, Execution, RopeScaling
from spo_jax.models.attention import Layout
from spo_jax.models.cache import Cache, grow_cache, take_rows
from spo_jax.models.decoder import Model
from spo_jax.models.families import FAMILIES
from spo_jax.models.folders import load_hf_config, resolve_model_folder
from spo_jax.models.hf_configs import decoder_config_from_hf, decoder_config_to_hf
from spo_jax.models.lora import (
    Lora,
    add_scales,
    as_base,
    join,
    make_adapters,
    merge,
    split,
    with_dropout,
)
from spo_jax.models.saving import save_pretrained
from spo_jax.models.weights import WeightsError, init_model, load_model, load_params

__all__ = [
    "FAMILIES",
    "Cache",
    "DecoderConfig",
    "Execution",
    "Layout",
    "Lora",
    "Model",
    "RopeScaling",
    "WeightsError",
    "add_scales",
    "as_base",
    "decoder_config_from_hf",
    "decoder_config_to_hf",
    "grow_cache",
    "init_model",
    "join",
    "load_hf_config",
    "load_model",
    "load_params",
    "make_adapters",
    "merge",
    "resolve_model_folder",
    "save_pretrained",
    "split",
    "take_rows",
    "with_dropout",
]

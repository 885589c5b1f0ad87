"""Tiny models of every family, their weights drawn from a seed by tensor name."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from spo_jax.models import init_model
from spo_jax.models.families import family_of
from spo_jax.models.names import stored_tensors
from spo_jax.models.tensor_files import write_file

_SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}

HF_CONFIGS = {
    "llama": {  # keys as in Llama 3.1's config.json; the context short, so that scaling tells
        "model_type": "llama",
        **_SHAPE,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "tie_word_embeddings": False,
    },
    "llama_tied": {  # keys as transformers 5 writes them
        "model_type": "llama",
        **_SHAPE,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "mistral": {
        "model_type": "mistral",
        **_SHAPE,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 10000.0,
        "sliding_window": 5,
        "tie_word_embeddings": False,
    },
    "qwen2": {
        "model_type": "qwen2",
        **_SHAPE,
        "num_key_value_heads": 1,
        "rope_theta": 10000.0,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3",
        **_SHAPE,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "smollm3": {  # the layer in the middle has no positions
        "model_type": "smollm3",
        **_SHAPE,
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
        "no_rope_layers": [1, 0, 1],
        "no_rope_layer_interval": 4,
        "attention_bias": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "pad_token_id": None,  # the class has one beyond the tiny vocabulary
        "tie_word_embeddings": True,
    },
    "olmo2": {
        "model_type": "olmo2",
        **_SHAPE,
        "num_key_value_heads": 2,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
    "phi3": {  # as Phi-4-mini: six of the eight numbers of a head turn
        "model_type": "phi3",
        **_SHAPE,
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "partial_rotary_factor": 0.75,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.3, 2.5],
            "long_factor": [1.1, 4.0, 20.0],
        },
        "sliding_window": 30,
        "pad_token_id": None,
        "tie_word_embeddings": True,
    },
    "gemma2": {  # caps so low that they tell
        "model_type": "gemma2",
        **{key: value for key, value in _SHAPE.items() if key != "hidden_act"},
        "hidden_activation": "gelu_pytorch_tanh",
        "num_key_value_heads": 2,
        "head_dim": 6,
        "query_pre_attn_scalar": 3,
        "rope_theta": 10000.0,
        "sliding_window": 13,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    },
    "gemma3": {  # the last layer attends fully, and its positions are stretched
        "model_type": "gemma3_text",
        **{key: value for key, value in _SHAPE.items() if key != "hidden_act"},
        "hidden_activation": "gelu_pytorch_tanh",
        "num_key_value_heads": 1,
        "head_dim": 6,
        "query_pre_attn_scalar": 10,
        "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 50.0,
        "sliding_window": 13,
        "sliding_window_pattern": 3,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_SHAPE,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "rope_theta": 10000.0,
        "moe_intermediate_size": 12,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
    "mixtral": {
        "model_type": "mixtral",
        **_SHAPE,
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
}


def weights(hf_config: dict) -> dict[str, np.ndarray]:
    """Draw every stored tensor of the model, large enough that each of them matters."""
    names = family_of(hf_config).names
    tensors = {}
    for name, stored in stored_tensors(init_model(hf_config).abstract_params(), names).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        tensors[name] = rng.normal(0, 0.3, stored.shape).astype(np.float32)
        if name.endswith("norm.weight"):
            tensors[name] += 1
    return tensors


def write_folder(folder: Path, hf_config: dict, dtype: str = "float32") -> Path:
    """Write ``config.json`` and ``model.safetensors`` of a tiny model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config))
    tensors = weights(hf_config)
    shapes = {name: array.shape for name, array in tensors.items()}
    write_file(folder / "model.safetensors", shapes, jnp.dtype(dtype), tensors.values())
    return folder


def padded_tokens(seed: int, lengths: list[int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw right-aligned rows of the given lengths; padding holds random tokens too."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, _SHAPE["vocab_size"], (len(lengths), width)).astype(np.int32)
    mask = np.arange(width)[None] >= width - np.asarray(lengths)[:, None]
    return tokens, mask

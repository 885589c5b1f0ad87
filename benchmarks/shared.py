"""What the benchmarks share: a Llama of a given size, and random rows that fill their lengths."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax import CompletionBatch, Execution, Model, init_model


def make_llama(
    hidden: int, layers: int, *, vocabulary: int, tied: bool, remat: str = "none"
) -> Model:
    """8 heads over 4 kv heads, an MLP of 2.75 times the width."""
    return init_model(
        {
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": hidden * 11 // 4,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": hidden // 8,
            "rope_theta": 1e4,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": tied,
        },
        Execution(remat=remat),
    )


def random_rows(
    rows: int, prompt: int, completion: int, *, branches: int, vocabulary: int
) -> CompletionBatch:
    """Random rows without padding; a reference that finds all tokens equally likely."""
    rng = np.random.default_rng(0)
    completions = (rows, branches, completion)
    batch = CompletionBatch(
        prompt_tokens=rng.integers(0, vocabulary, (rows, prompt)).astype(np.int32),
        prompt_mask=np.ones((rows, prompt), bool),
        completion_tokens=rng.integers(0, vocabulary, completions).astype(np.int32),
        completion_mask=np.ones(completions, bool),
        row_ids=np.arange(rows, dtype=np.int32),
        reference_logprobs=np.full((rows, branches), -np.log(vocabulary) * completion, np.float32),
    )
    return jax.tree.map(jnp.asarray, batch)

"""A tiny model and random batches in the pair layout, for tests above the models room."""

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.models import DecoderConfig, Execution, Model
from spo_jax.objective.levels import make_logprobs_fn
from spo_jax.types import CompletionBatch

VOCABULARY = 53

ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
"""A ``config.json`` without its vocabulary."""


def tiny_model(**execution):
    config = DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rope_theta=1e4,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return Model(config, Execution(**execution))


def tiny_params(model, seed=0):
    return model.init(jax.random.key(seed))


class Bigram:
    """A model in the least that objectives ask of one: it predicts from the token before.

    Compiles in a fraction of the decoder's time; whether a model is right is not the question
    where it is used.
    """

    mesh = None
    logit_cap = None

    def init(self, seed=0):
        keys = jax.random.split(jax.random.key(seed), 3)
        shapes = {"embed": (VOCABULARY, 8), "mix": (8, 8), "head": (8, VOCABULARY)}
        pairs = zip(shapes.items(), keys, strict=True)
        return {name: jax.random.normal(key, shape) for (name, shape), key in pairs}

    def hidden(self, params, prompt_tokens, prompt_mask, completion_tokens, segments=None):
        def states(tokens):
            return jnp.tanh(params["embed"][tokens] @ params["mix"])

        return states(prompt_tokens), states(completion_tokens)

    def output_head(self, params):
        return params["head"]


def tiny_logprobs(model, chunk_tokens=16):
    return make_logprobs_fn(model, chunk_tokens=chunk_tokens)


def random_batch(rows=8, prompt=5, completion=6, branches=2, seed=0, filler=0, reference=True):
    """Rows of random lengths; the last ``filler`` rows are fillers."""
    rng = np.random.default_rng(seed)
    prompt_mask = np.arange(prompt) >= prompt - rng.integers(1, prompt + 1, (rows, 1))
    lengths = rng.integers(1, completion + 1, (rows, branches, 1))
    completion_mask = np.arange(completion) < lengths
    ids = np.arange(rows, dtype=np.int32)
    if filler:
        ids[-filler:] = -1
        prompt_mask[-filler:] = completion_mask[-filler:] = False
    batch = CompletionBatch(
        prompt_tokens=rng.integers(0, VOCABULARY, (rows, prompt)).astype(np.int32),
        prompt_mask=prompt_mask,
        completion_tokens=rng.integers(0, VOCABULARY, (rows, branches, completion)).astype(
            np.int32
        ),
        completion_mask=completion_mask,
        row_ids=ids,
        reference_logprobs=(
            -rng.uniform(5, 20, (rows, branches)).astype(np.float32) if reference else None
        ),
    )
    return jax.tree.map(jnp.asarray, batch)

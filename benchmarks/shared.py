"""What the benchmarks share: a small Llama, random rows, the step that has no pair layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from step_sides import llama_config

from spo_jax import CompletionBatch, Execution, Model, init_model


def make_llama(
    hidden: int, layers: int, *, vocabulary: int, tied: bool, remat: str = "elementwise"
) -> Model:
    """The model of ``llama_config``."""
    config = llama_config(hidden, layers, vocabulary, tied=tied)
    return init_model(config, Execution(remat=remat))


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


def as_sequences(batch: CompletionBatch) -> CompletionBatch:
    """``[B, n]`` completions as ``B n`` rows of one, the prompt repeated for each."""
    rows, branches, length = batch.completion_tokens.shape
    return CompletionBatch(
        jnp.repeat(batch.prompt_tokens, branches, axis=0),
        jnp.repeat(batch.prompt_mask, branches, axis=0),
        batch.completion_tokens.reshape(rows * branches, 1, length),
        batch.completion_mask.reshape(rows * branches, 1, length),
        jnp.repeat(batch.row_ids, branches),
    )


def make_full_logits_fn(model: Model):
    """``make_logprobs_fn`` as a trainer has it that knows neither pair layout nor chunks.

    Every completion is a sequence with its own copy of the prompt, and the logits of all
    positions, the prompt's too, are one float32 array ``[B n, P + C, V]``.
    """

    def logprobs(params, batch):
        rows = as_sequences(batch)
        prompt, completion = model.hidden(
            params, rows.prompt_tokens, rows.prompt_mask, rows.completion_tokens
        )
        hidden = jnp.concatenate([prompt, completion[:, 0]], axis=1)
        head = model.output_head(params).astype(hidden.dtype)
        logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
        tokens = jnp.concatenate([rows.prompt_tokens, rows.completion_tokens[:, 0]], axis=1)
        found = jax.nn.log_softmax(logits[:, :-1], axis=-1)
        found = jnp.take_along_axis(found, tokens[:, 1:, None], axis=-1)[..., 0]
        shape = batch.completion_tokens.shape
        return found[:, -shape[-1] :].reshape(shape)

    return logprobs

"""The numbers of docs/row.md: its two rows through one update of a tiny random model, on a CPU.

python benchmarks/row.py
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spo_jax import (
    BilevelBatch,
    completion_logprobs,
    init_model,
    init_state,
    make_logprobs_fn,
    make_objective,
    make_optimizer,
    make_penalty,
    make_preference_loss,
    make_train_step,
)
from spo_jax.data import (
    format_rows,
    load_records,
    load_tokenizer,
    make_chat_format,
    rows_to_batch,
    tokenize_rows,
)
from spo_jax.tasks import arithmetic

PAGE = Path(__file__).parents[1] / "docs" / "row.md"
ARCHITECTURE = {
    "model_type": "llama", "vocab_size": arithmetic.vocabulary_size(), "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1e4, "rms_norm_eps": 1e-5,
    "initializer_range": 0.05, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


def main() -> None:
    """Print what the page says, stop by stop."""
    with tempfile.TemporaryDirectory() as folder:
        pairs, tokenizer = Path(folder) / "pairs.jsonl", Path(folder) / "tokenizer"
        pairs.write_text(re.search(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)[1])
        arithmetic.write_tokenizer(tokenizer)
        tokenizer = load_tokenizer(tokenizer)
        rows, _ = format_rows(
            load_records(str(pairs)), make_chat_format(tokenizer), kind="preference"
        )
    ids, _ = tokenize_rows(rows, tokenizer, max_prompt_length=64, max_completion_length=64)
    batch = rows_to_batch(ids, np.array([1, 0]), prompt_length=8, completion_length=32)
    batch = jax.tree.map(jnp.asarray, batch)
    model = init_model(ARCHITECTURE)
    params = model.init(jax.random.key(0))
    logprobs = make_logprobs_fn(model, chunk_tokens=2048)
    batch = batch._replace(reference_logprobs=completion_logprobs(logprobs, params, batch))
    print("reference log-probs, the other row and ours:", batch.reference_logprobs)
    print("ours, chosen, first log-probs:", logprobs(params, batch)[1, 0, :3])
    objective = make_objective(logprobs, make_preference_loss("dpo", beta=0.1))
    chain, _ = make_optimizer(name="adamw", steps=10, learning_rate=1e-3, schedule="constant",
                              warmup_ratio=0.0)  # fmt: skip
    solver = make_penalty(outer=chain, penalty_weight=10.0)
    step = jax.jit(make_train_step(objective, solver, schedule=optax.constant_schedule(1e-3)))
    state = init_state(solver, objective, params, jax.random.PRNGKey(0))
    for _ in range(2):
        print("embedding of id 7:", state.solver.params["embed"][7, :3])
        state, metrics = step(state, BilevelBatch(preference=batch))
        shown = {k: round(float(v), 4) for k, v in metrics.items()}
        print(json.dumps(shown))


if __name__ == "__main__":
    main()

"""A loss of your own, trained plain and with SPO from the same SFT model, on a laptop's CPU.

    python examples/own_loss.py

In a run, from this folder:
    spo-jax train quickstart --loss '{name: "own_loss:squared_hinge_loss", beta: 0.1}'
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spo_jax as spo

CHARACTERS, KEY, ADAM = "0123456789+=.", jax.random.PRNGKey(0), optax.adam(1e-2)
ARCHITECTURE = {
    "model_type": "llama", "vocab_size": 13, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip


def squared_hinge_loss(policy: spo.PairLogprobs, reference: spo.PairLogprobs, *, beta: float):
    """``max(0, 1 - beta * margin)^2``, the margin that of DPO; per example, [B]."""
    margin = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
    return jnp.square(jax.nn.relu(1 - beta * margin))


def pairs_of_sums(count: int) -> spo.CompletionBatch:
    """``12+34=`` with its sum ``046.`` and one that is off by one; a token a character."""
    sums = np.random.default_rng(0).integers(0, 100, (count, 2))
    texts = [(f"{a:02d}+{b:02d}=", f"{a + b:03d}.", f"{a + b + 1:03d}.") for a, b in sums]
    ids = [[[CHARACTERS.index(c) for c in text] for text in row] for row in texts]
    prompts, completions = jnp.array([row[0] for row in ids]), jnp.array([row[1:] for row in ids])
    masks = jnp.ones_like(prompts, bool), jnp.ones_like(completions, bool)
    return spo.CompletionBatch(prompts, masks[0], completions, masks[1], jnp.arange(count))


def train(objective: spo.Objective, solver: spo.Solver, params, pairs: spo.CompletionBatch):
    step = jax.jit(spo.make_train_step(objective, solver, schedule=optax.constant_schedule(1e-2)))
    state = spo.init_state(solver, objective, params, KEY)
    for _ in range(60):
        state, metrics = step(state, spo.BilevelBatch(preference=pairs))
    return state.solver.params, metrics


if __name__ == "__main__":
    model, pairs = spo.init_model(ARCHITECTURE), pairs_of_sums(64)
    logprobs = spo.make_logprobs_fn(model, chunk_tokens=256)
    sft = spo.make_objective(logprobs, None, inner_value=0.0, reference="none")
    start, _ = train(sft, spo.make_inner_only(inner=ADAM), jax.jit(model.init)(KEY), pairs)
    reference = jax.jit(lambda: spo.completion_logprobs(logprobs, start, pairs))()
    pairs = pairs._replace(reference_logprobs=reference)
    loss = spo.make_preference_loss(squared_hinge_loss, beta=0.1)
    for name, weight in {"plain": 0.0, "with SPO": 10.0}.items():
        solver = spo.make_penalty(outer=ADAM, penalty_weight=weight)
        _, found = train(spo.make_objective(logprobs, loss), solver, start, pairs)
        chosen, rejected = found["log_ratio/chosen"], found["log_ratio/rejected"]
        print(f"{name:8} log-ratio (nats): chosen {chosen:+6.2f}, rejected {rejected:+6.2f}")

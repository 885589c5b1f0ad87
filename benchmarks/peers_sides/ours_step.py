"""One of our sides: a DPO step from the public functions, as README's loop has it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax

from spo_jax import (
    BilevelBatch,
    CompletionBatch,
    Execution,
    completion_logprobs,
    init_state,
    jit_step,
    load_model,
    load_params,
    make_logprobs_fn,
    make_objective,
    make_preference_loss,
    make_solver,
    make_train_step,
)

job = measure.read_job()
execution = Execution(compute_dtype=job.dtype, remat=job.remat, attention=job.attention)
model = load_model(job.model, execution)
params = load_params(job.model, model)
logprobs = make_logprobs_fn(model, chunk_tokens=job.chunk_tokens)
rows = measure.read_rows(job)
completions = np.stack([rows["chosen"], rows["rejected"]], axis=1)
pairs = CompletionBatch(
    prompt_tokens=rows["prompt"],
    prompt_mask=np.ones(rows["prompt"].shape, bool),
    completion_tokens=completions,
    completion_mask=np.ones(completions.shape, bool),
    row_ids=np.arange(len(completions), dtype=np.int32),
)
pairs = jax.tree.map(jnp.asarray, pairs)
frozen = None
if job.reference == "online":
    frozen = load_params(job.model, model)
else:
    found = jax.jit(lambda p, b: completion_logprobs(logprobs, p, b))(params, pairs)
    pairs = pairs._replace(reference_logprobs=found)
batch = BilevelBatch(preference=pairs)

loss = make_preference_loss("dpo", beta=job.beta)
objective = make_objective(logprobs, loss, reference=job.reference)
chain = optax.adamw(job.learning_rate, weight_decay=0.0)
solver = make_solver(job.solver, outer=chain, inner=chain)
schedule = optax.constant_schedule(job.learning_rate)
step = jit_step(make_train_step(objective, solver, schedule=schedule))
# Compiled, so that what it makes is committed to its device as what the step makes is: else the
# step would be compiled a second time.
init = jax.jit(partial(init_state, solver, objective), donate_argnums=0)
state = init(params, jax.random.PRNGKey(0))

clock, losses = measure.Clock(job.warmup), []
for _ in range(job.warmup + job.steps):
    state, metrics = jax.block_until_ready(step(state, batch, frozen))
    losses.append(float(metrics["loss"]))
    clock.step_ended()
measure.write_result(job, "jax jaxlib flax optax", losses=losses, **clock.found())

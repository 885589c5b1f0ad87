"""One of our sides: a DPO step from the public functions, as README's loop has it."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import measure
import numpy as np
from operations import longest_operations

from spo_jax import (
    BilevelBatch,
    CompletionBatch,
    Execution,
    completion_logprobs,
    init_model,
    init_state,
    jit_step,
    load_params,
    make_logprobs_fn,
    make_objective,
    make_optimizer,
    make_preference_loss,
    make_solver,
    make_train_step,
)
from spo_jax.parallel.host_memory import free_behind_compiler

free_behind_compiler()  # as a run of spo-jax train does
job = measure.read_job()
execution = Execution(
    param_dtype=job.param_dtype,
    compute_dtype=job.dtype,
    remat=job.remat,
    attention=job.attention,
)
model = init_model(job.architecture, execution)


def make_params():
    """The weights of the job's folder, or random ones that never leave the device."""
    if job.model:
        return load_params(job.model, model)
    return jax.jit(model.init)(jax.random.key(0))


params = make_params()
if job.layout == "sequences":
    sys.path.append(str(Path(__file__).parents[1]))
    from shared import make_full_logits_fn

    logprobs = make_full_logits_fn(model)
else:
    logprobs = make_logprobs_fn(model, chunk_tokens=job.chunk_tokens)
rows = measure.make_rows(job)
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
    frozen = make_params()
else:
    found = jax.jit(lambda p, b: completion_logprobs(logprobs, p, b))(params, pairs)
    pairs = pairs._replace(reference_logprobs=found)
batch = BilevelBatch(preference=pairs)

loss = make_preference_loss("dpo", beta=job.beta)
objective = make_objective(logprobs, loss, reference=job.reference, micro_batches=job.micro_batches)
chain, schedule = make_optimizer(
    name=job.optimizer,
    steps=job.warmup + job.steps,
    learning_rate=job.learning_rate,
    schedule="constant",
    warmup_ratio=0.0,
    max_grad_norm=None,
)
solver = make_solver(job.solver, outer=chain, inner=chain)
step = jit_step(make_train_step(objective, solver, schedule=schedule))
# Compiled, so that what it makes is committed to its device as what the step makes is: else the
# step would be compiled a second time.
init = jax.jit(partial(init_state, solver, objective), donate_argnums=0)
state = init(params, jax.random.PRNGKey(0))

clock, losses, start = measure.Clock(job.warmup), [], time.perf_counter()
for number in range(job.warmup + job.steps):
    state, metrics = jax.block_until_ready(step(state, batch, frozen))
    losses.append(float(metrics["loss"]))
    clock.step_ended()
    if not number:
        print(f"first step after {time.perf_counter() - start:.1f} s", flush=True)
device = jax.devices()[0]
told = {"device": device.device_kind, "losses": losses, **clock.found()}
on_device = device.memory_stats() or {}
if "peak_bytes_in_use" in on_device:
    told["peak_bytes"] = on_device["peak_bytes_in_use"]
if job.profile:
    with jax.profiler.trace(job.profile):
        jax.block_until_ready(step(state, batch, frozen))
    told["operations"] = longest_operations(job.profile)
    program = step.lower(state, batch, frozen).compile().as_text()
    Path(job.profile, "program.txt").write_text(program)  # what the trace's names stand for
measure.write_result(job, "jax jaxlib flax optax", **told)

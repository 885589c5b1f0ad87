"""Write the weights that all sides are given: random ones, as a Hugging Face folder."""

from __future__ import annotations

import jax
import measure

from spo_jax import init_model, save_pretrained

job = measure.read_job()
model = init_model(job.architecture)
save_pretrained(job.model, model.init(jax.random.key(0)), model, source=job.architecture)
measure.write_result(job, "jax")

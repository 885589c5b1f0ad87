"""Write what all sides are given: random weights as a Hugging Face folder, and random rows."""

from __future__ import annotations

import jax
import measure
import numpy as np

from spo_jax import init_model, save_pretrained

job = measure.read_job()
model = init_model(job.architecture)
save_pretrained(job.model, model.init(jax.random.key(0)), model, source=job.architecture)
draw = np.random.default_rng(0)
lengths = {"prompt": job.prompt, "chosen": job.completion, "rejected": job.completion}
vocabulary = job.architecture["vocab_size"]
rows = {
    name: draw.integers(0, vocabulary, (job.pairs, length)).astype(np.int32)
    for name, length in lengths.items()
}
np.savez(job.rows, **rows)
measure.write_result(job, "jax")

"""One of Tunix's sides: ``DPOTrainer`` with its own Llama, read by its own loader.

Its Llama computes in the dtype of its weights. It never hands ``rope_theta`` on: rotary positions
are those of 1,000,000 whatever the configuration says, so the benchmark's model has that too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3.model import ModelConfig, RematConfig
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput
from tunix.sft.hooks import TrainingHooks

job = measure.read_job()
clock, losses = measure.Clock(job.warmup), []


class Recording(TrainingHooks):
    """Keeps each loss, which the trainer tells one step late."""

    def _nothing(self, *args):
        """Of no use here."""

    on_train_start = on_train_end = on_train_step_start = _nothing
    on_eval_step_start = on_eval_step_end = _nothing

    def on_train_step_end(self, train_ctx, train_step, train_loss):
        """Note the loss."""
        losses.append(float(train_loss))


class AtHand(DPOTrainer):
    """The reference's log-probs computed once. Tunix has no setting for it: this is ours."""

    prepared = None

    def _prepare_inputs(self, training_input):
        if self.prepared is None:
            self.prepared = super()._prepare_inputs(training_input)
            self.ref_model = None
        return self.prepared


def load():
    """The weights of the job, in its dtype."""
    of = job.architecture
    config = ModelConfig(
        num_layers=of["num_hidden_layers"],
        vocab_size=of["vocab_size"],
        embed_dim=of["hidden_size"],
        hidden_dim=of["intermediate_size"],
        num_heads=of["num_attention_heads"],
        head_dim=of["head_dim"],
        num_kv_heads=of["num_key_value_heads"],
        rope_theta=int(of["rope_theta"]),
        norm_eps=of["rms_norm_eps"],
        weight_tying=of["tie_word_embeddings"],
        remat_config=RematConfig[job.remat],
    )
    return create_model_from_safe_tensors(job.model, config, dtype=jnp.dtype(job.dtype))


rows = measure.make_rows(job)
ones = {name: np.ones(ids.shape, np.int32) for name, ids in rows.items()}
batch = TrainingInput(
    prompt_ids=rows["prompt"],
    prompt_mask=ones["prompt"],
    chosen_ids=rows["chosen"],
    chosen_mask=ones["chosen"],
    rejected_ids=rows["rejected"],
    rejected_mask=ones["rejected"],
)
trainer = {"online": DPOTrainer, "at hand": AtHand}[job.reference](
    model=load(),
    ref_model=load(),
    optimizer=optax.adamw(job.learning_rate, weight_decay=0.0),
    training_config=DPOTrainingConfig(eval_every_n_steps=1, beta=job.beta),
)
trainer.with_training_hooks(Recording())
trainer.is_managed_externally = True  # one call a step, and not closed after it
for _ in range(job.warmup + job.steps):
    trainer.train([batch])
    jax.block_until_ready(nnx.state(trainer.model))
    clock.step_ended()
trainer.close()
measure.write_result(job, "google-tunix jax jaxlib flax optax", losses=losses, **clock.found())

"""One of TRL's sides: ``DPOTrainer`` on the CPU, on rows that are ids already."""

from __future__ import annotations

import tempfile

import measure
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

job = measure.read_job()
clock, losses = measure.Clock(job.warmup), []


class Recording(DPOTrainer):
    """Keeps each loss, which the log would round, and takes the rows as they are."""

    def _prepare_dataset(self, dataset, *args):
        return dataset  # nothing to tokenize

    def compute_loss(self, *args, **kwargs):
        """The trainer's own."""
        loss = super().compute_loss(*args, **kwargs)
        losses.append(float(loss.detach()))
        return loss


class Timing(TrainerCallback):
    """From one step's end to the next: fetching, forward, backward, update and log."""

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time."""
        clock.step_ended()


rows = measure.read_rows(job)
# Asked for its padding token alone, which no row needs.
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
    pad_token="<pad>",
    eos_token="<eos>",
)
with tempfile.TemporaryDirectory() as folder:
    settings = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=len(rows["prompt"]),
        max_steps=job.warmup + job.steps,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,  # not clipped: as at all sides
        beta=job.beta,
        max_length=None,
        use_cpu=True,
        bf16=job.dtype == "bfloat16",
        model_init_kwargs={"dtype": "float32"},
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **job.config,
    )
    trainer = Recording(
        model=job.model,
        args=settings,
        train_dataset=Dataset.from_dict({f"{k}_ids": v.tolist() for k, v in rows.items()}),
        processing_class=tokenizer,
        callbacks=[Timing()],
    )
    trainer.train()
measure.write_result(
    job,
    "trl torch transformers accelerate",
    losses=losses,
    threads=torch.get_num_threads(),
    **clock.found(),
)

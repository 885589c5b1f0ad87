"""One of TRL's sides: ``DPOTrainer`` on rows that are ids already."""

from __future__ import annotations

import copy
import tempfile

import measure
import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer

job = measure.read_job()
on_gpu = not job.on_cpu and torch.cuda.is_available()
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
        if on_gpu:
            torch.cuda.synchronize()
        clock.step_ended()


def make_models():
    """Arguments of the trainer and of its settings: a folder, or random weights on the device.

    Where it needs a reference, the trainer reads a folder twice; of a model it is given a copy.
    """
    loaded = {"dtype": job.param_dtype, "attn_implementation": job.attention}
    if job.model:
        return {"model": job.model}, {"model_init_kwargs": loaded}
    config = AutoConfig.for_model(**job.architecture)
    with torch.device("cuda" if on_gpu else "cpu"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, **loaded)
    at_hand = job.config.get("precompute_ref_log_probs", False)
    return {"model": model, "ref_model": None if at_hand else copy.deepcopy(model)}, {}


# Every step has the same rows, and all steps are one epoch.
steps = job.warmup + job.steps
rows = {
    f"{name}_ids": np.tile(ids, (steps, 1)).tolist() for name, ids in measure.make_rows(job).items()
}
# Asked for its padding token alone, which no row needs.
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
    pad_token="<pad>",
    eos_token="<eos>",
)
models, init = make_models()
with tempfile.TemporaryDirectory() as folder:
    settings = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=job.pairs,
        train_sampling_strategy="sequential",
        max_steps=steps,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,  # not clipped: as at all sides
        beta=job.beta,
        max_length=None,
        use_cpu=not on_gpu,
        bf16=job.dtype == "bfloat16",
        optim={"adamw": "adamw_torch_fused", "adafactor": "adafactor"}[job.optimizer],
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **init,
        **job.config,
    )
    trainer = Recording(
        **models,
        args=settings,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        callbacks=[Timing()],
    )
    trainer.train()
told = {"device": "cpu", "losses": losses, **clock.found()}
if on_gpu:
    told |= {
        "device": torch.cuda.get_device_name(),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }
packages = "trl torch transformers accelerate"
measure.write_result(job, packages, threads=torch.get_num_threads(), **told)

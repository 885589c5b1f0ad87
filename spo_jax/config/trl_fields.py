"""The settings of TRL 1.16's trainers and scripts: what each is here, or why it is nothing.

``tests/config/trl_fields.py`` stores their names, ``docs/from_trl.md`` prints this table.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

CARRIED, ALWAYS, NOT_YET, NONE = "carried", "always so here", "not here yet", "no counterpart"


class Field(NamedTuple):
    """``kind`` is one of the four words above; ``text`` is our key, or the reason."""

    kind: str
    text: str


TRAINERS = ("dpo", "cpo", "orpo", "kto")

_OWN = {
    "dpo kto": "router_aux_loss_coef pad_to_multiple_of precompute_ref_log_probs "
    "precompute_ref_batch_size activation_offloading sync_ref_model ref_model_mixup_alpha "
    "ref_model_sync_steps",
    "dpo": "truncation_mode padding_free loss_weights ld_alpha f_divergence_type "
    "f_alpha_divergence_coef use_weighting discopop_tau pad_token",
    "dpo cpo": "label_smoothing",
    "dpo cpo kto": "loss_type",
    "cpo orpo": "max_completion_length generate_during_eval is_encoder_decoder",
    "cpo": "cpo_alpha simpo_gamma alpha",
    "orpo": "padding_value",
    "kto": "desirable_weight undesirable_weight",
}
OWN = {name: tuple(who.split()) for who, names in _OWN.items() for name in names.split()}
"""Settings that not every trainer has -> those that have it."""

RENAMED = {
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
}
"""Names of earlier versions that mean the same; a warm-up below 1 is a ratio."""

_KEYS = {
    "model_name_or_path": "model.path",
    "dtype": "model.param_dtype; of the products too where neither bf16 nor fp16 is on",
    "dataset_name": "data.train; data.eval where eval_strategy is not no",
    "dataset_config": "data.subset",
    "dataset_train_split": "data.train_split",
    "dataset_test_split": "data.eval_split",
    "datasets": "one: data.train, data.subset, data.train_split; several: data.mix",
    "test_split_size": "data.eval_fraction, beside datasets",
    "output_dir": "output_dir",
    "seed": "seed (42)",
    "num_train_epochs": "train.epochs (3)",
    "max_steps": "train.steps, in place of epochs",
    "per_device_train_batch_size": "train.batch_size = this (8) x devices x accumulation",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "per_device_eval_batch_size": "train.eval_batch_size = this x devices",
    "eval_strategy": "whether there is data.eval; epoch and best are the end of the stage only",
    "eval_steps": "train.eval_every; a share needs max_steps",
    "logging_steps": "train.log_every; a share needs max_steps",
    "save_steps": "train.save_every; a share needs max_steps",
    "save_strategy": "no, epoch, best: train.save_every is not set, the end is saved",
    "report_to": "trackers: tensorboard, wandb, mlflow, trackio; none: metrics.jsonl alone",
    "save_total_limit": "train.keep_checkpoints",
    "learning_rate": "outer.learning_rate (1e-6)",
    "lr_scheduler_type": "outer.schedule: linear (default), cosine, constant; others are refused",
    "lr_scheduler_kwargs": "min_lr, min_lr_rate of cosine_with_min_lr: outer.final_ratio",
    "warmup_steps": "outer.warmup_ratio (0); whole steps need max_steps",
    "optim": "outer.name: adamw, lion, sgd; others are refused",
    "weight_decay": "outer.weight_decay",
    "adam_beta1": "outer.options.b1",
    "adam_beta2": "outer.options.b2",
    "adam_epsilon": "outer.options.eps",
    "max_grad_norm": "outer.max_grad_norm; 0: null",
    "bf16": "model.compute_dtype: bfloat16, on unless fp16 is or it is set false",
    "fp16": "model.compute_dtype: float16, without loss scaling",
    "gradient_checkpointing": "model.remat: full (default), false: none",
    "activation_checkpointing": "as gradient_checkpointing, and before it",
    "max_length": "data.max_prompt_length and data.max_completion_length, each (1024)",
    "max_completion_length": "data.max_completion_length; the prompt has the rest of max_length",
    "precompute_ref_log_probs": "reference.mode: precomputed or online; the values are the same",
    "sync_ref_model": "reference.moving where it is true; reference.mode is then online",
    "ref_model_mixup_alpha": "reference.moving.alpha (0.6)",
    "ref_model_sync_steps": "reference.moving.every (512)",
    "loss_type": "loss, see below",
    "loss_weights": "weight of each loss of a list",
    "ld_alpha": "loss.length_desensitized, with reference.mode: online",
    "label_smoothing": "flip_rate of robust_dpo, target_smoothing of exo_pair; as it is for CPO",
    "beta": "loss.beta; tau of ipo",
    "use_weighting": "loss.wpo; the weights are not aligned here",
    "cpo_alpha": "loss.alpha of cpo; beside simpo the solver penalty, linear, of that weight",
    "simpo_gamma": "loss.gamma_beta_ratio = this / beta",
    "alpha": "loss alphapo where it is not 0, beside simpo",
    "desirable_weight": "loss.desirable_weight",
    "undesirable_weight": "loss.undesirable_weight",
    "use_peft": "whether there is a section lora",
    "lora_r": "lora.rank (16)",
    "lora_alpha": "lora.alpha (32)",
    "lora_target_modules": "lora.targets (q_proj, v_proj); all-linear is *_proj",
    "use_rslora": "lora.alpha = lora_alpha x sqrt(lora_r)",
    "use_dora": "refused",
    "f_divergence_type": "reverse_kl is what all losses here have; others are refused",
}

_REASONS: tuple[tuple[str, str, str], ...] = (
    (ALWAYS, "no dropout", "disable_dropout"),
    (ALWAYS, "disable_dropout is on, there for adapters too; without it set lora.dropout",
     "lora_dropout"),
    (ALWAYS, "token sums, losses and optimizer arithmetic are float32; tf32 is JAX's setting",
     "tf32 bf16_full_eval fp16_full_eval"),
    (ALWAYS, "completions keep their start", "truncation_mode"),
    (ALWAYS, "token means are over the batch of all devices", "average_tokens_across_devices"),
    (ALWAYS, "shapes are chosen by the data, see data.packing",
     "padding_free pad_to_multiple_of padding_value pad_token length_column_name"),
    (ALWAYS, "rows are drawn by seed and epoch, of near lengths together",
     "train_sampling_strategy data_seed"),
    (ALWAYS, "rows that fill no batch wait for another epoch", "dataloader_drop_last"),
    (ALWAYS, "a column is read, or named in an error; see data.ignore_columns",
     "remove_unused_columns label_names"),
    (ALWAYS, "all logits are never held; the next batch is made beside the update",
     "use_liger_kernel liger_kernel_config dataloader_num_workers dataloader_pin_memory "
     "dataloader_persistent_workers dataloader_prefetch_factor dataloader_in_order "
     "dataloader_multiprocessing_context eval_accumulation_steps torch_empty_cache_steps"),
    (ALWAYS, "tokenizing takes all cores", "dataset_num_proc"),
    (ALWAYS, "the update is one compiled program",
     "torch_compile torch_compile_backend torch_compile_mode use_cache"),
    (ALWAYS, "an update that is not finite is not applied, and counted", "logging_nan_inf_filter"),
    (ALWAYS, "a checkpoint has all that an exact resume needs, data order included",
     "save_only_model ignore_data_skip restore_callback_states_from_checkpoint"),
    (ALWAYS, "SIGTERM saves first", "enable_jit_checkpoint"),
    (ALWAYS, "a stage trains, and evaluates where there are held-out rows",
     "do_train do_eval do_predict prediction_loss_only"),
    (ALWAYS, "decoders only", "is_encoder_decoder"),
    (ALWAYS, "each update a line in metrics.jsonl, written by one process",
     "logging_strategy logging_first_step log_on_each_node save_on_each_node"),
    (ALWAYS, "decoders have the task CAUSAL_LM", "lora_task_type"),
    (NOT_YET, "adapters of other matrices than projections; weights trained beside them",
     "lora_target_parameters lora_modules_to_save"),
    (NOT_YET, "quantized weights; with adapters set lora.quantize",
     "load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage"),
    (NOT_YET, "a loss that keeps experts evenly busy", "router_aux_loss_coef"),
    (NOT_YET, "streamed data: give a file or a folder", "dataset_streaming streaming"),
    (NOT_YET, "a revision of the hub: give the folder of it", "model_revision"),
    (NOT_YET, "activations kept on the host", "activation_offloading"),
    (NOT_YET, "a best checkpoint: see eval/ in metrics.jsonl and train.keep_every",
     "load_best_model_at_end metric_for_best_model greater_is_better"),
    (NOT_YET, "evaluation before the first update: run spo-jax evaluate", "eval_on_start"),
    (NOT_YET, "evaluations that begin later: they come every train.eval_every", "eval_delay"),
    (NOT_YET, "samples in an evaluation: see dynamics.samples, answers", "generate_during_eval"),
    (NOT_YET, "noise on the embeddings", "neftune_noise_alpha"),
    (NOT_YET, "other divergences than reverse_kl", "f_alpha_divergence_coef"),
    (NOT_YET, "the loss discopop: it overflows far on the wrong side", "discopop_tau"),
    (NOT_YET, "a batch found by trial: spo-jax plan --search", "auto_find_batch_size"),
    (NONE, "PyTorch's processes; here mesh.data, mesh.fsdp, mesh.tensor, --distributed",
     "fsdp fsdp_config deepspeed accelerator_config parallelism_config local_rank "
     "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
     "ddp_backend ddp_timeout ignore_bias_buffers"),
    (NONE, "XLA's flags say how products are added up (XLA_FLAGS)", "full_determinism"),
    (NONE, "the device is JAX's choice (JAX_PLATFORMS)", "use_cpu"),
    (NONE, "options of a PyTorch optimizer; see outer.options",
     "optim_args optim_target_modules"),
    (NONE, "model.remat names what is computed again",
     "gradient_checkpointing_kwargs activation_checkpointing_kwargs"),
    (NONE, "label smoothing of the Trainer's own loss, which these trainers do not use",
     "label_smoothing_factor"),
    (NONE, "keywords of from_pretrained; see the section model", "model_init_kwargs"),
    (NONE, "models are this library's own code", "trust_remote_code"),
    (NONE, "attention kernels are those of model.attention", "attn_implementation"),
    (NONE, "that pass takes train.eval_batch_size rows at once", "precompute_ref_batch_size"),
    (NONE, "uploads: spo-jax export writes a folder",
     "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
     "hub_revision"),
    (NONE, "names and services of trackers",
     "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id"),
    (NONE, "what the Trainer prints", "log_level log_level_replica disable_tqdm debug "
     "skip_memory_metrics include_num_input_tokens_seen"),
    (NONE, "metrics are computed here, none is a function given from outside",
     "include_for_metrics batch_eval_metrics eval_do_concat_batches eval_use_gather_object"),
    (NONE, "spo-jax train CONFIG --resume", "resume_from_checkpoint"),
)  # fmt: skip


def _table() -> dict[str, Field]:
    found = {name: Field(CARRIED, text) for name, text in _KEYS.items()}
    for kind, text, names in _REASONS:
        for name in names.split():
            assert name not in found, name
            found[name] = Field(kind, text)
    return found


FIELDS = _table()


def fields_of(trainer: str) -> list[str]:
    """The settings that ``trainer`` and its script take."""
    return [name for name in FIELDS if trainer in OWN.get(name, TRAINERS)]


def fields_text() -> str:
    """The table as Markdown; settings with the same reason share a row."""
    rows: dict[tuple[str, Field], list[str]] = {}
    for name, field in FIELDS.items():
        who = ", ".join(OWN.get(name, ())) or "all"
        rows.setdefault((who, field), []).append(name)
    lines = ["| of TRL | trainers | here |", "|---|---|---|"]
    for (who, field), names in rows.items():
        said = field.text if field.kind == CARRIED else f"{field.kind}: {field.text}"
        lines.append(f"| {_code(names)} | {who} | {said} |")
    return "\n".join(lines)


def _code(names: Iterable[str]) -> str:
    return " ".join(f"`{name}`" for name in names)

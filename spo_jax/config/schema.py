"""What a run is, as frozen dataclasses: every key, its default and its meaning, once.

A configuration is YAML over these classes. ``load_config`` reads, overrides and
validates it; ``key_help.describe`` prints the reference that ``--help`` shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

BUILTIN_TASK = "builtin:arithmetic"
"""What ``data.train``, ``sft_data.train`` and ``model.tokenizer`` say to use the built-in task."""


def _key(default: Any, text: str) -> Any:
    if isinstance(default, dict | list):
        return field(default_factory=lambda: default, metadata={"help": text})
    return field(default=default, metadata={"help": text})


MIXTURE = "mixture"
"""The name of a loss that is given as a list: a weighted sum of the losses of that list."""


Tracker: TypeAlias = Literal["tensorboard", "wandb", "mlflow", "trackio"]
"""A service that shows metrics."""


@dataclass(frozen=True)
class Named:
    """A choice by name with the options that choice takes: ``{name: dpo, beta: 0.1}``.

    A section ``loss`` that is a list is the choice ``MIXTURE``, with the list as ``losses``.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """The policy to start from."""

    path: str | None = _key(None, "Hugging Face folder or hub name, or the folder of a run")
    init: dict[str, Any] | None = _key(
        None, "instead of path: a config.json as a mapping; weights are drawn at random"
    )
    tokenizer: str | None = _key(None, "tokenizer folder or hub name, when not that of path")
    param_dtype: Literal["float32", "bfloat16", "float16"] = _key("float32", "stored weights")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _key(
        "auto",
        "matrix products (default: bfloat16 on TPUs and on GPUs that have it, float32 on CPUs; a "
        "run keeps what it began with)",
    )
    remat: Literal["none", "elementwise", "dots", "dots_no_batch", "full"] = _key(
        "elementwise",
        "what the backward pass computes again: nothing, all but products and attention (default), "
        "all but products, all but the layers' products, every layer",
    )
    attention: Literal["auto", "xla", "blocked", "cudnn", "splash"] = _key(
        "auto", "attention kernel"
    )
    logprob_chunk: int | None = _key(
        None,
        "tokens whose logits are in memory at once, per data shard (default: 2048; on a CPU "
        "those that 512 MiB hold, in one process on GPUs those that a twelfth of a GPU holds)",
    )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: with a rank they alone are trained, on the model as it is."""

    rank: int | None = _key(None, "of the adapters (default: none, all weights are trained)")
    alpha: float | None = _key(None, "their term counts alpha / rank (default: twice the rank)")
    targets: tuple[str, ...] = _key(
        ("*_proj",), "projections that get one, by name or pattern: q_proj, gate_proj, *_proj"
    )
    dropout: float = _key(0.0, "share of their inputs that an update leaves out, at random")
    quantize: Literal["nf4"] | None = _key(
        None, "the base's projections in 4 bits (QLoRA) (default: in model.param_dtype)"
    )


@dataclass(frozen=True)
class MixedData:
    """A data set of a mixture; what it does not say is as in its section."""

    train: str | None = _key(None, "file, folder or hub name")
    weight: float = _key(1.0, "how often an epoch sees each row: 2 twice, 0.5 every other epoch")
    subset: str | None = _key(None, "configuration of a hub data set")
    train_split: str | None = _key(None, "split of a hub data set")
    streaming: bool | None = _key(None, "fetch what is read and no more")
    max_rows: int | None = _key(None, "use only its first rows")
    columns: dict[str, str] | None = _key(None, "our name of a column to the file's")
    ignore_columns: tuple[str, ...] | None = _key(None, "columns that are left out")


@dataclass(frozen=True)
class DataConfig:
    """A data set of rows and how it is cut to length."""

    train: str | None = _key(None, "file, folder, hub name, or builtin:arithmetic")
    mix: tuple[MixedData, ...] = _key(
        (), "instead of train: several, [{train: a.jsonl}, {train: b.jsonl, weight: 0.5}]"
    )
    eval: str | None = _key(None, "held-out rows, same forms")
    subset: str | None = _key(None, "configuration of a hub data set (gsm8k: main)")
    train_split: str = _key("train", "split of a hub data set")
    streaming: bool = _key(
        False, "hub data sets: fetch what is read and no more (train; needs max_rows)"
    )
    eval_split: str = _key("test", "split of a hub data set")
    eval_fraction: float = _key(0.0, "without eval: share of the prompts of train held out")
    max_rows: int | None = _key(None, "use only the first rows of train")
    max_prompt_length: int = _key(1024, "tokens; longer prompts are cut from the left")
    max_completion_length: int = _key(1024, "tokens, EOS included; longer ones lose their end")
    prompt_buckets: tuple[int, ...] | None = _key(None, "padded prompt lengths (default: by data)")
    completion_buckets: tuple[int, ...] | None = _key(None, "padded completion lengths")
    packing: Literal["auto"] | bool = _key(
        "auto",
        "several examples in one row: true | false | auto (where it saves a fifth of the work; "
        "not with buckets given, nor for models with sliding windows)",
    )
    on_bad_row: Literal["error", "skip"] = _key("error", "what a row that cannot be used does")
    columns: dict[str, str] = _key({}, "our name of a column to the file's, {prompt: instruction}")
    ignore_columns: tuple[str, ...] = _key((), "columns and keys of messages that are left out")
    split_special_tokens: bool = _key(
        False, "control tokens in plain text are text (those in messages always are)"
    )
    chat_template: str | None = _key(None, "Jinja template, or its file, over the tokenizer's own")


@dataclass(frozen=True)
class PreferenceDataConfig(DataConfig):
    """A data set of pairs."""

    drop_displacing: float | None = _key(
        None,
        "leave out this share of the training pairs: those that displace most, by "
        "length-normalised CHES under the policy they start from (see spo-jax score-pairs)",
    )


@dataclass(frozen=True)
class ObjectiveConfig:
    """How the inner level and the regularizer are formed (METHOD section 3)."""

    inner_data: Literal["chosen", "sft", "own"] = _key(
        "chosen",
        "inner level on the chosen completions, the rows of sft_data, or the policy's own right "
        "answers (which make-pairs --keep-right wrote beside the pairs)",
    )
    inner_value: Literal["reference", "running_min", "tracked"] | float = _key(
        "reference",
        "estimate of the smallest inner loss: reference | running_min | tracked (that of a copy "
        "of the policy that takes steps of the section inner) | a number",
    )
    tracked_steps: int = _key(1, "inner steps of the tracked copy an update")
    validation_fraction: float | None = _key(
        None,
        "share of the training prompts to set aside: the gap that the solver sees is that of their "
        "chosen completions, which no update of a stage of pairs trains on (inner_batch_size rows "
        "an update)",
    )
    reward_calibration: float | None = _key(
        None, "RC: the loss's two gradients rebalanced, by a running mean of this decay (0.98)"
    )
    regularizer: Literal["nll", "hinge"] | None = _key(None, "R: pushes the chosen's likelihood")
    regularizer_weight: float = _key(0.0, "mu, the weight of R")


@dataclass(frozen=True)
class ReferenceConfig:
    """The reference policy."""

    mode: Literal["precomputed", "online", "none"] = _key(
        "precomputed", "log-probs computed once ahead | in every step | no reference at all"
    )
    path: str | None = _key(None, "reference model (default: the policy as it starts)")
    moving: dict[str, int | float] = _key(
        {},
        "{alpha, every}, with mode online: it follows the policy, ref <- (1 - alpha) ref + alpha "
        "policy after every so many updates (TR-DPO; 1: hard)",
    )
    cache_dir: str | None = _key(None, "where log-probs are kept (default: the user's cache)")


@dataclass(frozen=True)
class OptimizerConfig:
    """An optax chain: clip, optimizer, decay, schedule."""

    name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = _key("adamw", "optimizer")
    learning_rate: float = _key(1e-6, "peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = _key("cosine", "after the warm-up")
    warmup_ratio: float = _key(0.1, "share of the steps with a linear warm-up")
    final_ratio: float = _key(0.0, "learning rate at the end, as a share of the peak")
    weight_decay: float = _key(0.0, "decoupled; never on norms and biases")
    max_grad_norm: float | None = _key(1.0, "global-norm clip; null: none")
    options: dict[str, bool | int | float] = _key(
        {}, "further keywords of the optimizer (b1, b2, eps, ...)"
    )


@dataclass(frozen=True)
class LoopConfig:
    """Length and rhythm of one stage."""

    steps: int | None = _key(None, "updates; this or epochs")
    epochs: float | None = _key(None, "passes over the data; this or steps")
    batch_size: int = _key(8, "rows per update, over all devices")
    gradient_accumulation: int = _key(1, "micro-batches an update is computed in")
    log_every: int = _key(1, "updates between lines of metrics.jsonl")
    eval_every: int | None = _key(None, "updates between held-out evaluations (also at the end)")
    eval_batch_size: int | None = _key(None, "rows (default: batch_size)")
    save_every: int | None = _key(None, "updates between checkpoints (also at the end)")
    keep_checkpoints: int = _key(2, "newest checkpoints kept")
    keep_every: int | None = _key(None, "updates between checkpoints that are kept for good")
    max_skipped: int = _key(
        10, "updates in a row not applied, for something not finite in them, that stop the run"
    )


@dataclass(frozen=True)
class PreferenceLoopConfig(LoopConfig):
    """Length and rhythm of the preference stage."""

    inner_batch_size: int | None = _key(
        None, "SFT rows per update: of the inner level, or to measure the gap (default: batch_size)"
    )
    alarm_log_ratio: float = _key(
        -2.0, "chosen log-ratio (nats) below which a growing margin raises the displacement alarm"
    )


@dataclass(frozen=True)
class DynamicsConfig:
    """Probes of the probability dynamics on a fixed set of pairs, into dynamics.jsonl."""

    every: Literal["auto"] | int | None = _key(
        None,
        "updates between probings, also before the first and after the last (default: none) | "
        "auto: a twentieth of the steps",
    )
    pairs: int = _key(16, "pairs of the probe set, drawn from the training rows by the seed")
    gradients: Literal["exact", "head", "none"] = _key(
        "exact",
        "per-pair gradients of the first-order law: exact (room for five copies of the "
        "parameters in float32) | head (of the output head alone) | none",
    )
    own_step_rate: float = _key(
        1e-5, "learning rate of the step on one pair alone that the law is checked with"
    )
    temperature: float = _key(1.0, "of the sampled completions")
    max_new_tokens: int | None = _key(
        None, "most tokens of the policy's own completions (default: the completion bucket)"
    )
    top_k: int = _key(10, "likeliest tokens whose mass is added up")
    samples: int = _key(4, "of the pairs, how many are also written as text")


@dataclass(frozen=True)
class AnswersConfig:
    """Greedy answers to problems, graded: after every stage, and on the way where asked for."""

    data: str | None = _key(
        None, "problems with their answers: file, folder, hub name, or builtin:arithmetic"
    )
    task: str | None = _key(None, "how answers are graded (see spo-jax evaluate --task)")
    subset: str | None = _key(None, "configuration of a hub data set (gsm8k: main)")
    split: str = _key("test", "split of a hub data set; of the built-in task: test | validation")
    max_rows: int | None = _key(None, "use only the first problems")
    every: int | None = _key(
        None, "updates of a stage of pairs between gradings, at its evaluations (train.eval_every)"
    )
    max_prompt_length: int = _key(1024, "tokens; longer prompts are cut from the left")
    max_new_tokens: int | None = _key(None, "of an answer (default: by the task)")
    batch_size: int = _key(512, "answers generated at once")
    columns: dict[str, str] = _key({}, "our name of a column to the file's")
    ignore_columns: tuple[str, ...] = _key((), "columns and keys of messages that are left out")
    chat_template: str | None = _key(None, "Jinja template, or its file, over the tokenizer's own")


@dataclass(frozen=True)
class TextsConfig:
    """Texts that nothing is trained on: their token-mean loss at the end of every stage."""

    data: dict[str, str] = _key(
        {}, "{NAME: file, folder or hub name}: SFT rows, or pairs (their chosen)"
    )
    split: str = _key("train", "split of a hub data set")
    max_rows: int | None = _key(None, "use only the first rows of each")
    max_prompt_length: int = _key(1024, "tokens; longer prompts are cut from the left")
    max_completion_length: int = _key(1024, "tokens, EOS included; longer ones lose their end")
    batch_size: int = _key(8, "rows at once")
    chat_template: str | None = _key(None, "Jinja template, or its file, over the tokenizer's own")


@dataclass(frozen=True)
class TaskConfig:
    """The built-in arithmetic task (data.train: builtin:arithmetic)."""

    digits: int = _key(3, "digits of each summand")
    sft_problems: int = _key(3000, "problems with solutions, for SFT")
    preference_problems: int = _key(2500, "problems the policy's own wrong samples are taken on")
    test_problems: int = _key(500, "problems for exact answers")
    validation_problems: int = _key(0, "others, to choose hyper-parameters on")
    samples: int = _key(4, "samples of the policy per preference problem")
    temperature: float = _key(1.0, "of those samples")
    chosen: Literal["gold", "own"] = _key(
        "gold", "of a pair: the solution, or a sample of the policy that is right"
    )


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh; one axis may be -1: what is left."""

    data: int = _key(-1, "copies of the parameters, each with its part of the batch")
    fsdp: int = _key(1, "parts of the parameters and of the batch")
    tensor: int = _key(1, "parts of each layer's heads and widths")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    output_dir: str = _key("runs/run", "folder of the run, or gs://..., s3://...")
    seed: int = _key(0, "of initialization, data order and sampling")
    date: str | None = _key(
        None, "YYYY-MM-DD that chat templates are told (default: the day the run begins)"
    )
    compilation_cache: bool | str = _key(
        True, "keep compiled programs for the next start: true (the user's cache), false, a folder"
    )
    rows_cache: bool | str = _key(
        True, "keep token rows for the next start: true (the user's cache), false, a folder"
    )
    trackers: tuple[Tracker, ...] = _key(
        ("tensorboard",), "services that show the metrics, beside metrics.jsonl"
    )
    stages: tuple[Literal["sft", "preference", "baseline"], ...] = _key(
        ("preference",),
        "sft, preference, baseline (preference again, solver preference_only), in this order",
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: PreferenceDataConfig = field(default_factory=PreferenceDataConfig)
    sft_data: DataConfig = field(default_factory=DataConfig)
    loss: Named = field(default_factory=lambda: Named("dpo", {"beta": 0.1}))
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    solver: Named = field(default_factory=lambda: Named("penalty"))
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    outer: OptimizerConfig = field(default_factory=OptimizerConfig)
    inner: OptimizerConfig = field(default_factory=OptimizerConfig)
    sft_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=2e-5)
    )
    train: PreferenceLoopConfig = field(default_factory=PreferenceLoopConfig)
    sft: LoopConfig = field(default_factory=LoopConfig)
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    texts: TextsConfig = field(default_factory=TextsConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    task: TaskConfig = field(default_factory=TaskConfig)

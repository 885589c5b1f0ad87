"""A run of TRL's DPO, CPO, ORPO or KTO trainer as a configuration of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml

from spo_jax.config.parsing import ConfigError, Dumper, nearest
from spo_jax.config.schema import Tracker
from spo_jax.config.trl_fields import FIELDS
from spo_jax.config.trl_files import find_trainer, read_trl
from spo_jax.config.trl_losses import loss_sections, number
from spo_jax.config.trl_settings import Settings
from spo_jax.config.validation import checked_config

_ADAMW = (
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused"),
    *("adamw_anyprecision", "adamw_hf", "adamw_apex_fused", "paged_adamw", "paged_adamw_32bit"),
    *("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit", "paged_adamw_8bit"),
)
_LION = ("lion", "lion_32bit", "paged_lion_32bit", "lion_8bit", "paged_lion_8bit")
OPTIMIZERS = dict.fromkeys(_ADAMW, "adamw") | dict.fromkeys(_LION, "lion") | {"sgd": "sgd"}
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}


class Converted(NamedTuple):
    """Our YAML, and a line for each setting that is not in it."""

    text: str
    left: tuple[str, ...]


def convert(path: str | Path, *, trainer: str | None, devices: int | None) -> Converted:
    """Read a file of TRL's and write what it asks for as a checked configuration.

    Raises:
        ConfigError: what cannot be read, has no equal here, or would not pass validation.
    """
    asked = read_trl(path)
    if trainer and asked.trainer and trainer != asked.trainer:
        raise ConfigError(f"--trainer {trainer}, but {path} is a command of {asked.trainer}")
    try:
        trainer = trainer or asked.trainer or find_trainer(asked.given)
        run = _Run(asked.given, trainer)
        count = devices or asked.devices or 1
        tree = run.sections(count)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    try:
        checked_config(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}{_names(str(error), asked.given)}") from None
    text = "".join(f"# {line}\n" for line in (*_header(path, trainer, run, count), *run.notes))
    text += yaml.dump(tree, Dumper=Dumper, sort_keys=False)
    return Converted(text, (*run.left_out(), *asked.notes))


def _header(path: str | Path, trainer: str, run: _Run, devices: int) -> list[str]:
    a_device, parts = run.batch
    if run.tree["solver"]["name"] == "preference_only":
        solver = "solver: preference_only is TRL's loss alone. Leave `solver` out to add SPO."
    else:
        solver = (
            "solver: its weight is that of TRL's NLL of the chosen. For SPO leave `solver` out "
            "(penalty_weight 10)."
        )
    return [
        f"From TRL's {trainer.upper()}Trainer, {Path(path).name}: spo-jax train THIS_FILE",
        solver,
        f"batch_size: {a_device} a device x {devices} devices x {parts} micro-batches (--devices).",
    ]


def _names(error: str, given: Mapping[str, Any]) -> str:
    """The settings of TRL's that the keys in an error come from."""
    words = {word.partition("=")[0].rstrip(":,.") for word in error.split()}
    of = [n for n in given if n in FIELDS and words & set(FIELDS[n].text.replace(";", " ").split())]
    return f" (in TRL's words: {', '.join(of)})" if of else ""


class _Run(Settings):
    """The sections of our configuration from the settings of one file."""

    def __init__(self, given: Mapping[str, Any], trainer: str) -> None:
        super().__init__(given, trainer)
        self.notes: list[str] = []
        self.tree: dict[str, Any] = {}
        self.batch = (8, 1)
        self.steps = self.whole("max_steps", -1)

    def sections(self, devices: int) -> dict[str, Any]:
        """Our tree; TRL's defaults are written where ours are others."""
        found = loss_sections(self.trainer, self.given)
        self.used |= found.used
        if "ld_alpha" in found.used and "precompute_ref_log_probs" in self.given:
            self.leave("precompute_ref_log_probs", "ld_alpha needs reference.mode: online")
        output = self.take("output_dir")
        self.tree = {
            **({} if output is None else {"output_dir": output}),
            **self._trackers(),
            "seed": self.whole("seed", 42),
            "model": self._model(),
            **self._lora(),
            "data": self._data(),
            **found.sections,
            "outer": self._outer(),
            "train": self._loop(devices),
        }
        self.notes += found.notes
        if self.trainer in ("cpo", "orpo"):
            self.notes.append(
                "reference: of no part in this loss; reference.mode: none with "
                "objective.inner_value: running_min saves its pass."
            )
        return self.tree

    def _trackers(self) -> dict[str, list[str]]:
        asked = self.take("report_to")
        if asked is None:
            return {}
        names = [asked] if isinstance(asked, str) else list(asked)
        known = get_args(Tracker)
        here = [name for name in names if name in known]
        others = [name for name in names if name not in (*known, "none")]
        if others:
            self.leave("report_to", f"{', '.join(map(str, others))}: not among our trackers")
        return {"trackers": here}

    def _model(self) -> dict[str, Any]:
        path = self.take("model_name_or_path")
        if path is None:
            raise ConfigError("model_name_or_path is not set: name the model in the file")
        dtype = self.take("dtype", "auto" if "dtype" in self.given else "float32")
        if dtype == "auto":  # null too: that of the stored weights
            self.leave("dtype", "float32 is written; set model.param_dtype")
            dtype = "float32"
        fp16 = self.flag("fp16", False)
        bf16 = self.flag("bf16", not fp16)
        if fp16 and bf16:
            raise ConfigError("bf16 and fp16 are both true: choose one")
        compute = "float16" if fp16 else "bfloat16" if bf16 else dtype
        again = self.flag("activation_checkpointing", None)
        if again is None:
            again = self.flag("gradient_checkpointing", True)
        remat = "full" if again else "none"
        return {"path": path, "param_dtype": dtype, "compute_dtype": compute, "remat": remat}

    def _lora(self) -> dict[str, Any]:
        if not self.flag("use_peft", False):
            return {}
        if self.flag("use_dora", False):
            raise ConfigError("use_dora=True: adapters have no magnitudes here. Leave it out")
        rank, alpha = self.whole("lora_r", 16), self.number("lora_alpha", 32)
        if self.flag("use_rslora", False):
            alpha *= rank**0.5
        asked = self.take("lora_target_modules", ["q_proj", "v_proj"])
        targets = [
            "*_proj" if name == "all-linear" else str(name).rpartition(".")[2]
            for name in ([asked] if isinstance(asked, str) else asked)
        ]
        odd = [name for name in targets if name != "*_proj" and not name.isidentifier()]
        if odd:
            raise ConfigError(
                f"lora_target_modules={asked!r}: {odd[0]!r} is a regular expression; name the "
                "projections, or all-linear"
            )
        return {"lora": {"rank": rank, "alpha": float(alpha), "targets": targets}}

    def _data(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        mixture = self.take("datasets")
        evaluated = self.word("eval_strategy", "no") != "no"
        if mixture:
            found = self._mixture(mixture)
            if evaluated and self.has("test_split_size"):
                found["eval_fraction"] = self.number("test_split_size", 0.0)
        else:
            names = {"dataset_name": "train", "dataset_config": "subset"}
            names |= {"dataset_train_split": "train_split"}
            found = {ours: self.take(name) for name, ours in names.items() if self.has(name)}
            if "train" not in found:
                raise ConfigError("dataset_name is not set: name the data in the file")
            if evaluated:
                found["eval"] = found["train"]
                found["eval_split"] = self.take("dataset_test_split", "test")
        return found | self._lengths()

    def _mixture(self, mixture: Any) -> dict[str, Any]:
        if not isinstance(mixture, list) or not all(isinstance(one, dict) for one in mixture):
            raise ConfigError(
                f"datasets={mixture!r}: expected a list of mappings, each with a path"
            )
        names = {"path": "train", "name": "subset", "split": "train_split"}
        for key in (key for one in mixture for key in one):
            if key not in names:
                raise ConfigError(f"datasets: {key} is not read here; write the rows into a file")
        found = [{names[k]: v for k, v in one.items() if v is not None} for one in mixture]
        if any("train" not in one for one in found):
            raise ConfigError("datasets: each needs a path")
        return found[0] if len(found) == 1 else {"mix": found}

    def _lengths(self) -> dict[str, int]:
        if "max_length" in self.given and self.given["max_length"] is None:
            self.leave("max_length", "nothing is cut in TRL; 1024 is written, see section data")
        total = self.whole("max_length", 1024)
        self.notes.append(
            f"lengths: TRL cuts prompt and completion together at {total} tokens; here each has "
            "its limit."
        )
        prompt = self.whole("max_prompt_length", 0)  # of earlier versions
        completion = self.whole("max_completion_length", total - prompt)
        if self.has("max_completion_length") and not prompt:
            prompt = total - completion
        return {"max_prompt_length": prompt or total, "max_completion_length": completion}

    def _outer(self) -> dict[str, Any]:
        kind = self.word("optim", "adamw_torch_fused")
        if kind not in OPTIMIZERS:
            raise ConfigError(
                f"optim={kind}: here are adamw_torch, lion_32bit and sgd"
                f"{nearest(kind, [*OPTIMIZERS])}"
            )
        if "8bit" in kind:
            self.leave("optim", f"{OPTIMIZERS[kind]} is written; its state is float32 here")
        rate = self.number("learning_rate", 1e-6)
        schedule, final = self._schedule(rate)
        norm = self.number("max_grad_norm", 1.0)
        found: dict[str, Any] = {
            "name": OPTIMIZERS[kind],
            "learning_rate": rate,
            "schedule": schedule,
            "warmup_ratio": self._warmup(),
            "final_ratio": final,
            "weight_decay": self.number("weight_decay", 0.0),
            "max_grad_norm": norm if norm > 0 else None,
        }
        defaults = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
        takes = {"adamw": ("b1", "b2", "eps"), "lion": ("b1", "b2"), "sgd": ()}[found["name"]]
        options = {
            ours: self.number(name, defaults[name])
            for name, ours in zip(defaults, takes, strict=False)
        }
        return found | ({"options": options} if options else {})

    def _schedule(self, rate: float) -> tuple[str, float]:
        kind = self.word("lr_scheduler_type", "linear")
        if kind not in SCHEDULES:
            raise ConfigError(f"lr_scheduler_type={kind}: choose one of {', '.join(SCHEDULES)}")
        keywords = self.take("lr_scheduler_kwargs", {})
        if kind != "cosine_with_min_lr" and not keywords:
            return SCHEDULES[kind], 0.0
        known = isinstance(keywords, dict) and set(keywords) in ({"min_lr"}, {"min_lr_rate"})
        if kind != "cosine_with_min_lr" or not known:
            raise ConfigError(
                f"lr_scheduler_kwargs={keywords!r} with {kind}: what is read is min_lr or "
                "min_lr_rate of cosine_with_min_lr"
            )
        if "min_lr_rate" in keywords:
            return "cosine", number(keywords, "min_lr_rate", 0.0)
        return "cosine", number(keywords, "min_lr", 0.0) / (rate or 1.0)

    def _warmup(self) -> float:
        if self.given.get("lr_scheduler_type") == "constant":
            return 0.0
        steps = self.number("warmup_steps", 0.0)
        if steps < 1:
            return steps
        if self.steps > 0:
            return steps / self.steps
        self.leave("warmup_steps", "whole steps need max_steps: set outer.warmup_ratio")
        return 0.0

    def _rhythm(self, name: str, default: int | float, key: str) -> dict[str, int]:
        value = self.number(name, default)
        if value >= 1:
            return {key: int(value)}
        if self.steps > 0 and value > 0:
            return {key: math.ceil(value * self.steps)}
        self.leave(name, f"a share of the steps needs max_steps: set train.{key}")
        return {}

    def _loop(self, devices: int) -> dict[str, Any]:
        a_device = self.whole("per_device_train_batch_size", 8)
        parts = self.whole("gradient_accumulation_steps", 1)
        self.batch = (a_device, parts)
        found: dict[str, Any] = {"batch_size": a_device * devices * parts}
        if self.steps > 0:
            found = {"steps": self.steps} | found
        else:
            found = {"epochs": self.number("num_train_epochs", 3.0)} | found
        found["gradient_accumulation"] = parts
        if self.has("logging_steps"):
            found |= self._rhythm("logging_steps", 10, "log_every")
        strategy = self.word("eval_strategy", "no")
        if strategy == "steps":
            asked = self.given.get("eval_steps")
            name = "eval_steps" if asked else "logging_steps"
            found |= self._rhythm(name, 10, "eval_every")
        elif strategy != "no":
            self.leave("eval_strategy", "evaluated at the end of the stage: set train.eval_every")
        if strategy != "no" and self.has("per_device_eval_batch_size"):
            size = self.whole("per_device_eval_batch_size", 8)
            found["eval_batch_size"] = size * devices
        saved = self.word("save_strategy", "steps")
        if saved not in ("no", "steps"):
            self.leave("save_strategy", "saved at the end of the stage: set train.save_every")
        if saved == "steps" and self.has("save_steps"):
            found |= self._rhythm("save_steps", 500, "save_every")
        if self.has("save_total_limit"):
            found["keep_checkpoints"] = self.whole("save_total_limit", 2)
        return found

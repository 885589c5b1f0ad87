"""Iterated preference optimization: pairs of the policy, an update of it, and again.

Each round samples from the policy that the round before left, makes pairs of its mistakes, and
trains on them against that policy as the reference: a proximal point method. With
``extrapolation`` its result is carried on past itself, as in Accelerated Preference Optimization
(APO, arXiv 2410.06293, whose summaries we hold): pi ~ pi_new (pi_new / pi_old)^alpha, where
``pi_old`` is what the round before had before its own extrapolation. It is done in the
parameters, theta + alpha (theta - theta_old), which for log-linear policies is the same.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from spo_jax.checkpoints.atomic import replace_text, to_json
from spo_jax.config.parsing import (
    ConfigError,
    changed_keys,
    config_to_dict,
    nearest,
    override,
)
from spo_jax.config.schema import BUILTIN_TASK, Config, ModelConfig
from spo_jax.config.validation import checked_config
from spo_jax.evaluation.answers import make_exam, take_exam
from spo_jax.models import save_pretrained
from spo_jax.parallel.mesh import make_mesh
from spo_jax.parallel.processes import by_first, say, shared_work
from spo_jax.parallel.stores import check_local
from spo_jax.policies.loading import Policy, as_trained, load_policy
from spo_jax.sampling.builtin import PAIRS_FILE
from spo_jax.sampling.make_pairs import make_pairs
from spo_jax.study.grid import pair_options, read_over_base
from spo_jax.training.run import train
from spo_jax.types import Params

RESULT_FILE = "result.json"
POLICY = "policy"
"""Inside a round's folder: its policy where that is extrapolated, as ``transformers`` loads it."""

_SET_BY_ROUNDS = ("output_dir", "stages", "sft", "sft_optimizer")


@dataclass(frozen=True)
class RoundsConfig:
    """``rounds`` of pairs and training, each from where the one before ended.

    ``run`` is a configuration of ``spo-jax train`` without stages (``base: other.yaml`` takes it
    from a file); its ``model`` is where the first round begins. ``pairs`` are options of
    ``spo-jax make-pairs``; ``data`` may be a list, a file of problems for each round. Pairs of
    the built-in task (``run.data.train``) need none. Rounds have one seed, and so the same prompts
    held out; their samples are drawn by another one each.
    """

    output_dir: str = "runs/rounds"
    title: str = "Rounds"
    rounds: int = 3
    extrapolation: float = 0.0
    pairs: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


def read_rounds(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RoundsConfig:
    """Read the YAML of iterated training, lay ``overrides`` over it, check every round.

    Raises:
        ConfigError: a missing file, an unknown key, or a round that could not be run.
    """
    tree = override(read_over_base(path, _unused), overrides or {})
    check_local("output_dir", tree.get("output_dir"))
    names = [each.name for each in fields(RoundsConfig)]
    for key in tree:
        if key not in names:
            raise ConfigError(
                f"unknown key {key}{nearest(str(key), names)}; rounds take {', '.join(names)}"
            )
    values = {key: value for key, value in tree.items() if value is not None}
    alpha = values.get("extrapolation", 0.0)
    if isinstance(alpha, int) and not isinstance(alpha, bool):
        values["extrapolation"] = float(alpha)
    plan = RoundsConfig(**values)
    _check(plan)
    return plan


def _unused(run: Mapping[str, Any]) -> tuple[str, ...]:
    """Sections of a base that rounds have no use for."""
    inner = (run.get("objective") or {}).get("inner_data")
    return _SET_BY_ROUNDS if inner == "sft" else (*_SET_BY_ROUNDS, "sft_data")


def _check(plan: RoundsConfig) -> None:
    if isinstance(plan.rounds, bool) or not isinstance(plan.rounds, int) or plan.rounds < 1:
        raise ConfigError(f"rounds={plan.rounds!r}: expected a whole number from 1 on")
    if not isinstance(plan.extrapolation, int | float) or not 0 <= plan.extrapolation < 10:
        raise ConfigError(
            f"extrapolation={plan.extrapolation!r}: expected a number from 0 (none) on; APO has 0.3"
        )
    for key in _SET_BY_ROUNDS:
        if key in plan.run:
            raise ConfigError(f"run.{key} would be ignored: the rounds set it. Remove it")
    train_file = (plan.run.get("data") or {}).get("train")
    if plan.pairs and train_file is not None:
        raise ConfigError("run.data.train would be ignored: pairs makes the pairs. Remove one")
    if not plan.pairs and train_file != BUILTIN_TASK:
        raise ConfigError("pairs is not set: say what each round makes its pairs of")
    if plan.pairs and policy_path(plan, 0) is None:
        raise ConfigError("run.model.path is not set: the first pairs are made by that policy")
    files = plan.pairs.get("data")
    if isinstance(files, list) and len(files) != plan.rounds:
        raise ConfigError(
            f"pairs.data has {len(files)} files for {plan.rounds} rounds: one for each"
        )
    for number in range(1, plan.rounds + 1):
        if round_config(plan, number).lora.quantize is not None:
            raise ConfigError(
                "run.lora.quantize in rounds: each would round to 4 bits what the one before has "
                "learnt. Set lora.quantize to null"
            )
        if plan.pairs:
            _pair_options(plan, number)


def folder_of(plan: RoundsConfig, number: int) -> Path:
    """Where round ``number`` (from 1) lies: the folder of a run."""
    return Path(plan.output_dir) / f"round{number}"


def policy_path(plan: RoundsConfig, number: int) -> str | None:
    """What names the policy that round ``number`` left; of round 0 the model of ``run``."""
    folder = folder_of(plan, number) / (POLICY if plan.extrapolation else "")
    return str(folder) if number else (plan.run.get("model") or {}).get("path")


def round_config(plan: RoundsConfig, number: int) -> Config:
    """The configuration that round ``number`` trains.

    Raises:
        ConfigError: it could not be run.
    """
    folder = folder_of(plan, number)
    tree = {**plan.run, "output_dir": str(folder), "stages": ["preference"]}
    if number > 1:
        kept = {k: v for k, v in tree["model"].items() if k not in ("init", "tokenizer")}
        tree["model"] = {**kept, "path": policy_path(plan, number - 1)}
    if plan.pairs:
        tree["data"] = {**(tree.get("data") or {}), "train": str(folder / PAIRS_FILE)}
    try:
        return checked_config(tree)
    except ConfigError as error:
        raise ConfigError(f"round {number}: {error}") from None


def _pair_options(plan: RoundsConfig, number: int):
    data = plan.pairs.get("data")
    pairs = {**plan.pairs, "data": data[number - 1]} if isinstance(data, list) else plan.pairs
    return pair_options(pairs, plan.run.get("seed", 0) + number - 1)


def run_rounds(plan: RoundsConfig) -> list[dict[str, Any]]:
    """Run what is not done yet; returns a dictionary of figures for the start and each round.

    The same call again goes on: rounds that are finished are kept, of a round under way the
    samples that were drawn and the checkpoints. Several processes share ``output_dir``.

    Raises:
        ValueError: a finished round had other settings.
    """
    found = [_start(plan)]
    for number in range(1, plan.rounds + 1):
        kept = by_first(partial(_kept, plan, number))
        if kept is None:
            begins = policy_path(plan, number - 1) or "random weights"
            say(f"round {number} of {plan.rounds}: from {begins}")
            kept = _run(plan, number)
        found.append(kept)
    return found


def _settings(plan: RoundsConfig, number: int) -> dict[str, Any]:
    settings = {"run": config_to_dict(round_config(plan, number)), "pairs": plan.pairs}
    return json.loads(to_json({**settings, "extrapolation": plan.extrapolation}, "settings"))


def _changed(plan: RoundsConfig, number: int, before: Mapping[str, Any]) -> list[str]:
    """What a round was begun with and would no longer be, in words."""
    now = _settings(plan, number)
    changed = changed_keys(round_config(plan, number), before["run"])
    said = [f"{key}: {old} -> {new}" for key, (old, new) in changed.items()]
    return said + [k for k in sorted(now) if k != "run" and before.get(k) != now[k]]


def _kept(plan: RoundsConfig, number: int) -> dict[str, Any] | None:
    """The figures of a round that is finished; one that is begun must have the same settings."""
    folder = folder_of(plan, number)
    path = folder / RESULT_FILE
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    said = _changed(plan, number, result["settings"])
    if said:
        raise ValueError(
            f"{folder} was run with other settings: {'; '.join(said)}. Choose another "
            "--output-dir, or remove that folder and those of later rounds"
        )
    return result["figures"]


def _start(plan: RoundsConfig) -> dict[str, Any]:
    """Graded answers of the policy that the first round begins with, if any are asked for."""
    path, settings = Path(plan.output_dir) / "start.json", _settings(plan, 1)

    def kept() -> dict[str, Any] | None:
        found = json.loads(path.read_text()) if path.is_file() else {}
        unchanged = found and not _changed(plan, 1, found["settings"])
        return found["figures"] if unchanged else None

    figures = by_first(kept)
    if figures is not None:
        return figures
    config, figures = round_config(plan, 1), {"round": 0}
    with shared_work(path.parent) as work:
        mesh = make_mesh(**dataclasses.asdict(config.mesh))
        policy = load_policy(config.model, mesh, seed=config.seed, work=work)
        figures |= _graded(config, policy)
    by_first(partial(_write, path, settings, figures))
    return figures


def _write(path: Path, settings: dict[str, Any], figures: dict[str, Any] | None) -> None:
    text = to_json({"settings": settings, "figures": figures}, str(path), indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text + "\n")


def _graded(config: Config, policy: Policy) -> dict[str, float]:
    exam = make_exam(config, policy.tokenizer)
    return {} if exam is None else take_exam(exam, policy)


def _run(plan: RoundsConfig, number: int) -> dict[str, Any]:
    begun, folder, config = time.perf_counter(), folder_of(plan, number), round_config(plan, number)
    settings_of_round = _settings(plan, number)
    by_first(partial(_write, folder / RESULT_FILE, settings_of_round, None))  # begun
    pairs = folder / PAIRS_FILE
    if plan.pairs and not by_first(pairs.exists):
        rows, settings = _pair_options(plan, number)
        model = policy_path(plan, number - 1)
        make_pairs(model, rows.pop("data"), pairs, settings, **rows)
    finished = train(config, resume=True)["preference"]
    figures: dict[str, Any] = {"round": number, "pairs": by_first(partial(_lines, pairs))}
    figures |= finished.metrics
    if plan.extrapolation:
        carried = _extrapolated(plan, number, finished.policy)
        graded = _graded(config, carried)
        figures |= {f"extrapolated/{name}": value for name, value in graded.items()}
    figures["seconds"] = round(time.perf_counter() - begun, 1)
    by_first(partial(_write, folder / RESULT_FILE, settings_of_round, figures))
    jax.clear_caches()
    return figures


def _lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for _ in lines)


def _extrapolated(plan: RoundsConfig, number: int, policy: Policy) -> Policy:
    """The policy of a round carried on, and its folder written."""
    config, mesh = round_config(plan, number), policy.model.mesh

    def params_of(model: ModelConfig) -> Params:
        with shared_work(folder_of(plan, number)) as work:
            return load_policy(model, mesh, seed=config.seed, work=work).params

    before = config.model
    if number > 1:
        before = dataclasses.replace(before, path=str(folder_of(plan, number - 1)))
    new = policy.params
    if config.lora.rank is not None:  # training leaves a base with adapters beside it
        new = params_of(as_trained(folder_of(plan, number)))
    params = extrapolate(new, params_of(before), plan.extrapolation)
    folder, source = folder_of(plan, number) / POLICY, policy.folder
    dtype = config.model.param_dtype
    save_pretrained(folder, params, policy.model, source=source, dtype=dtype, overwrite=True)
    return policy._replace(params=params)


def extrapolate(params: Params, before: Params, alpha: float) -> Params:
    """``params + alpha (params - before)``, leaf by leaf, computed in float32.

    The buffers of ``before`` are taken over.
    """

    def carried(new: jax.Array, old: jax.Array) -> jax.Array:
        wide = new.astype(jnp.float32)
        return (wide + alpha * (wide - old.astype(jnp.float32))).astype(new.dtype)

    return jax.jit(lambda *both: jax.tree.map(carried, *both), donate_argnums=1)(params, before)


_COLUMNS = {
    "pairs": ("pairs", 1.0, "{:.0f}"),
    "accuracy": ("exact answers %", 100.0, "{:.1f}"),
    "extrapolated/accuracy": ("extrapolated %", 100.0, "{:.1f}"),
    "log_ratio/chosen": ("chosen log-ratio", 1.0, "{:+.2f}"),
    "log_ratio/rejected": ("rejected log-ratio", 1.0, "{:+.2f}"),
    "seconds": ("seconds", 1.0, "{:.0f}"),
}


def rounds_table(found: list[dict[str, Any]]) -> str:
    """A line for the start and each round, in Markdown; log-ratios are against its own start."""
    shown = [name for name in _COLUMNS if any(name in figures for figures in found)]
    lines = ["| round |" + "".join(f" {_COLUMNS[name][0]} |" for name in shown)]
    lines.append("|---|" + "---|" * len(shown))
    for figures in found:
        cells = [
            "–" if figures.get(name) is None else form.format(scale * figures[name])
            for name, (_, scale, form) in ((name, _COLUMNS[name]) for name in shown)
        ]
        lines.append(f"| {figures['round'] or 'start'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

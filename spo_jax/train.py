"""Assemble a configuration into stages, compile their step, run them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax

from spo_jax import __version__
from spo_jax.answers import Exam, make_exam, take_exam
from spo_jax.builtin import builtin_data
from spo_jax.checkpoints import load_reference, save_reference
from spo_jax.config import BUILTIN_TASK, Config, LoopConfig, Named
from spo_jax.config_io import changed_keys, read_tree, save_config
from spo_jax.data import eval_batches, make_train_iterator
from spo_jax.evaluate import make_evaluate
from spo_jax.loop import Batches
from spo_jax.losses import PreferenceLoss, make_preference_loss
from spo_jax.objectives import Objective, make_logprobs_fn, make_objective
from spo_jax.prepare import (
    MODEL_FOLDER,
    Policy,
    Rows,
    inner_updates,
    is_run,
    load_policy,
    make_chain,
    make_reference_logprobs,
    prepare_rows,
    round_up,
    say,
)
from spo_jax.probe_set import make_probe_set
from spo_jax.probes import Probes, probe_rhythm
from spo_jax.sharding import batch_shards, check_batch_size, make_mesh, place_batch, sharded_shapes
from spo_jax.solvers import make_inner_only, make_solver
from spo_jax.stages import Stage, StageResult, run_stage
from spo_jax.step import init_state, shard_state
from spo_jax.types import Params, TrainState
from spo_jax.validation import loss_function, solver_uses, unused_sections


class RunExists(FileExistsError):
    """The run folder holds a run already, and nobody said to go on with it."""


class Trainer:
    """The stages of one configuration, with what they share: mesh, rows, policy."""

    def __init__(self, config: Config, *, resume: bool = False, only: str | None = None):
        self.config, self.resume = config, resume
        self.stages = config.stages if only is None else (only,)
        self.mesh = make_mesh(**dataclasses.asdict(config.mesh))
        self.root = Path(config.output_dir)
        self.place = partial(place_batch, mesh=self.mesh)
        self._rows: dict[str, Rows] = {}
        self._exam: Exam | None = None

    def stage_folder(self, stage: str) -> Path:
        """A run of one stage is its folder; several stages have a folder each inside."""
        return self.root if len(self.config.stages) == 1 else self.root / stage

    def run(self) -> dict[str, StageResult]:
        """All stages in order; the preference stages start from what SFT ended with."""
        self._check_sizes()
        for stage in self.stages:
            folder = self.stage_folder(stage)
            if is_run(folder) and not self.resume:
                raise RunExists(
                    f"{folder} holds a run already: go on with --resume, or choose another folder "
                    "with --output-dir"
                )
        if self.resume and not any(is_run(self.stage_folder(s)) for s in self.stages):
            say(f"{self.root} holds no saved step yet: starting from the beginning")
        self.root.mkdir(parents=True, exist_ok=True)
        start = load_policy(
            self.config.model, self.mesh, seed=self.config.seed, work=self.root / MODEL_FOLDER
        )
        self._exam = make_exam(self.config, start.tokenizer)
        results: dict[str, StageResult] = {}
        for stage in self.stages:
            results[stage] = self._run_stage(stage, start)
            if stage == "sft":
                start = results[stage].policy
        return results

    def _start_is_needed(self, stage: str) -> bool:
        """Whether the policy that ``stage`` starts from is looked at again afterwards.

        Elsewhere its buffers become the state's: a large model has no room for a copy.
        """
        later = self.stages[self.stages.index(stage) + 1 :]
        return stage != "sft" and bool(later)

    def _check_sizes(self) -> None:
        for stage in self.stages:
            key = "sft" if stage == "sft" else "train"
            loop = getattr(self.config, key)
            for name in ("batch_size", "inner_batch_size"):
                size = getattr(loop, name, None)
                if size is not None:
                    check_batch_size(f"{key}.{name}", size, loop.gradient_accumulation, self.mesh)

    def _run_stage(self, stage: str, start: Policy) -> StageResult:
        folder = self.stage_folder(stage)
        folder.mkdir(parents=True, exist_ok=True)
        self._write_description(folder, start, stage)
        if stage == "sft":
            return self._sft(folder, start)
        return self._preference(stage, folder, start)

    def _write_description(self, folder: Path, start: Policy, stage: str) -> None:
        if jax.process_index():
            return
        model = folder / MODEL_FOLDER
        if model != start.folder:
            model.mkdir(exist_ok=True)
            for file in start.folder.iterdir():
                (model / file.name).write_bytes(file.read_bytes())
        header = f"spo-jax {__version__}, jax {jax.__version__}, stage {stage}"
        without = unused_sections(self.config)
        path = folder / "config.yaml"
        if self.resume and path.exists():
            changed = changed_keys(self.config, read_tree(path))
            if changed:
                say(f"{stage}: resumed with other settings: {'; '.join(changed)}")
        save_config(self.config, path, without=without, header=header)

    def rows(self, section: str, policy: Policy) -> Rows:
        """Tokenized rows of ``data`` or ``sft_data``, read once."""
        if section not in self._rows:
            data = getattr(self.config, section)
            if data.train == BUILTIN_TASK:
                data = builtin_data(self.config, section, policy, self.root, resume=self.resume)
            kind = "preference" if section == "data" else "sft"
            self._rows[section] = prepare_rows(
                data, kind, policy.tokenizer, seed=self.config.seed, name=section
            )
        return self._rows[section]

    def _steps(self, loop: LoopConfig, rows: Rows) -> int:
        # Rows that fill no batch are left out of an epoch.
        return loop.steps or max(1, round(loop.epochs * (len(rows.train) // loop.batch_size)))

    def _iterator(self, rows: Rows, batch_size: int, logprobs=None):
        return make_train_iterator(
            rows.train,
            batch_size=batch_size,
            buckets=rows.buckets,
            seed=self.config.seed,
            num_epochs=None,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            reference_logprobs=logprobs,
        )

    def _eval_batches(self, rows: Rows, loop: LoopConfig, logprobs=None):
        size = round_up(loop.eval_batch_size or loop.batch_size, batch_shards(self.mesh))
        return eval_batches(
            rows.heldout,
            batch_size=size,
            buckets=rows.buckets,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            reference_logprobs=logprobs,
        )

    def _objective(self, policy: Policy, loop: LoopConfig, **options) -> Objective:
        chunk = self.config.model.logprob_chunk * batch_shards(self.mesh)
        logprobs = make_logprobs_fn(policy.model, chunk_tokens=chunk)
        return make_objective(logprobs, micro_batches=loop.gradient_accumulation, **options)

    def _sft(self, folder: Path, start: Policy) -> StageResult:
        loop = self.config.sft
        rows = self.rows("sft_data", start)
        steps = self._steps(loop, rows)
        optimizer, schedule = make_chain(self.config.sft_optimizer, steps)
        objective = self._objective(start, loop, loss=None, inner_data="sft", reference="none")
        solver = make_inner_only(inner=optimizer)
        stage = self._stage("sft", folder, start, loop, steps, schedule, objective, solver)
        run = None
        if rows.heldout is not None:
            run = make_evaluate(objective, self._eval_batches(rows, loop), self.place)
        evaluate = self._evaluate(stage, run)
        return self._train(stage, Batches(sft=self._iterator(rows, loop.batch_size)), evaluate)

    def _evaluate(
        self, stage: Stage, heldout: Callable[..., dict[str, float]] | None
    ) -> Callable[..., dict[str, float]] | None:
        """What is looked at on the way and at the end: held-out rows, and graded answers."""
        every = None if stage.name == "sft" else self.config.answers.every
        if heldout is None and self._exam is None:
            return None

        def evaluate(state: TrainState, *, finished: bool = False) -> dict[str, float]:
            params, found = state.solver.params, {}
            if heldout is not None:
                found |= heldout(params, state.objective, stage.reference_params)
            step = int(state.step)
            due = finished or step == stage.steps or (every is not None and step % every == 0)
            if self._exam is not None and due:
                policy = stage.start._replace(params=params)
                found |= take_exam(self._exam, policy, stage.folder)
            return found

        return evaluate

    def _stage(self, name: str, folder: Path, start: Policy, *assembled: Any) -> Stage:
        key = jax.random.key_data(jax.random.key(self.config.seed))
        return Stage(name, folder, start, self.mesh, key, *assembled)

    def _train(self, stage: Stage, batches: Batches, evaluate: Any) -> StageResult:
        donate = not self._start_is_needed(stage.name) and stage.reference_params is None
        return run_stage(stage, batches, evaluate, resume=self.resume, donate=donate)

    def _preference(self, name: str, folder: Path, start: Policy) -> StageResult:
        return self._train(*self._assemble_pairs(name, folder, start))

    def judge_start(self) -> dict[str, float]:
        """Held-out metrics and graded answers of the policy that the pair stages start from."""
        self.root.mkdir(parents=True, exist_ok=True)
        start = load_policy(
            self.config.model, self.mesh, seed=self.config.seed, work=self.root / MODEL_FOLDER
        )
        self._exam = make_exam(self.config, start.tokenizer)
        stage, _, evaluate = self._assemble_pairs("baseline", self.root, start)
        init = partial(init_state, stage.solver, stage.objective)
        state, _ = shard_state(init, self.mesh, start.params, stage.key, donate=False)
        return {} if evaluate is None else evaluate(state, finished=True)

    def _assemble_pairs(self, name: str, folder: Path, start: Policy):
        """The stage of pairs with its batches, and what is looked at on the way."""
        loop, online = self.config.train, self.config.reference.mode == "online"
        reference = self._reference(folder, start)
        stage = self.pair_stage(name, folder, start, reference if online else None)
        rows, sft_rows = self.rows("data", start), self._inner_rows(name, start)
        found = self._frozen_logprobs(reference, start, rows, sft_rows, loop)
        iterator = self._iterator(rows, loop.batch_size, found.get("train"))
        inner = None
        if sft_rows is not None:
            inner = self._iterator(sft_rows, self._inner_size(), found.get("sft"))
        run = None
        if rows.heldout is not None:
            # Held-out pairs are judged with the chosen as inner data, whatever training uses.
            judged = self._pair_objective(start, "chosen")
            held = self._eval_batches(rows, loop, found.get("heldout"))
            run = make_evaluate(judged, held, self.place)
        return stage, Batches(iterator, inner), self._evaluate(stage, run)

    def pair_stage(
        self, name: str, folder: Path, start: Policy, reference_params: Params | None
    ) -> Stage:
        """A stage of pairs, ``preference`` or ``baseline``, whole but for its batches.

        Reads no data where ``train.steps`` is set and nothing is probed, and of ``start.params``
        the shapes alone.
        """
        config, loop = self.config, self.config.train
        named = self._solver_of(name)
        steps = loop.steps or self._steps(loop, self.rows("data", start))
        outer, schedule = make_chain(config.outer, steps)
        inner, inner_schedule = make_chain(config.inner, steps * inner_updates(named))
        solver = make_solver(named.name, outer=outer, inner=inner, **named.options)
        if not solver_uses(named.name, "outer"):
            schedule = inner_schedule
        own = self._has_inner_rows(name)
        objective = self._pair_objective(start, "sft" if own else "chosen")
        stage = self._stage(name, folder, start, loop, steps, schedule, objective, solver)
        stage = stage._replace(
            reference_params=reference_params,
            tolerance=float(named.options.get("tolerance", 0.0)),
        )
        if config.dynamics.every is None:
            return stage
        return stage._replace(
            probes=self._probes(stage, self.rows("data", start), self._inner_rows(name, start)),
            probe_every=probe_rhythm(config.dynamics.every, steps),
        )

    def _solver_of(self, name: str) -> Named:
        return Named("preference_only") if name == "baseline" else self.config.solver

    def _inner_rows(self, name: str, start: Policy) -> Rows | None:
        """SFT rows of the inner level, where they are not the chosen completions."""
        return self.rows("sft_data", start) if self._has_inner_rows(name) else None

    def _has_inner_rows(self, name: str) -> bool:
        own = self.config.objective.inner_data == "sft"
        return own and self._solver_of(name).name != "preference_only"

    def _inner_size(self) -> int:
        return self.config.train.inner_batch_size or self.config.train.batch_size

    @cached_property
    def _loss(self) -> PreferenceLoss:
        name, options = self.config.loss.name, self.config.loss.options
        return make_preference_loss(loss_function(name) if ":" in name else name, **options)

    def _pair_objective(self, policy: Policy, inner_data: str) -> Objective:
        config = self.config
        return self._objective(
            policy,
            config.train,
            loss=self._loss,
            inner_data=inner_data,
            inner_value=config.objective.inner_value,
            regularizer=config.objective.regularizer,
            regularizer_weight=config.objective.regularizer_weight,
            reference=config.reference.mode,
        )

    def _probes(self, stage: Stage, rows: Rows, sft_rows: Rows | None) -> Probes:
        config = self.config
        probe_set = make_probe_set(
            rows,
            sft_rows,
            pairs=config.dynamics.pairs,
            batch_size=config.train.batch_size,
            sft_batch_size=self._inner_size(),
            seed=config.seed,
        )
        shapes = sharded_shapes(stage.start.model.abstract_params(), self.mesh)

        def reference():
            # Read anew each time: between probings there is no second model in memory.
            online = stage.reference_params
            return load_reference(stage.folder, shapes) if online is None else online

        return Probes(
            config.dynamics,
            stage.start,
            self._loss,
            probe_set,
            seed=config.seed,
            mesh=self.mesh,
            chunk_tokens=config.model.logprob_chunk,
            frozen_in_batch=config.reference.mode == "precomputed",
            reference=None if config.reference.mode == "none" else reference,
        )

    def _reference(self, folder: Path, start: Policy) -> Params | None:
        """The reference parameters: those saved with the run, else reference.path, else start."""
        config = self.config
        if config.reference.mode == "none":
            return None
        if (folder / "reference").exists():
            if self.resume:
                return load_reference(folder, start.params)
            # Left by an attempt that never saved a step, maybe with another model.
            shutil.rmtree(folder / "reference")
        params = start.params
        if config.reference.path is not None:
            section = dataclasses.replace(
                config.model, path=config.reference.path, init=None, tokenizer=None
            )
            work = folder / "reference_model"
            other = load_policy(section, self.mesh, seed=config.seed, work=work)
            if other.model != start.model:
                raise ValueError(
                    f"reference.path={config.reference.path} has another architecture than the "
                    "policy: a reference of the same shape is needed"
                )
            params = other.params
        save_reference(folder, params)
        return params

    def _frozen_logprobs(self, reference, start: Policy, rows: Rows, sft_rows, loop: LoopConfig):
        if self.config.reference.mode != "precomputed":
            return {}
        wanted = {"train": rows.train, "heldout": rows.heldout}
        buckets = {"train": rows.buckets, "heldout": rows.buckets}
        if sft_rows is not None:
            wanted["sft"], buckets["sft"] = sft_rows.train, sft_rows.buckets
        size = loop.eval_batch_size or loop.batch_size
        logprobs_of = make_reference_logprobs(
            self.config, start.model, reference, self.mesh, batch_size=size
        )
        return {
            name: logprobs_of(some, buckets[name], name)
            for name, some in wanted.items()
            if some is not None
        }

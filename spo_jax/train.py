"""Assemble a configuration into stages, compile their step, run them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from spo_jax import __version__
from spo_jax.checkpoints import (
    Checkpoints,
    load_reference,
    save_reference,
)
from spo_jax.config import BUILTIN_TASK, Config, LoopConfig, Named
from spo_jax.config_io import changed_keys, read_tree, save_config
from spo_jax.data import eval_batches, make_train_iterator
from spo_jax.evaluate import complete, make_evaluate
from spo_jax.loop import Batches, run_loop
from spo_jax.losses import make_preference_loss
from spo_jax.objectives import Objective, make_logprobs_fn, make_objective
from spo_jax.prepare import (
    MODEL_FOLDER,
    Policy,
    Rows,
    is_run,
    load_policy,
    make_chain,
    make_reference_logprobs,
    make_solver,
    prepare_rows,
    round_up,
    say,
    task_problems,
)
from spo_jax.sharding import batch_shards, check_batch_size, make_mesh, place_batch, sharded_shapes
from spo_jax.solvers import SOLVERS
from spo_jax.step import init_state, make_train_step, shard_state
from spo_jax.tasks import arithmetic
from spo_jax.trackers import DisplacementAlarm, MetricsWriter, Progress
from spo_jax.types import Params
from spo_jax.validation import loss_function, solver_uses, unused_sections


class RunExists(FileExistsError):
    """The run folder holds a run already, and nobody said to go on with it."""


class StageResult(NamedTuple):
    """Where a stage ended: the policy and its held-out metrics.

    A later stage that starts from the policy may have taken over its buffers.
    """

    policy: Policy
    metrics: dict[str, float]
    folder: Path


class Trainer:
    """The stages of one configuration, with what they share: mesh, rows, policy."""

    def __init__(self, config: Config, *, resume: bool = False, only: str | None = None):
        self.config, self.resume = config, resume
        self.stages = config.stages if only is None else (only,)
        self.mesh = make_mesh(**dataclasses.asdict(config.mesh))
        self.root = Path(config.output_dir)
        self.place = partial(place_batch, mesh=self.mesh)
        self._rows: dict[str, Rows] = {}

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
        graded = BUILTIN_TASK in (self.config.data.train, self.config.sft_data.train)
        later = self.stages[self.stages.index(stage) + 1 :]
        return graded or (stage != "sft" and bool(later))

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
                data = self._builtin_data(section, policy)
            kind = "preference" if section == "data" else "sft"
            self._rows[section] = prepare_rows(
                data, kind, policy.tokenizer, seed=self.config.seed, name=section
            )
        return self._rows[section]

    def _builtin_data(self, section: str, policy: Policy):
        """Write the task's rows into the run, as files like any other data."""
        task, seed = self.config.task, self.config.seed
        sft, preference, test = task_problems(task, seed)
        data = getattr(self.config, section)
        if section == "sft_data":
            path, heldout = self.root / "sft.jsonl", self.root / "test.jsonl"
            for file, problems in ((path, sft), (heldout, test)):
                arithmetic.write_rows(file, [p._asdict() for p in problems])
            return dataclasses.replace(data, train=str(path), eval=str(heldout))
        path = self.root / "pairs.jsonl"
        if not (self.resume and path.exists()):
            say(f"sampling {task.samples} solutions of each of {len(preference)} problems")
            samples = [
                complete(
                    policy.model,
                    policy.params,
                    policy.tokenizer,
                    [p.prompt for p in preference],
                    max_new_tokens=len(preference[0].completion) + 8,
                    temperature=task.temperature,
                    seed=seed + i,
                )
                for i in range(task.samples)
            ]
            pairs = arithmetic.make_pairs(preference, list(zip(*samples, strict=True)))
            arithmetic.write_rows(path, pairs)
        fraction = data.eval_fraction or 0.1
        return dataclasses.replace(data, train=str(path), eval_fraction=fraction)

    def _steps(self, loop: LoopConfig, steps_per_epoch: int) -> int:
        return loop.steps or max(1, round(loop.epochs * steps_per_epoch))

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
        iterator = self._iterator(rows, loop.batch_size)
        steps = self._steps(loop, iterator.steps_per_epoch)
        optimizer, schedule = make_chain(self.config.inner, steps)
        objective = self._objective(start, loop, loss=None, inner_data="sft", reference="none")
        evaluate = None
        if rows.heldout is not None:
            run = make_evaluate(objective, self._eval_batches(rows, loop), self.place)
            evaluate = lambda state: run(state.solver.params, state.objective)  # noqa: E731
        solver = SOLVERS["inner_only"](inner=optimizer)
        return self._loop(
            "sft", folder, start, loop, steps, schedule, objective, solver,
            Batches(sft=iterator), evaluate,
        )  # fmt: skip

    def _preference(self, stage: str, folder: Path, start: Policy) -> StageResult:
        config, loop = self.config, self.config.train
        named = Named("preference_only") if stage == "baseline" else config.solver
        with_sft = config.objective.inner_data == "sft" and named.name != "preference_only"
        rows = self.rows("data", start)
        sft_rows = self.rows("sft_data", start) if with_sft else None
        reference = self._reference(folder, start)
        found = self._frozen_logprobs(reference, start, rows, sft_rows, loop)

        iterator = self._iterator(rows, loop.batch_size, found.get("train"))
        inner_size = loop.inner_batch_size or loop.batch_size
        sft_iterator = self._iterator(sft_rows, inner_size, found.get("sft")) if with_sft else None
        steps = self._steps(loop, iterator.steps_per_epoch)
        outer, schedule = make_chain(config.outer, steps)
        inner, inner_schedule = make_chain(config.inner, steps)
        solver = make_solver(named, outer=outer, inner=inner)
        if not solver_uses(named.name, "outer"):
            schedule = inner_schedule
        name = config.loss.name
        bound = make_preference_loss(
            loss_function(name) if ":" in name else name, **config.loss.options
        )
        options = {
            "loss": bound,
            "inner_value": config.objective.inner_value,
            "regularizer": config.objective.regularizer,
            "regularizer_weight": config.objective.regularizer_weight,
            "reference": config.reference.mode,
        }
        inner_data = "sft" if with_sft else "chosen"
        objective = self._objective(start, loop, inner_data=inner_data, **options)
        reference_params = reference if config.reference.mode == "online" else None
        evaluate = None
        if rows.heldout is not None:
            # Held-out pairs are judged with the chosen as inner data, whatever training uses.
            judged = self._objective(start, loop, inner_data="chosen", **options)
            batches = self._eval_batches(rows, loop, found.get("heldout"))
            run = make_evaluate(judged, batches, self.place)
            evaluate = lambda state: run(  # noqa: E731
                solver.policy(state.solver), state.objective, reference_params
            )
        return self._loop(
            stage, folder, start, loop, steps, schedule, objective, solver,
            Batches(iterator, sft_iterator), evaluate, reference_params,
            tolerance=float(named.options.get("tolerance", 0.0)),
        )  # fmt: skip

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

    def _loop(
        self, stage, folder, start, loop, steps, schedule, objective, solver, batches, evaluate,
        reference_params=None, *, tolerance=0.0,
    ) -> StageResult:  # fmt: skip
        """Compile the step, resume where there is something to resume, run to the end."""
        key = jax.random.key_data(jax.random.key(self.config.seed))
        init = partial(init_state, solver, objective)
        checkpoints = Checkpoints(folder, keep=loop.keep_checkpoints)
        if self.resume and checkpoints.latest_step() is not None:
            like = sharded_shapes(jax.eval_shape(init, start.params, key), self.mesh)
            shardings = jax.tree.map(lambda x: x.sharding, like)
            state, position, _ = checkpoints.restore(like)
            batches.set_state(position)
            say(f"{stage}: going on from step {int(state.step)} of {steps}")
        else:
            donate = not self._start_is_needed(stage) and reference_params is None
            state, shardings = shard_state(init, self.mesh, start.params, key, donate=donate)
        step = make_train_step(objective, solver, schedule=schedule, tolerance=tolerance)
        step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        step_fn = lambda state, batch: step(state, batch, reference_params)  # noqa: E731

        active = jax.process_index() == 0
        done = int(state.step)
        metrics: dict[str, float] = {}

        def look(state):
            metrics.update(evaluate(state))
            return metrics

        if done < steps:
            writer = MetricsWriter(folder, first_step=done + 1, active=active)
            state = run_loop(
                step_fn, state, batches, name=stage, steps=steps, loop=loop, place=self.place,
                evaluate=None if evaluate is None else look, writer=writer,
                checkpoints=checkpoints, progress=Progress(stage, steps, done, active),
                alarm=None if stage == "sft" else DisplacementAlarm(loop.alarm_log_ratio),
            )  # fmt: skip
            writer.close()
        elif evaluate is not None:
            look(state)
        checkpoints.close()
        return StageResult(
            start._replace(params=solver.policy(state.solver)), dict(metrics), folder
        )


def task_table(trainer: Trainer, results: dict[str, StageResult]) -> list[dict[str, Any]]:
    """Exact answers of each stage on the built-in task's test problems, with held-out metrics."""
    config = trainer.config
    _, _, test = task_problems(config.task, config.seed)
    table = []
    for stage, result in results.items():
        texts = complete(
            result.policy.model,
            result.policy.params,
            result.policy.tokenizer,
            [p.prompt for p in test],
            max_new_tokens=len(test[0].completion) + 8,
        )
        right = [arithmetic.is_correct(p.prompt, t) for p, t in zip(test, texts, strict=True)]
        formed = [arithmetic.is_well_formed(t) for t in texts]
        keys = ("log_ratio/chosen", "log_ratio/rejected", "rewards/margins", "rewards/accuracies")
        table.append(
            {
                "stage": stage,
                "accuracy": sum(right) / len(right),
                "unanswered": 1 - sum(formed) / len(formed),
                "problems": len(right),
                **{k: result.metrics[k] for k in keys if k in result.metrics},
            }
        )
    (trainer.root / "results.json").write_text(json.dumps(table, indent=2) + "\n")
    return table

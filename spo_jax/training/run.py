"""Run a configuration: its stages in order, each from where the one before ended."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from spo_jax import __version__
from spo_jax.checkpoints import REFERENCE, load_reference, save_reference
from spo_jax.checkpoints.atomic import replace_bytes, replace_text
from spo_jax.checkpoints.run_folder import RunLock, check_shared
from spo_jax.config.changes import check_changes
from spo_jax.config.parsing import config_to_yaml, read_tree
from spo_jax.config.schema import Config, LoopConfig
from spo_jax.config.validation import unused_sections
from spo_jax.evaluation.answers import Exam, make_exam, take_exam
from spo_jax.evaluation.heldout import make_evaluate
from spo_jax.parallel.mesh import unsharded
from spo_jax.parallel.processes import by_first, say
from spo_jax.policies.loading import (
    MODEL_FOLDER,
    Policy,
    is_run,
    load_policy,
)
from spo_jax.policies.reference_logprobs import make_reference_logprobs
from spo_jax.policies.rows import Rows
from spo_jax.training.assembly import Assembly
from spo_jax.training.batches import Batches
from spo_jax.training.stages import Stage, StageResult, run_stage
from spo_jax.training.update import init_state, shard_state
from spo_jax.types import Params, TrainState


class RunExists(FileExistsError):
    """The run folder holds a run already, and nobody said to go on with it."""


class Trainer(Assembly):
    """The stages of one configuration, run with what they share: mesh, rows, policy."""

    def __init__(
        self,
        config: Config,
        *,
        mesh: Mesh | None = None,
        resume: bool = False,
        only: str | None = None,
        allow_changes: bool = False,
    ):
        super().__init__(config, mesh=mesh, resume=resume)
        self.allow_changes = allow_changes
        self.stages = config.stages if only is None else (only,)
        self._exam: Exam | None = None

    def stage_folder(self, stage: str) -> Path:
        """A run of one stage is its folder; several stages have a folder each inside."""
        return self.root if len(self.config.stages) == 1 else self.root / stage

    def run(self) -> dict[str, StageResult]:
        """All stages in order; the preference stages start from what SFT ended with."""
        for stage in self.stages:
            self.check_sizes(stage)
        with RunLock(self.root):
            check_shared(self.root)
            begun = by_first(self._check_folders)
            start = self._load_start(unchanged=begun and not self.allow_changes)
            results: dict[str, StageResult] = {}
            for stage in self.stages:
                results[stage] = self._run_stage(stage, start)
                if stage == "sft":
                    start = results[stage].policy
        return results

    def _load_start(self, *, unchanged: bool = False) -> Policy:
        start = load_policy(
            self.config.model,
            self.mesh,
            seed=self.config.seed,
            work=self.root / MODEL_FOLDER,
            unchanged=unchanged,
        )
        for leaf in unsharded(start.params, self.mesh):
            size = f"{leaf.bytes_per_device / 2**20:.0f} MiB a device"
            say(f"WARNING {leaf.path} {list(leaf.shape)} takes {size}: {leaf.note}")
        self._exam = make_exam(self.config, start.tokenizer)
        return start

    def _check_folders(self) -> bool:
        """Whether there is a run to go on with, that these settings can go on with."""
        folders = [self.stage_folder(stage) for stage in self.stages]
        begun = [folder for folder in folders if is_run(folder)]
        if begun and not self.resume:
            raise RunExists(
                f"{begun[0]} holds a run already: go on with --resume, or choose another folder "
                "with --output-dir"
            )
        for folder in begun:
            saved = read_tree(folder / "config.yaml")
            changed = check_changes(self.config, saved, run=str(folder), allow=self.allow_changes)
            if changed:
                say(f"{folder}: resumed with other settings: {changed}")
        if self.resume and not begun:
            say(f"{self.root} holds no saved step yet: starting from the beginning")
        return bool(begun)

    def _start_is_needed(self, stage: str) -> bool:
        """Whether the policy that ``stage`` starts from is looked at again afterwards.

        Elsewhere its buffers become the state's: a large model has no room for a copy.
        """
        later = self.stages[self.stages.index(stage) + 1 :]
        return stage != "sft" and bool(later)

    def _run_stage(self, stage: str, start: Policy) -> StageResult:
        folder = self.stage_folder(stage)
        by_first(lambda: folder.mkdir(parents=True, exist_ok=True))
        if stage == "sft":
            return self._sft(folder, start)
        return self._preference(stage, folder, start)

    def _describe(self, folder: Path, start: Policy, stage: str) -> None:
        """Write what a run is: its settings, and config.json and tokenizer of its model."""
        model = folder / MODEL_FOLDER
        model.mkdir(parents=True, exist_ok=True)
        if model != start.folder:
            for file in start.folder.iterdir():
                replace_bytes(model / file.name, file.read_bytes())
        header = f"spo-jax {__version__}, jax {jax.__version__}, stage {stage}"
        without = unused_sections(self.config)
        text = config_to_yaml(self.config, without=without, header=header)
        replace_text(folder / "config.yaml", text)

    def _sft(self, folder: Path, start: Policy) -> StageResult:
        stage, rows = self.sft_stage(folder, start), self.rows("sft_data", start)
        run = None
        if rows.heldout is not None:
            held = self._eval_batches(rows, stage.loop)
            run = make_evaluate(stage.objective, held, self.place)
        iterator = self._iterator(rows, stage.loop.batch_size)
        batches = Batches(sft=iterator, sources={"sft": rows.train.source_rows})
        return self._train(stage, batches, self._evaluate(stage, run))

    def _evaluate(
        self, stage: Stage, heldout: Callable[..., dict[str, float]] | None
    ) -> Callable[..., dict[str, float]] | None:
        """What is looked at on the way and at the end: held-out rows, and graded answers."""
        every = None if stage.name == "sft" else self.config.answers.every
        if heldout is None and self._exam is None:
            return None

        def evaluate(
            state: TrainState, *, finished: bool = False, check: Callable[[], None] = lambda: None
        ) -> dict[str, float]:
            params, found = state.solver.params, {}
            if heldout is not None:
                found |= heldout(params, state.objective, stage.reference_params, check)
            step = int(state.step)
            due = finished or step == stage.steps or (every is not None and step % every == 0)
            if self._exam is not None and due:
                policy = stage.start._replace(params=params)
                found |= take_exam(self._exam, policy, stage.folder, check)
            return found

        return evaluate

    def _train(self, stage: Stage, batches: Batches, evaluate: Any) -> StageResult:
        donate = not self._start_is_needed(stage.name) and stage.reference_params is None
        return run_stage(
            stage,
            batches,
            evaluate,
            resume=self.resume,
            donate=donate,
            allow_changes=self.allow_changes,
            describe=lambda: by_first(
                lambda: self._describe(stage.folder, stage.start, stage.name)
            ),
        )

    def _preference(self, name: str, folder: Path, start: Policy) -> StageResult:
        return self._train(*self._assemble_pairs(name, folder, start))

    def judge_start(self) -> dict[str, float]:
        """Held-out metrics and graded answers of the policy that the pair stages start from."""
        start = self._load_start()
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
        sources = {"preference": rows.train.source_rows}
        if sft_rows is not None:
            sources["sft"] = sft_rows.train.source_rows
        return stage, Batches(iterator, inner, sources), self._evaluate(stage, run)

    def _reference(self, folder: Path, start: Policy) -> Params | None:
        """The reference parameters: those saved with the run, else reference.path, else start."""
        config = self.config
        if config.reference.mode == "none":
            return None
        if by_first(lambda: self._keeps_reference(folder)):
            return load_reference(folder, start.params)
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

    def _keeps_reference(self, folder: Path) -> bool:
        """Whether the run that is resumed has its reference; one of another attempt is removed."""
        saved = folder / REFERENCE
        if saved.exists() and not (self.resume and is_run(folder)):
            # Left by an attempt that never saved a step, maybe with another model.
            shutil.rmtree(saved)
        return saved.exists()

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

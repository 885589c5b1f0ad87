"""A configuration assembled: its mesh, its rows, and a stage's update whole but for its batches."""

from __future__ import annotations

import dataclasses
import inspect
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from spo_jax.checkpoints import load_reference
from spo_jax.config.schema import BUILTIN_TASK, Config, LoopConfig, Named, OptimizerConfig
from spo_jax.config.validation import loss_function, solver_uses
from spo_jax.data import eval_batches, make_train_iterator
from spo_jax.dynamics.probes import Probes, probe_rhythm
from spo_jax.dynamics.row_choice import make_probe_set
from spo_jax.losses import PreferenceLoss, make_preference_loss
from spo_jax.objective.levels import Objective, make_logprobs_fn, make_objective
from spo_jax.parallel.mesh import (
    batch_shards,
    check_batch_size,
    make_mesh,
    place_batch,
    sharded_shapes,
)
from spo_jax.policies.loading import Policy
from spo_jax.policies.rows import Rows, prepare_rows, round_up
from spo_jax.sampling.builtin import builtin_data
from spo_jax.solvers import SOLVERS, make_inner_only, make_solver
from spo_jax.solvers.optimizers import make_optimizer
from spo_jax.training.stages import Stage
from spo_jax.types import Params


class Assembly:
    """What the stages of one configuration are made of; reads data when asked for rows alone.

    ``mesh`` stands for the one that the section ``mesh`` describes: of devices that are not
    there, say.
    """

    def __init__(self, config: Config, *, mesh: Mesh | None = None, resume: bool = False):
        self.config, self.resume = config, resume
        self.mesh = make_mesh(**dataclasses.asdict(config.mesh)) if mesh is None else mesh
        self.root = Path(config.output_dir)
        self.place = partial(place_batch, mesh=self.mesh)
        self._rows: dict[str, Rows] = {}

    def check_sizes(self, stage: str) -> None:
        """Raise ``ValueError`` where a batch of ``stage`` does not divide over the mesh."""
        key = "sft" if stage == "sft" else "train"
        loop = getattr(self.config, key)
        for name in ("batch_size", "inner_batch_size"):
            size = getattr(loop, name, None)
            if size is not None:
                check_batch_size(f"{key}.{name}", size, loop.gradient_accumulation, self.mesh)

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

    def sft_stage(self, folder: Path, start: Policy) -> Stage:
        """The stage of SFT, whole but for its batches; as ``pair_stage``."""
        loop = self.config.sft
        steps = loop.steps or self._steps(loop, self.rows("sft_data", start))
        optimizer, schedule = make_chain(self.config.sft_optimizer, steps)
        objective = self._objective(start, loop, loss=None, inner_data="sft", reference="none")
        solver = make_inner_only(inner=optimizer)
        return self._stage("sft", folder, start, loop, steps, schedule, objective, solver)

    def _stage(self, name: str, folder: Path, start: Policy, *assembled: Any) -> Stage:
        key = jax.random.key_data(jax.random.key(self.config.seed))
        return Stage(name, folder, start, self.mesh, key, *assembled)

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


def make_chain(config: OptimizerConfig, steps: int):
    """The optax chain and schedule of one section of the configuration."""
    return make_optimizer(
        steps=steps,
        **{k: getattr(config, k) for k in OptimizerConfig.__dataclass_fields__},
    )


def inner_updates(named: Named) -> int:
    """Updates of the inner chain in one update of the solver: the length of its schedule."""
    parameters = inspect.signature(SOLVERS[named.name]).parameters
    if "inner_steps" not in parameters:
        return 1
    return named.options.get("inner_steps", parameters["inner_steps"].default)

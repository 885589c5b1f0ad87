"""The probes of one stage of pairs: a fixed set of rows, what is measured there, its record.

A line of ``dynamics.jsonl`` is ``{"step", "settings", "row_ids", "summary": {name: mean},
"pairs": {name: [one a pair]}, "samples": [texts]}``. All log-probs are in nats and computed in
float32, whatever training computes in: changes of thousandths would drown in 16 bits.

Names: ``law/*``, ``own_step/*`` and ``update/*`` (see ``dynamics``), ``logprobs/*``,
``log_ratio/*`` against the frozen reference where there is one, ``entropy/*`` and ``top_mass/*``;
in ``summary`` also ``repetition`` and ``distinct_n`` of the sampled completions. With gradients
of the head ``law/*`` is the head's block, and nothing is predicted that needs whole gradients:
``own_step/*`` and ``update/*_predicted`` are left out; with none, ``law/*`` too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from spo_jax.config.schema import DynamicsConfig
from spo_jax.data.pipeline import process_slice
from spo_jax.dynamics.law import make_exact_law, make_head_law, make_mass, with_completions
from spo_jax.dynamics.row_choice import ProbeSet
from spo_jax.losses import PreferenceLoss
from spo_jax.objective.levels import completion_logprobs, make_logprobs_fn
from spo_jax.parallel.mesh import BATCH, batch_shards, place_batch, replicated, tree_shardings
from spo_jax.parallel.processes import everywhere
from spo_jax.policies.decoding import generate
from spo_jax.policies.loading import Policy
from spo_jax.policies.text_statistics import distinct_n, repetition
from spo_jax.types import BilevelBatch, CompletionBatch, Params, TrainState

DYNAMICS_FILE = "dynamics.jsonl"
"""Inside the folder of a stage."""

BRANCHES = ("chosen", "rejected", "greedy", "sampled")


class Probes:
    """The probes of one stage, compiled once; ``record`` looks at a state and leaves it as it is.

    The measured update is the stage's own compiled one on a copy of the state, its result
    thrown away: solver, optimizer and schedule included, so at the end of a schedule that
    falls to zero it moves nothing. For that moment there is a second train state in memory.

    Everything but the parameters and the update's batch is replicated over the mesh: single
    pairs cannot be cut over data shards.
    """

    def __init__(
        self,
        settings: DynamicsConfig,
        policy: Policy,
        loss: PreferenceLoss,
        probe_set: ProbeSet,
        *,
        seed: int,
        mesh: Mesh,
        chunk_tokens: int,
        frozen_in_batch: bool,
        reference: Callable[[], Params] | None,
    ):
        """``reference`` gives the frozen parameters, or is None where a run has none.

        ``frozen_in_batch``: the update reads reference log-probs from its batch.
        """
        self.settings, self._policy, self._mesh, self._seed = settings, policy, mesh, seed
        self._reference, self._frozen_in_batch = reference, frozen_in_batch
        self._batch = probe_set.batch
        self._pairs = jax.device_put(probe_set.pairs, replicated(mesh))
        self._chunk_tokens = chunk_tokens
        tokens = policy.model.config.vocab_size
        if settings.top_k > tokens:
            raise ValueError(
                f"dynamics.top_k={settings.top_k}, but the vocabulary has {tokens} tokens: set "
                "it lower"
            )
        # The kernel is chosen anew: cuDNN's takes 16 bits only.
        execution = dataclasses.replace(
            policy.model.execution, compute_dtype="float32", attention="auto"
        )
        precise = dataclasses.replace(policy.model, execution=execution)
        static = {"model": precise, "chunk_tokens": chunk_tokens, "mesh": mesh}
        self._mass = partial(_mass, top_k=settings.top_k, **static)
        self._law = partial(_LAWS[settings.gradients], loss=loss, **static)

    def record(
        self, state: TrainState, step_fn: Callable[[TrainState, Any], tuple[TrainState, Any]]
    ) -> dict[str, Any]:
        """Probe ``state``: a line of ``dynamics.jsonl`` but for its step.

        ``step_fn(state, batch)`` is the stage's update; it may donate its state.
        """
        params = state.solver.params
        updated = step_fn(jax.tree.map(jnp.copy, state), self._update_batch)[0].solver.params
        batch = with_completions(self._pairs, self._complete(params), eos_id=self._eos)
        # On GPUs and TPUs, products of float32 are by default not quite float32.
        with jax.default_matmul_precision("highest"):
            values = self._values(params, updated, batch, state.objective.statistics)
        values = {name: np.asarray(x) for name, x in jax.device_get(values).items()}
        rows = self._trimmed(jax.tree.map(everywhere, batch))
        finite = {name: x[np.isfinite(x)] for name, x in values.items()}
        means = {name: float(np.mean(x)) for name, x in finite.items() if x.size}
        means |= _text_summary([row["sampled"] for row in rows])
        shown = rows[: self.settings.samples]
        return {
            **self.description,
            "summary": {name: x for name, x in means.items() if math.isfinite(x)},
            "pairs": {name: [_finite(v) for v in x.tolist()] for name, x in values.items()},
            "samples": [{k: self._text(ids) for k, ids in row.items()} for row in shown],
        }

    @property
    def description(self) -> dict[str, Any]:
        """What one line must have in common with another to be compared with it."""
        shown = ("gradients", "own_step_rate", "temperature", "max_new_tokens", "top_k")
        settings = {name: getattr(self.settings, name) for name in shown}
        return {"settings": settings, "row_ids": np.asarray(self._pairs.row_ids).tolist()}

    def _values(self, params, updated, batch, statistics) -> dict[str, jax.Array]:
        """Every name of ``pairs``, each ``[B]``."""
        mass, after = self._mass(params, batch), self._mass(updated, batch)["logprobs"]
        sums, frozen = mass["logprobs"], None
        masses = {f"logprobs/{name}": sums[:, i] for i, name in enumerate(BRANCHES)}
        if self._reference is not None:
            frozen = self._mass(self._reference(), batch)["logprobs"]
            masses |= {f"log_ratio/{b}": (sums - frozen)[:, i] for i, b in enumerate(BRANCHES)}
        for kind in ("entropy", "top_mass"):
            for name in ("chosen", "sampled"):
                masses[f"{kind}/{name}"] = mass[kind][:, BRANCHES.index(name)]
        pairs = self._pairs._replace(reference_logprobs=None if frozen is None else frozen[:, :2])
        values = self._law(params, pairs, statistics, updated, self.settings.own_step_rate)
        for i, name in enumerate(("chosen", "rejected")):
            values[f"update/{name}_measured"] = after[:, i] - sums[:, i]
        return masses | values

    @cached_property
    def _update_batch(self) -> BilevelBatch:
        """The batch of the measured update, placed as training places one."""

        def place(rows):
            part = process_slice(len(rows.row_ids), jax.process_index(), jax.process_count())
            return place_batch(jax.tree.map(lambda x: x[part], rows), self._mesh)

        batch = BilevelBatch(*(rows if rows is None else place(rows) for rows in self._batch))
        if not self._frozen_in_batch:
            return batch
        chunk = self._chunk_tokens * batch_shards(self._mesh)
        logprobs = make_logprobs_fn(self._policy.model, chunk_tokens=chunk)
        sums = jax.jit(
            lambda params, rows: completion_logprobs(logprobs, params, rows),
            out_shardings=NamedSharding(self._mesh, BATCH),
        )
        frozen = self._reference()
        return BilevelBatch(
            *(
                rows if rows is None else rows._replace(reference_logprobs=sums(frozen, rows))
                for rows in batch
            )
        )

    @property
    def _eos(self) -> int:
        return self._policy.tokenizer.eos_token_id

    def _complete(self, params: Params) -> jax.Array:
        """Greedy and sampled completions ``[B, 2, M]``; a row draws alike at every probing."""
        settings, pairs = self.settings, self._pairs
        key = jax.random.PRNGKey(self._seed)
        found = [
            generate(
                self._policy.model,
                params,
                pairs.prompt_tokens,
                pairs.prompt_mask,
                max_new_tokens=settings.max_new_tokens or pairs.completion_tokens.shape[-1],
                temperature=temperature,
                eos_ids=(self._eos,),
                keys=jax.vmap(lambda row: jax.random.fold_in(key, row))(pairs.row_ids),
            )
            for temperature in (0.0, settings.temperature)
        ]
        return jnp.stack(found, axis=1)

    def _trimmed(self, batch: CompletionBatch) -> list[dict[str, list[int]]]:
        """Ids of each row's prompt and completions, without padding and closing EOS."""

        def ids(tokens, mask):
            found = tokens[mask].tolist()
            return found[:-1] if found[-1:] == [self._eos] else found

        return [
            {"prompt": prompt[shown].tolist()}
            | {name: ids(completions[i], scored[i]) for i, name in enumerate(BRANCHES)}
            for prompt, shown, completions, scored in zip(
                batch.prompt_tokens,
                batch.prompt_mask,
                batch.completion_tokens,
                batch.completion_mask,
                strict=True,
            )
        ]

    def _text(self, ids: list[int]) -> str:
        return self._policy.tokenizer.decode(ids, skip_special_tokens=True)


# Jitted here and not in a stage's probes: preference and baseline share what is compiled.
_LAW_STATIC = ("model", "loss", "chunk_tokens", "mesh")


@partial(jax.jit, static_argnames=("model", "top_k", "chunk_tokens", "mesh"))
def _mass(params, batch, *, model, top_k, chunk_tokens, mesh):
    mass = make_mass(model, top_k=top_k, chunk_tokens=chunk_tokens)
    return jax.lax.with_sharding_constraint(mass(params, batch), replicated(mesh))


@partial(jax.jit, static_argnames=_LAW_STATIC)
def _exact_law(params, pairs, statistics, updated, rate, *, model, loss, chunk_tokens, mesh):
    law = make_exact_law(
        make_logprobs_fn(model, chunk_tokens=chunk_tokens),
        loss,
        constrain=lambda gradient: jax.lax.with_sharding_constraint(
            gradient, tree_shardings(gradient, mesh)
        ),
    )
    found = law(params, pairs, statistics, updated, rate)
    return jax.lax.with_sharding_constraint(found, replicated(mesh))


@partial(jax.jit, static_argnames=_LAW_STATIC)
def _head_law(params, pairs, statistics, updated, rate, *, model, loss, chunk_tokens, mesh):
    law = make_head_law(model, loss, chunk_tokens=chunk_tokens)
    return jax.lax.with_sharding_constraint(law(params, pairs, statistics), replicated(mesh))


def _no_law(*_, **__):
    return {}


_LAWS = {"exact": _exact_law, "head": _head_law, "none": _no_law}


def probe_rhythm(every: str | int | None, steps: int) -> int:
    """Updates between probings; ``auto`` is a twentieth of the steps, at least 1."""
    return every if isinstance(every, int) else max(1, round(steps / 20))


def _text_summary(samples: list[list[int]]) -> dict[str, float]:
    distinct = {f"distinct_{n}": distinct_n(samples, n=n) for n in (1, 2, 3)}
    return {"repetition": repetition(samples), **distinct}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

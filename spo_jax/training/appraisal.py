"""What a run looks at on the way and at its end: held-out rows, and graded answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from spo_jax.config.schema import Config
from spo_jax.evaluation.answers import Exam, take_exam
from spo_jax.evaluation.heldout import make_evaluate
from spo_jax.evaluation.texts import Texts
from spo_jax.losses import PreferenceLoss
from spo_jax.models import Model, join, split
from spo_jax.objective.adapted import OnBase
from spo_jax.parallel.mesh import place_batch
from spo_jax.policies.loading import Policy
from spo_jax.policies.rows import Rows
from spo_jax.training.material import heldout_batches
from spo_jax.training.stage import Stage, pair_objective
from spo_jax.types import Params, TrainState

Look = Callable[..., dict[str, float]]


def make_heldout(
    config: Config,
    stage: Stage,
    model: Model,
    loss: PreferenceLoss,
    rows: Rows,
    logprobs: np.ndarray | None,
    mesh: Mesh,
) -> Look | None:
    """``make_evaluate`` on the held-out rows of a stage; None where there are none.

    ``logprobs`` are the frozen reference's. Held-out pairs are judged with the chosen as inner
    data, whatever training uses, and against the reference that the stage begins with, so that
    figures of one run, and of runs beside it, can be compared.
    """
    if rows.heldout is None:
        return None
    objective = stage.objective
    if stage.name != "sft":
        objective = pair_objective(
            config,
            stage.name,
            model,
            loss,
            mesh,
            inner_data="chosen",
            steps=stage.steps,
            frozen=True,
        )
    batches = heldout_batches(rows, stage.loop, logprobs, mesh)
    return make_evaluate(objective, batches, partial(place_batch, mesh=mesh))


def make_look(
    stage: Stage,
    start: Policy,
    heldout: Look | None,
    exam: Exam | None,
    texts: Texts | None,
    *,
    frozen: Params | OnBase | None,
    exam_every: int | None,
    folder: Path,
) -> Look | None:
    """``(state, finished=False, check=...) -> metrics``; None where there is nothing to look at.

    ``heldout`` at every look; ``exam``, which writes its answers into ``folder``, when the stage
    has ended, and every ``exam_every`` updates; ``texts`` when it has ended. ``frozen`` is what the
    update has of the reference and the base. ``check()`` is
    called between batches and may raise.
    """
    if heldout is None and exam is None and texts is None:
        return None
    _, base = split(start.params)

    def look(
        state: TrainState, *, finished: bool = False, check: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        trained, found = state.solver.params, {}
        params = join(base, trained)
        if heldout is not None:
            found |= heldout(trained, state.objective, frozen, check)
        step = int(state.step)
        on_the_way = exam_every is not None and step % exam_every == 0
        ended = finished or step == stage.steps
        if exam is not None and (ended or on_the_way):
            found |= take_exam(exam, start._replace(params=params), folder, check)
        if texts is not None and ended:
            found |= texts(params, check)
        return found

    return look

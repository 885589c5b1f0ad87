"""Run a configuration: its stages in order, each from where the one before ended."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from spo_jax.checkpoints import Checkpoints
from spo_jax.checkpoints.run_folder import check_shared, run_folder
from spo_jax.checkpoints.user_cache import keep_compiled
from spo_jax.config.choices import bound_loss
from spo_jax.config.moving_reference import check_it_moves, moves, stays_online
from spo_jax.config.parsing import config_to_dict
from spo_jax.config.schema import Config
from spo_jax.dynamics.probes import probe_rhythm
from spo_jax.evaluation.answers import Exam, check_exam, make_exam
from spo_jax.evaluation.texts import Texts, make_texts
from spo_jax.losses import PreferenceLoss
from spo_jax.models import join, split
from spo_jax.objective.moving import MovingReference
from spo_jax.parallel.copies import local_path
from spo_jax.parallel.mesh import make_mesh, place_batch, unsharded
from spo_jax.parallel.processes import Vote, by_first, is_first, say
from spo_jax.policies.adapters import adapted, check_base, write_base
from spo_jax.policies.kept_format import keep_stop_ids
from spo_jax.policies.loading import MODEL_FOLDER, Policy, load_policy
from spo_jax.policies.rows import Rows
from spo_jax.training.appraisal import make_heldout, make_look
from spo_jax.training.boards import check_boards
from spo_jax.training.loop import Counters, run_loop
from spo_jax.training.material import (
    Frozen,
    frozen_logprobs,
    keep_reference,
    make_batches,
    make_probes,
    number_of_steps,
    rows_of_stage,
)
from spo_jax.training.pinned import pin, trained_template, write_inputs
from spo_jax.training.resuming import (
    check_folders,
    check_places,
    describe_run,
    go_on,
    stage_folder,
)
from spo_jax.training.stage import (
    Stage,
    check_sizes,
    compile_update,
    loop_of,
    make_stage,
    raw_key,
    state_shapes,
    what_stays,
)
from spo_jax.training.starts import write_start
from spo_jax.training.step_sizes import check_step_sizes
from spo_jax.training.stopping import check_learnt
from spo_jax.training.trackers import (
    SKIPPED_FILE,
    DisplacementAlarm,
    MetricsWriter,
    ProbeWriter,
    Progress,
)
from spo_jax.training.update import init_state, shard_state
from spo_jax.types import Params, TrainState


class StageResult(NamedTuple):
    """Where a stage ended: the policy and its held-out metrics.

    A later stage that starts from the policy may have taken over its buffers.
    """

    policy: Policy
    metrics: dict[str, float]
    folder: Path


def train(
    config: Config,
    *,
    mesh: Mesh | None = None,
    resume: bool = False,
    only: str | None = None,
    allow_changes: bool = False,
) -> dict[str, StageResult]:
    """All stages in order; the preference stages start from what SFT ended with.

    ``mesh`` stands for the one that the section ``mesh`` describes, ``only`` for all stages.
    With ``resume`` every stage goes on from its newest checkpoint; ``allow_changes`` takes other
    settings and data than it began with.

    Raises:
        RunExists: the folder holds a run, and not ``resume``.
        ChangedConfig: settings that the saved state does not survive.
        Stopped: SIGINT or SIGTERM came; the state is saved.
        Diverged, NothingLearnt: updates that are not finite; a stage that changed no weight.
        ValueError: what cannot be run: data, sizes, a model; the message names the mend.
    """
    check_places(config)
    check_boards(config.trackers)
    keep_compiled(config.compilation_cache)
    mesh = make_mesh(**dataclasses.asdict(config.mesh)) if mesh is None else mesh
    stages = config.stages if only is None else (only,)
    for name in stages:
        check_sizes(config, name, mesh)
    with run_folder(config.output_dir) as root:
        check_shared(root)
        folders = [stage_folder(config, name) for name in stages]
        config = pin(config, folders, resume=resume, allow_changes=allow_changes, mesh=mesh)
        check = partial(check_folders, config, stages, resume=resume, allow_changes=allow_changes)
        begun = by_first(check)
        start = load_start(config, mesh, unchanged=begun and not allow_changes)
        check_step_sizes(config, stages, split(start.params)[0], begun=begun)
        exam, loss = make_exam(config, start.tokenizer), bound_loss(config.loss)
        if exam is not None:
            check_exam(exam, start)
        texts = make_texts(config, start, mesh)
        results: dict[str, StageResult] = {}
        read: dict[str, Rows] = {}
        for number, name in enumerate(stages):
            results[name] = run_stage(
                name,
                config,
                start,
                mesh,
                loss,
                exam,
                texts,
                read,
                resume=resume,
                allow_changes=allow_changes,
                # SFT's start is not looked at again, nor is the last stage's.
                keep_start=name != "sft" and number + 1 < len(stages),
            )
            if name == "sft":
                start = results[name].policy
    return results


def run_stage(
    name: str,
    config: Config,
    start: Policy,
    mesh: Mesh,
    loss: PreferenceLoss,
    exam: Exam | None,
    texts: Texts | None,
    read: dict[str, Rows],
    *,
    resume: bool,
    allow_changes: bool,
    keep_start: bool,
) -> StageResult:
    """One stage, in the order things happen; from its newest checkpoint with ``resume``.

    ``read`` are the rows that stages before have read. Unless ``keep_start`` the policy's buffers
    become the state's: a large model has no room for a copy.
    """
    folder = stage_folder(config, name)
    by_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    pairs = name != "sft"

    # Rows, and what the frozen reference says of them.
    trained, base = split(start.params)
    rows = rows_of_stage(config, name, start, read, resume=resume)
    reference = keep_reference(config, folder, start, mesh, resume=resume) if pairs else None
    frozen = Frozen()
    if pairs:
        frozen = frozen_logprobs(
            config, start.model, reference and join(base, reference), rows, mesh
        )
    online = reference if stays_online(config) else None
    elsewhere = moves(config) and config.reference.path is not None
    moving = reference if pairs and elsewhere else None
    stays = what_stays(base, online)
    del reference  # what is computed ahead needs no second model in memory from here on
    batches = make_batches(config, name, rows, frozen, mesh)

    # Objective, solver and optimizer: the update.
    steps = number_of_steps(loop_of(config, name), rows.own.train.epoch_size)
    if pairs:
        check_it_moves(config, steps)
    stage = make_stage(config, name, start.model, loss, mesh, steps=steps)
    update = compile_update(stage, trained, mesh, stays)
    heldout = make_heldout(config, stage, start.model, loss, rows.own, frozen.heldout, mesh)
    look = make_look(
        stage,
        start,
        heldout,
        exam,
        texts,
        frozen=stays,
        exam_every=config.answers.every if pairs else None,
        folder=folder,
    )

    # State: the first one, or that of the newest checkpoint.
    loop = stage.loop
    checkpoints = Checkpoints(folder, keep=loop.keep_checkpoints, keep_every=loop.keep_every)
    alarm = DisplacementAlarm(loop.alarm_log_ratio) if pairs else None
    donate = not keep_start and online is None
    if resume and checkpoints.latest_step() is not None:
        like = state_shapes(stage, trained, mesh)
        if base is not None:
            check_base(folder, config.model.path, base)
        if donate:
            # A model that leaves no room for a second one must be able to go on.
            jax.tree.map(lambda x: x.delete(), trained)
        state, counters = go_on(
            config, stage, checkpoints, like, batches, alarm, allow_changes=allow_changes
        )
    else:
        state = first_state(config, stage, start, mesh, donate=donate, moving=moving)
        counters = Counters()
        if base is not None:
            write_base(folder, config.model.path, base)
    by_first(lambda: describe_run(config, name, folder, start.folder))
    by_first(lambda: write_inputs(config, name, folder))
    by_first(lambda: write_start(folder, int(state.step)))

    # Loop: updates, checkpoints, looks and probes on the way.
    done, active = int(state.step), is_first()
    probe = None
    if pairs and config.dynamics.every is not None:
        probes = make_probes(config, loss, start, rows, mesh, folder=folder, online=online)
        probe = ProbeWriter(probes, folder, update, first_step=done + 1, active=active)
    metrics: dict[str, float] = {}

    def remember(state: TrainState, **options) -> dict[str, float]:
        metrics.update(look(state, **options))
        return metrics

    if done < steps:
        writer = MetricsWriter(
            folder,
            first_step=done + 1,
            active=active,
            boards=config.trackers,
            config=config_to_dict(config),
        )
        state = run_loop(
            update,
            state,
            batches,
            name=name,
            steps=steps,
            loop=loop,
            place=partial(place_batch, mesh=mesh),
            evaluate=None if look is None else remember,
            writer=writer,
            checkpoints=checkpoints,
            progress=Progress(name, steps, done, active),
            vote=Vote(mesh),
            counters=counters,
            alarm=alarm,
            probe=probe,
            probe_every=probe_rhythm(config.dynamics.every, steps),
        )
        writer.close()
    else:  # there is nothing left but to look
        if look is not None:
            remember(state)
        if probe is not None:
            probe(done, state)
        log = str(folder / SKIPPED_FILE)
        check_learnt(name, steps, skipped=counters.skipped, still=counters.still, log=log)
    checkpoints.close()
    policy = start._replace(params=join(base, state.solver.params))
    return StageResult(policy, dict(metrics), folder)


def load_start(config: Config, mesh: Mesh, *, unchanged: bool = False) -> Policy:
    """The policy that the run starts from; what of it is large and lies uncut is said."""
    work = local_path(config.output_dir) / MODEL_FOLDER
    start = load_policy(config.model, mesh, seed=config.seed, work=work, unchanged=unchanged)
    if config.lora.rank is not None:
        params = adapted(start.params, config.lora, mesh, seed=config.seed)
        start = start._replace(params=params)
    by_first(lambda: keep_stop_ids(work, start.tokenizer, trained_template(config)))
    for leaf in unsharded(start.params, mesh):
        size = f"{leaf.bytes_per_device / 2**20:.0f} MiB a device"
        say(f"WARNING {leaf.path} {list(leaf.shape)} takes {size}: {leaf.note}")
    return start


def first_state(
    config: Config,
    stage: Stage,
    start: Policy,
    mesh: Mesh,
    *,
    donate: bool,
    moving: Params | None = None,
) -> TrainState:
    """The state before the first update, made where it will live.

    ``moving`` are the parameters that its reference begins with, where they are not the policy's;
    the state takes over their buffers.
    """
    init, params = partial(init_state, stage.solver, stage.objective), split(start.params)[0]
    state, shardings = shard_state(init, mesh, params, raw_key(config.seed), donate=donate)
    if moving is None:
        return state
    reference = jax.device_put(MovingReference(moving), shardings.objective.reference)
    return state._replace(objective=state.objective._replace(reference=reference))


def judge_start(config: Config, *, resume: bool = False) -> dict[str, float]:
    """Held-out metrics and graded answers of the policy that the pair stages start from."""
    mesh, folder = make_mesh(**dataclasses.asdict(config.mesh)), local_path(config.output_dir)
    config = pin(config, [], resume=resume, allow_changes=False)
    start, loss = load_start(config, mesh), bound_loss(config.loss)
    exam = make_exam(config, start.tokenizer)
    rows = rows_of_stage(config, "baseline", start, {}, resume=resume)
    _, base = split(start.params)
    reference = keep_reference(config, folder, start, mesh, resume=resume)
    frozen = frozen_logprobs(config, start.model, reference and join(base, reference), rows, mesh)
    online = reference if stays_online(config) else None
    steps = number_of_steps(config.train, rows.own.train.epoch_size)
    stage = make_stage(config, "baseline", start.model, loss, mesh, steps=steps)
    heldout = make_heldout(config, stage, start.model, loss, rows.own, frozen.heldout, mesh)
    look = make_look(
        stage,
        start,
        heldout,
        exam,
        make_texts(config, start, mesh),
        frozen=what_stays(base, online),
        exam_every=None,
        folder=folder,
    )
    if look is None:
        return {}
    return look(first_state(config, stage, start, mesh, donate=False), finished=True)

"""Checkpoints of a toy state: exact on any mesh, atomic, and in words when they fail."""

import errno
import shutil
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from spo_jax.checkpoints import (
    CheckpointError,
    CheckpointReader,
    Checkpoints,
    DamagedCheckpoint,
    load_reference,
    save_reference,
    tree_bytes,
)
from spo_jax.parallel.mesh import make_mesh, tree_shardings
from spo_jax.solvers import SolverState
from spo_jax.types import TrainState

POSITION = {"preference": {"index": 3}, "sft": {"index": 5}}


def toy(seed=0, width=16):
    """A state with cut and whole leaves, three dtypes and empty parts, on one device."""
    rng = np.random.default_rng(seed)
    params = {
        "embed": jnp.asarray(rng.normal(size=(8, width)), jnp.float32),
        "layers": {"q": {"kernel": jnp.asarray(rng.normal(size=(2, width, 8)), jnp.bfloat16)}},
    }
    moments = jax.tree.map(lambda x: x.astype(jnp.float32) * 3, params)
    return TrainState(
        step=jnp.asarray(seed, jnp.int32),
        solver=SolverState(params, (moments, jnp.asarray(seed))),
        objective=(),
        key=jax.random.key_data(jax.random.key(seed)),
    )


def on(mesh, state):
    return jax.device_put(state, tree_shardings(state, mesh))


def save(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, toy(step), POSITION, {"stage": "preference", "steps": 9})
    checkpoints.wait()


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_exact_on_another_mesh(tmp_path):
    wide = on(make_mesh(fsdp=8, data=1), toy(4))
    first = Checkpoints(tmp_path)
    assert first.latest_step() is None
    first.save(4, wide, POSITION, {"stage": "sft", "steps": 9})
    first.close()

    second = Checkpoints(tmp_path)
    like = on(make_mesh(data=2, fsdp=2, tensor=2), toy(0))
    found, position, run = second.restore(like)
    second.close()
    assert second.latest_step() == 4
    assert_same(found, toy(4))
    assert (position, run) == (POSITION, {"stage": "sft", "steps": 9})
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
        assert a.sharding == b.sharding
    assert found.solver.params["embed"].addressable_shards[0].data.shape == (4, 8)


def test_the_newest_stay_and_any_of_them_is_read(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1, 2, 3)
    assert checkpoints.latest_step() == 3
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    assert int(checkpoints.restore(toy())[0].step) == 3
    assert_same(checkpoints.restore(toy(), step=2)[0], toy(2))

    # Saving the newest again does nothing: its content is there already.
    checkpoints.save(3, toy(7), {}, {})
    checkpoints.wait()
    assert_same(checkpoints.restore(toy())[0], toy(3))

    # Only the policy, whatever the optimizer was.
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    params = checkpoints.restore_params(on(mesh, toy().solver.params), step=2)
    assert_same(params, toy(2).solver.params)
    assert len(params["embed"].sharding.device_set) == 8
    for read in (checkpoints.restore, checkpoints.restore_params):
        with pytest.raises(CheckpointError, match=r"no checkpoint 1 in .*: there are 2, 3"):
            read(toy(), step=1)
    checkpoints.close()


def test_without_a_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        checkpoints.restore(toy())
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}"):
        checkpoints.restore_params(toy().solver.params)


def test_another_structure_or_shape(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    state = toy()
    smaller = state._replace(solver=state.solver._replace(outer=()))
    for like in (toy(width=32), smaller):
        with pytest.raises(CheckpointError, match="does not fit this configuration"):
            checkpoints.restore(like)
    with pytest.raises(CheckpointError, match="does not fit this configuration"):
        checkpoints.restore_params(toy(width=32).solver.params)
    with pytest.raises(CheckpointError, match="it has no: solver/params/head"):
        checkpoints.restore_params({**toy().solver.params, "head": jnp.zeros(3)})
    checkpoints.close()


Usage = namedtuple("Usage", "total used free")


def test_a_disk_that_is_too_full_is_seen_before(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    needed = tree_bytes(toy())
    assert needed == 8 * 16 * 4 + 2 * 16 * 8 * 2 + 8 * 16 * 4 + 2 * 16 * 8 * 4 + 4 + 4 + 8
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9e9, 9e9, needed - 1))
    with pytest.raises(CheckpointError) as caught:
        save(checkpoints, 1)
    assert "No earlier checkpoint exists" in str(caught.value)
    monkeypatch.undo()
    save(checkpoints, 1)

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9e9, 9e9, 1000))
    monkeypatch.setattr("spo_jax.checkpoints.writing.tree_bytes", lambda tree: 5_000_000)
    with pytest.raises(CheckpointError) as caught:
        save(checkpoints, 2)
    for part in (f"checkpoint 2 in {tmp_path}", "about 5 MB", "0 MB are free", "Step 1 is safe"):
        assert part in str(caught.value)
    monkeypatch.undo()
    assert_same(checkpoints.restore(toy())[0], toy(1))
    checkpoints.close()


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


async def full_in_the_background(*args, **kwargs):
    full()


def test_a_disk_that_fills_while_writing(tmp_path, monkeypatch):
    """In orbax's background thread; the step before stays, and a later save works."""
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", full_in_the_background)
    checkpoints.save(2, toy(2), POSITION, {})
    with pytest.raises(CheckpointError) as caught:
        checkpoints.wait()
    assert f"the checkpoint could not be written to {tmp_path}" in str(caught.value)
    assert "the disk is full. Step 1 is safe" in str(caught.value)
    monkeypatch.undo()
    assert checkpoints.latest_step() == 1
    assert_same(checkpoints.restore(toy())[0], toy(1))

    save(checkpoints, 3)
    assert_same(checkpoints.restore(toy())[0], toy(3))
    checkpoints.close()
    # What the failed writing left is no step of a later start either.
    assert sorted(Checkpoints(tmp_path)._manager.all_steps()) == [1, 3]


def test_a_disk_that_is_full_at_once(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(CheckpointError, match=r"checkpoint 2 could not .* full\. Step 1 is safe"):
        save(checkpoints, 2)

    def other(*args, **kwargs):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(ocp.CheckpointManager, "save", other)
    with pytest.raises(CheckpointError, match=r"first line\. Step 1 is safe"):
        save(checkpoints, 2)
    checkpoints.close()


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(bytes(data))


def files_of(folder, step):
    return sorted(p for p in (folder / "checkpoints" / str(step)).rglob("*") if p.is_file())


def is_needed(file):
    """What orbax says about a step besides: times, and who wrote it."""
    return file.name not in ("_CHECKPOINT_METADATA", "_sharding", "array_metadatas") and (
        "array_metadatas" not in file.parts
    )


@pytest.mark.wide
@pytest.mark.parametrize("damage", [truncate, empty, flip, Path.unlink])
def test_a_damaged_step_is_named_set_aside_and_passed_over(tmp_path, capsys, damage):
    """Whichever file of it is torn: what is read is what was written, or the step before."""
    whole = Checkpoints(tmp_path / "whole")
    save(whole, 1, 2)
    whole.close()
    passed_over = 0
    for number, file in enumerate(files_of(tmp_path / "whole", 2)):
        if not is_needed(file):
            continue
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", copy)
        damage(copy / file.relative_to(tmp_path / "whole"))
        checkpoints = Checkpoints(copy)
        state, position, run = checkpoints.restore(toy())
        said = capsys.readouterr().err
        assert_same(state, toy(int(state.step)))
        assert (position, run) == (POSITION, {"stage": "preference", "steps": 9})
        if int(state.step) == 1:
            passed_over += 1
            assert f"WARNING checkpoint 2 in {copy} is damaged" in said
            assert checkpoints.steps() == [1]
            assert (copy / "damaged" / "2").is_dir()
            save(checkpoints, 2)  # its number is free again
            assert_same(checkpoints.restore(toy())[0], toy(2))
        checkpoints.close()
    # A flipped bit may fall into what says nothing: padding, or a cache of what stands elsewhere.
    assert passed_over >= 3


def test_a_reader_passes_over_and_touches_nothing(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, 2)
    checkpoints.close()
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()  # a run is saving there
    (tmp_path / "checkpoints" / "2" / "run" / "metadata").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    reader = CheckpointReader(tmp_path)
    params = toy().solver.params
    assert_same(reader.restore_params(params), toy(1).solver.params)
    assert "checkpoint 2" in capsys.readouterr().err
    with pytest.raises(DamagedCheckpoint, match=r"run/metadata.*There are 1$"):
        reader.restore_params(params, 2)
    assert sorted(tmp_path.rglob("*")) == before


def test_numbers_that_changed_on_the_disk_are_named(tmp_path, monkeypatch):
    """What the file format does not notice, the checksums do."""
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    original = ocp.PyTreeCheckpointHandler.restore

    def changed(self, *args, **kwargs):
        found = original(self, *args, **kwargs)
        found.solver.params["embed"] = found.solver.params["embed"].at[3, 2].add(1e-6)
        return found

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", changed)
    with pytest.raises(DamagedCheckpoint, match=r"numbers of solver/params/embed are not"):
        checkpoints.restore(toy(), 1)
    with pytest.raises(DamagedCheckpoint, match=r"every checkpoint in .* is damaged"):
        checkpoints.restore(toy())


def test_another_model_is_no_damage(tmp_path):
    """Nothing is set aside for it, and what differs is named."""
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    with pytest.raises(CheckpointError, match=r"another shape or dtype: .*embed.*16.*32") as caught:
        checkpoints.restore(toy(width=32))
    assert not isinstance(caught.value, DamagedCheckpoint)
    other = toy()._replace(objective={"new": jnp.zeros(2)})
    with pytest.raises(CheckpointError, match="it has no: objective/new"):
        checkpoints.restore(other)
    assert checkpoints.steps() == [1]
    # A checkpoint's parameters may be read as another dtype.
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy(1).solver.params)
    assert_same(checkpoints.restore_params(half), half)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_reference_is_named(tmp_path, damage):
    """There is none before it: training against another reference would be another run."""
    params = on(make_mesh(fsdp=8, data=1), toy(1).solver.params)
    (tmp_path / "whole").mkdir()
    save_reference(tmp_path / "whole", params)
    said = []
    for number, file in enumerate(sorted((tmp_path / "whole" / "reference").rglob("*"))):
        if not file.is_file() or not is_needed(file):
            continue
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", copy)
        damage(copy / file.relative_to(tmp_path / "whole"))
        try:
            assert_same(load_reference(copy, params), params)
        except DamagedCheckpoint as damaged:
            said.append((str(copy / "reference"), str(damaged)))
    assert said
    for folder, text in said:
        assert f"the frozen reference in {folder} is damaged" in text
    sums = tmp_path / "whole" / "reference.checksums.json"
    sums.write_text(sums.read_text().replace("embed", "other"))
    with pytest.raises(DamagedCheckpoint, match="embed is not what was written"):
        load_reference(tmp_path / "whole", params)


def test_what_a_killed_save_left_is_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    checkpoints.close()
    torn = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", torn)
    again = Checkpoints(tmp_path)
    assert again.steps() == [1]
    save(again, 2)
    assert again.steps() == [1, 2]
    assert not torn.exists()


def test_the_reference_is_written_once(tmp_path, monkeypatch):
    params = on(make_mesh(fsdp=8, data=1), toy(1).solver.params)
    with monkeypatch.context() as context:
        context.setattr(shutil, "disk_usage", lambda path: Usage(9, 9, tree_bytes(params) - 1))
        with pytest.raises(CheckpointError, match=r"reference parameters in .*reference: they"):
            save_reference(tmp_path, params)
    assert not (tmp_path / "reference").exists()
    save_reference(tmp_path, params)
    save_reference(tmp_path, toy(2).solver.params)
    like = on(make_mesh(data=2, fsdp=2, tensor=2), toy(3).solver.params)
    found = load_reference(tmp_path, like)
    assert_same(found, toy(1).solver.params)
    assert found["embed"].sharding == like["embed"].sharding


def test_only_large_arrays_are_shared_out_over_their_copies(tmp_path):
    """Each slice of a small one is a call that the loop waits for."""
    mesh = make_mesh(data=8)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    sizes = {"small": (64, 64), "large": (1024, 512)}  # 16 KiB, 2 MiB
    state = {name: jax.device_put(jnp.ones(shape), whole) for name, shape in sizes.items()}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, POSITION, {})
    checkpoints.close()
    folder = tmp_path / "checkpoints" / "1" / "state"
    kvstore = {"driver": "ocdbt", "base": f"file://{folder}/"}
    written = {
        name: ts.open({"driver": "zarr", "kvstore": {**kvstore, "path": f"{name}/"}})
        .result()
        .chunk_layout.write_chunk.shape
        for name in sizes
    }
    assert written == {"small": (64, 64), "large": (128, 512)}

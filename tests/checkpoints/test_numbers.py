"""No NaN in a checkpoint or a JSON file; 16 bits are read and checked as they were written."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.checkpoints import (
    CheckpointError,
    CheckpointReader,
    Checkpoints,
    DamagedCheckpoint,
    load_reference,
    save_reference,
)
from spo_jax.checkpoints.atomic import to_json, without_nan, write_rows
from spo_jax.checkpoints.checksums import not_finite
from spo_jax.parallel.mesh import make_mesh, tree_shardings
from tests.checkpoints.test_checkpoints import POSITION, assert_same, on, toy

RUN = {"stage": "preference", "steps": 9}


def as_dtype(tree, dtype):
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def spoilt(state, value=jnp.nan, part="params"):
    """A state with one number that is none, in a weight or a moment."""
    params, (moments, count) = state.solver.params, state.solver.outer
    tree = {"params": params, "outer": moments}[part]
    tree = {**tree, "embed": tree["embed"].at[3, 5].set(value)}
    if part == "params":
        return state._replace(solver=state.solver._replace(params=tree))
    return state._replace(solver=state.solver._replace(outer=(tree, count)))


@pytest.mark.wide
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("mesh", [{"data": 8}, {"fsdp": 8, "data": 1}])
def test_a_reference_in_16_bits_is_read_as_32(tmp_path, dtype, mesh):
    """It was called damaged: other bits are no damage where another dtype is asked for."""
    stored = as_dtype(on(make_mesh(**mesh), toy(1).solver.params), dtype)
    save_reference(tmp_path, stored)
    assert_same(load_reference(tmp_path, stored), stored)
    wide = as_dtype(stored, "float32")
    found = load_reference(tmp_path, wide)
    assert_same(found, wide)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, found, wide)))
    # Shapes do for it.
    mesh = make_mesh(**mesh)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=s),
        wide,
        tree_shardings(wide, mesh),
    )
    assert_same(load_reference(tmp_path, shapes), wide)


@pytest.mark.wide
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_change_of_16_bits_is_found_when_32_are_asked_for(tmp_path, dtype):
    """In a policy it was not looked for; in a reference it was found where there was none."""
    state = toy(1)
    half = state._replace(solver=state.solver._replace(params=as_dtype(state.solver.params, dtype)))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, half, POSITION, RUN)
    checkpoints.close()
    wide = as_dtype(half.solver.params, "float32")
    assert_same(CheckpointReader(tmp_path).restore_params(wide), wide)
    (tmp_path / "frozen").mkdir()
    save_reference(tmp_path / "frozen", half.solver.params)
    for file, where in (
        (tmp_path / "checkpoints" / "1" / "run" / "metadata", ("leaves", "solver/params/embed")),
        (tmp_path / "frozen" / "reference.checksums.json", ("embed",)),
    ):
        written = json.loads(file.read_text())
        inside = written
        for key in where[:-1]:
            inside = inside[key]
        inside[where[-1]][-1] ^= 1
        file.write_text(json.dumps(written))
    with pytest.raises(DamagedCheckpoint, match="embed are not those that were written"):
        CheckpointReader(tmp_path).restore_params(wide, 1)
    with pytest.raises(DamagedCheckpoint, match="embed is not what was written"):
        load_reference(tmp_path / "frozen", wide)


@pytest.mark.wide
@pytest.mark.parametrize("part", ["params", "outer"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_with_nan_is_not_written(tmp_path, part, value):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, toy(1), POSITION, RUN)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.save(2, spoilt(toy(2), value, part), POSITION, RUN)
    for said in ("checkpoint 2 is not written", f"solver/{part}", "embed holds NaN", "--resume"):
        assert said in str(caught.value)
    checkpoints.wait()
    assert checkpoints.steps() == [1]
    # A running minimum begins at infinity: that is no damage.
    begun = toy(3)._replace(objective={"minimum": jnp.full((), jnp.inf)})
    checkpoints.save(3, begun, POSITION, RUN)
    checkpoints.wait()
    assert_same(checkpoints.restore(begun)[0], begun)
    checkpoints.close()


def test_a_state_with_nan_that_lies_there_is_named_and_passed_over(tmp_path, monkeypatch, capsys):
    """Written by a version that did not look: neither resumed from, nor evaluated, nor exported."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, toy(1), POSITION, RUN)
    with monkeypatch.context() as patch:
        patch.setattr("spo_jax.checkpoints.writing.broken_weights", lambda state: [])
        checkpoints.save(2, spoilt(toy(2)), POSITION, RUN)
        checkpoints.wait()
    reader, params = CheckpointReader(tmp_path), toy(1).solver.params
    assert_same(reader.restore_params(params), params)
    shown = capsys.readouterr().err
    assert "checkpoint 2" in shown
    assert "solver/params/embed holds NaN or infinity" in shown
    with pytest.raises(DamagedCheckpoint, match=r"embed holds NaN or infinity\. There are 1"):
        reader.restore_params(params, 2)
    assert_same(checkpoints.restore(toy())[0], toy(1))
    assert (tmp_path / "damaged" / "2").is_dir()
    checkpoints.close()


def test_leaves_that_are_not_finite_by_name():
    mesh = make_mesh(fsdp=8, data=1)
    tree = {"embed": jnp.ones((8, 16)), "layers": [jnp.zeros(3), jnp.asarray([1, jnp.nan])]}
    assert not_finite(tree) == ["layers/1"]
    assert not_finite(jax.device_put(tree, tree_shardings(tree, mesh))) == ["layers/1"]
    assert not_finite({"count": jnp.zeros(2, jnp.int32)}) == []
    assert not_finite({}) == []


def test_json_has_no_nan(tmp_path):
    value = {"a": 1.0, "b": [0.5, {"c": math.nan}], "d": -math.inf, "e": "NaN"}
    with pytest.raises(ValueError, match=r"result.json: b.1.c is nan, which is no number"):
        to_json(value, "result.json")
    found, names = without_nan(value)
    assert found == {"a": 1.0, "b": [0.5, {"c": None}], "d": None, "e": "NaN"}
    assert names == ["b.1.c", "d"]
    assert json.loads(to_json(found, "it", indent=1)) == found
    rows = [{"x": 1.0}, {"x": math.inf}]
    with pytest.raises(ValueError, match=r"rows.jsonl: x is inf"):
        write_rows(tmp_path / "rows.jsonl", rows)
    assert not (tmp_path / "rows.jsonl").exists()

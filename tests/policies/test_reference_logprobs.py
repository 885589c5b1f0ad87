"""Fingerprints of parameters on any mesh, and the cache of frozen log-probs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.checkpoints.checksums import params_fingerprint
from spo_jax.data.reference import fingerprint, load_or_precompute, precompute
from spo_jax.parallel.mesh import make_mesh, tree_shardings


def toy(dtype=jnp.float32):
    """Shapes that the rules of the mesh cut; values all different."""
    rng = np.random.default_rng(0)
    return {
        "embed": jnp.asarray(rng.normal(size=(8, 16)), dtype),
        "layers": {
            "q": {"kernel": jnp.asarray(rng.normal(size=(2, 16, 8)), dtype)},
            "norm": {"scale": jnp.ones((2, 16), dtype)},
        },
    }


@pytest.mark.wide
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_same_on_every_mesh(dtype):
    params = toy(dtype)
    expected = params_fingerprint(params)
    assert re.fullmatch("[0-9a-f]{64}", expected)
    for sizes in ({"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        placed = jax.device_put(params, tree_shardings(params, make_mesh(**sizes)))
        assert params_fingerprint(placed) == expected, sizes


def changed(change):
    params = toy()
    embed = np.array(params["embed"])
    change(embed)
    return {**params, "embed": jnp.asarray(embed)}


def swap(embed):
    embed[[2, 5], 3] = embed[[5, 2], 3]


def swap_neighbours(embed):
    embed[0, [0, 1]] = embed[0, [1, 0]]


def lowest_bit(embed):
    embed.view(np.uint32)[7, 15] ^= 1


def sign_bit(embed):
    embed[4, 4] *= -1


def signs(embed):
    embed *= -1


def rows(embed):
    embed[:] = embed[::-1]


def test_every_change_is_seen():
    found = {params_fingerprint(toy()), params_fingerprint(toy(jnp.bfloat16))}
    changes = (swap, swap_neighbours, lowest_bit, sign_bit, signs, rows)
    found |= {params_fingerprint(changed(change)) for change in changes}
    renamed = toy()
    renamed["wembed"] = renamed.pop("embed")
    found.add(params_fingerprint(renamed))
    assert len(found) == 3 + len(changes)
    assert params_fingerprint(changed(lambda embed: None)) == params_fingerprint(toy())


def test_parts_of_a_key_do_not_run_together():
    assert fingerprint("a", "b") == fingerprint("a", "b")
    assert len({fingerprint("a", "b"), fingerprint("ab"), fingerprint("b", "a")}) == 3
    assert re.fullmatch("[0-9a-f]{32}", fingerprint("a"))


def batches(*ids):
    return [np.asarray(batch) for batch in ids]


def logprobs(ids):
    return ids, np.stack([-ids - 0.5, -2.0 * ids], axis=1).astype(np.float32)


def test_rows_in_any_order_without_fillers():
    found = precompute(logprobs, batches([2, 0], [1, -1]), num_rows=3)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[-0.5, 0], [-1.5, -2], [-2.5, -4]])


def test_rows_that_are_missing_are_an_error():
    with pytest.raises(ValueError, match="1 of 3 rows have no finite reference log-prob"):
        precompute(logprobs, batches([0, 2], [-1, -1]), num_rows=3)
    with pytest.raises(ValueError, match="3 of 3 rows"):
        precompute(logprobs, [], num_rows=3)

    def one_is_nan(ids):
        ids, values = logprobs(ids)
        values[ids == 1, 1] = np.nan
        return ids, values

    with pytest.raises(ValueError, match="1 of 3 rows"):
        precompute(one_is_nan, batches([0, 1, 2]), num_rows=3)


VALUES = np.asarray([[1.5, -2.0]], np.float32)


class Compute:
    """Counts how often it had to compute."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return VALUES


def load(cache_dir, compute, key="key", write=True):
    values, cached = load_or_precompute(cache_dir, key, compute, write=write)
    np.testing.assert_array_equal(values, VALUES)
    return cached


def test_computed_once_a_key(tmp_path):
    compute = Compute()
    assert [load(tmp_path, compute), load(tmp_path, compute)] == [False, True]
    assert not load(tmp_path, compute, key="other")
    assert compute.calls == 2
    names = sorted(p.name for p in (tmp_path / "reference_logprobs").iterdir())
    assert names == ["key.npy", "other.npy"], "and no temporary file"


def test_processes_that_do_not_write_leave_nothing(tmp_path):
    assert not load(tmp_path, Compute(), write=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"not an array", "cut"])
def test_a_damaged_file_is_computed_anew(tmp_path, capsys, content):
    load(tmp_path, Compute())
    path = tmp_path / "reference_logprobs" / "key.npy"
    path.write_bytes(path.read_bytes()[:-3] if content == "cut" else content)
    compute = Compute()
    assert not load(tmp_path, compute)
    assert compute.calls == 1
    assert f"{path} is damaged and is computed anew" in capsys.readouterr().err
    assert load(tmp_path, compute)


def test_a_cache_that_cannot_be_written_is_a_message(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert not load(tmp_path / "file", Compute())
    assert "reference log-probs are not kept in" in capsys.readouterr().err


def test_a_full_disk_is_a_message(tmp_path, capsys, monkeypatch):
    def full(path, values):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert not load(tmp_path, Compute())
    assert "No space left on device" in capsys.readouterr().err
    assert not list((tmp_path / "reference_logprobs").iterdir())

"""The benchmark against other libraries: its arithmetic, its check, and our sides for real."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "peers.py"


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("peers", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flops_of_a_perfect_step_by_hand(peers):
    tiny = peers.make_architecture(16, 3, 50)
    shape = peers.Shape(prompt=2, completion=4, pairs=5)
    # q and o 16 x 16, k and v 16 x 8, gate, up and down 16 x 44: 2880 weights in each of 3 layers.
    linear = 6 * 3 * 2880 * 5 * (2 + 2 * 4)
    head = 6 * 16 * 50 * 5 * 2 * 4
    # 2 pairs of positions within the prompt; 8 to it and 8 within each completion.
    attention = 12 * 8 * 2 * 3 * 5 * (2 + 2 * (8 + 8))
    assert peers.perfect_flops(shape, tiny) == linear + head + attention
    assert (shape.computed, shape.counted) == (50, 60)
    full = peers.make_architecture(512, 8, 32000)
    found = [peers.perfect_flops(peers.Shape(*s, 4), full) for s in ((128, 384), (384, 128))]
    assert found == pytest.approx([0.859e12, 0.500e12], rel=2e-3)


def test_sides_that_compute_something_else_are_named(peers):
    ln2 = math.log(2)
    losses = {"a": [ln2, 0.6], "b": [ln2, 0.60005], "c": [ln2, 0.6], "other solver": [ln2, 0.5]}
    alike = {"a", "b", "c"}
    assert not peers.disagreeing(losses, alike, 1e-4)
    (found,) = peers.disagreeing(losses, {*alike, "other solver"}, 1e-4)
    assert found.startswith("other solver: the second loss is 0.5")
    (found,) = peers.disagreeing({**losses, "d": [0.7, 0.6]}, alike, 1e-4)
    assert found.startswith("d: the first loss is 0.7")
    found = peers.disagreeing({**losses, "e": [math.nan] * 2}, {*alike, "e"}, 1e-4)
    assert [line.split(":")[0] for line in found] == ["e", "e"]


@pytest.mark.slow
def test_our_sides_run_and_agree(peers, tmp_path, capsys):
    sides = ["ours online", "ours precomputed"]
    peers.main(
        ["--shape", "4/6", "--pairs", "2", "--hidden", "16", "--layers", "1", "--vocabulary", "40",
         "--rounds", "1", "--steps", "1", "--warmup", "1", "--learning-rate", "1e-2",
         "--json", str(tmp_path / "found.json"), "--sides", *sides]
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert all(side in shown for side in sides)
    (shape,) = json.loads((tmp_path / "found.json").read_text())["shapes"]
    rows = {row["side"]: row for row in shape["table"]}
    assert list(rows) == sides
    online, precomputed = (rows[side]["losses"][1] for side in sides)
    assert online == pytest.approx(precomputed, abs=1e-4)
    assert math.log(2) - online > 1e-3  # a step of this size is seen
    for row in rows.values():
        assert min(row[k] for k in ("seconds", "tokens_per_second", "peak_bytes", "share")) > 0


def test_a_shape_is_two_numbers(peers, capsys):
    with pytest.raises(SystemExit):
        peers.read_options(["--shape", "128"])
    assert "PROMPT/COMPLETION" in capsys.readouterr().err

"""A run on packed rows: packed by itself, the same on a mesh, gone on with, evaluated."""

import json

import jax
import numpy as np
import pytest

from spo_jax.config.validation import checked_config
from spo_jax.parallel.mesh import make_mesh
from spo_jax.training.run import judge_start, train
from spo_jax.training.trackers import read_metrics
from tests.tiny import ARCHITECTURE

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """48 pairs of sums, most short and some eight times as long."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rng = np.random.default_rng(0)

    def text(mean):
        size = int(np.clip(rng.lognormal(np.log(mean), 0.8), 1, 8 * mean))
        return "".join(map(str, rng.integers(0, 10, size)))

    rows = ({"prompt": text(6), "chosen": text(6), "rejected": text(6) + "+"} for _ in range(48))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def config_of(data, folder, *, steps=4, packing="auto", **keys):
    return checked_config(
        {
            "output_dir": str(folder / "run"),
            "stages": ["preference"],
            "model": {
                "tokenizer": "builtin:arithmetic",
                "init": {**ARCHITECTURE, "hidden_size": 64, "max_position_embeddings": 256},
            },
            "data": {"train": str(data), "eval_fraction": 0.25, "packing": packing},
            "outer": {"learning_rate": 1e-2, "schedule": "constant", "warmup_ratio": 0.0},
            "reference": {"cache_dir": str(folder / "cache")},
            "train": {"steps": steps, "batch_size": 16, "save_every": 2, **keys},
        }
    )


def run(config, shards=1, **options):
    mesh = make_mesh(data=shards, devices=jax.devices()[:shards])
    return train(config, mesh=mesh, **options)["preference"]


def lines_of(result):
    return [line for line in read_metrics(result.folder) if "loss" in line]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    return run(config_of(data, tmp_path_factory.mktemp("alone")))


def test_packs_by_itself_and_little_is_padding(alone, data, tmp_path, capsys):
    shown = run(config_of(data, tmp_path, steps=2))
    assert "packed, " in capsys.readouterr().err + capsys.readouterr().out
    assert max(line["padding_share"] for line in lines_of(shown)) < 0.2
    assert {"loss", "gap", "rewards/accuracies"} <= set(alone.metrics)


def test_a_mesh_with_accumulation_sees_the_same_updates(alone, data, tmp_path):
    cut = run(config_of(data, tmp_path, gradient_accumulation=2), shards=2)
    for a, b in zip(lines_of(alone), lines_of(cut), strict=True):
        for name in ("loss", "inner_loss", "grad_norm", "rewards/margins"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5)
    for name, value in alone.metrics.items():
        assert value == pytest.approx(cut.metrics[name], rel=2e-3, abs=1e-4)


def test_goes_on_as_it_began_on_a_mesh_that_would_not_pack(alone, data, tmp_path):
    run(config_of(data, tmp_path, steps=2))
    later = run(config_of(data, tmp_path), shards=8, resume=True, allow_changes=True)
    found, expected = lines_of(later), lines_of(alone)
    assert len(found) == len(expected) == 4
    for a, b in zip(found[2:], expected[2:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_held_out_metrics_are_those_of_rows_of_their_own(data, tmp_path):
    packed, plain = (
        judge_start(config_of(data, tmp_path / str(packing), packing=packing))
        for packing in (True, False)
    )
    assert packed["logprobs/chosen"] < -1
    for name, value in plain.items():
        assert packed[name] == pytest.approx(value, rel=1e-5, abs=1e-6)

"""README's Python runs as it stands there."""

import re
from pathlib import Path

import jax
import pytest

from spo_jax.config.choices import loss_function
from spo_jax.models import init_model, save_pretrained
from tests.losses.test_preference import POLICY, REFERENCE
from tests.tiny import ARCHITECTURE

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)

MODEL = {**ARCHITECTURE, "vocab_size": 32}


def test_examples_are_short():
    assert len(BLOCKS) == 2
    assert all(len(block.splitlines()) < 30 for block in BLOCKS)


@pytest.mark.slow
def test_training_loop(tmp_path):
    model = init_model(MODEL)
    folder = tmp_path / "model"
    save_pretrained(folder, model.init(jax.random.key(0)), model, source=MODEL)
    names = {}
    exec(BLOCKS[0].replace('"MODEL"', repr(str(folder))), names)
    assert names["metrics"]["rewards/margins"] > 0
    assert names["metrics"]["gap"] < 0
    assert names["step"]._cache_size() == 1  # compiled once


def test_loss_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(BLOCKS[1])
    monkeypatch.chdir(tmp_path)
    loss = loss_function("my_losses:offset_dpo_loss")
    plain = loss(POLICY, REFERENCE, beta=0.5, offset=0.0)
    assert float(plain[0]) == pytest.approx(float(jax.nn.softplus(-0.5)), rel=1e-6)

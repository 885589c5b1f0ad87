"""Our logits equal those of ``transformers``: stored ones always, live ones with PyTorch."""

from __future__ import annotations

import copy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.models import init_model, load_model, load_params
from spo_jax.models.blocked import capped
from spo_jax.plan.estimate import count_parameters
from tests.models.make_fixtures import transformers_logits
from tests.models.tiny_models import HF_CONFIGS, padded_tokens, write_folder

TOLERANCE = 1e-4


def our_logits(folder, tokens, mask):
    model = load_model(folder)
    params = load_params(folder, model)
    hidden = jax.jit(model.hidden_plain)(params, jnp.asarray(tokens), jnp.asarray(mask))
    return np.asarray(capped(hidden @ model.output_head(params), model.logit_cap))


@pytest.mark.wide
@pytest.mark.parametrize("name", HF_CONFIGS)
def test_logits_equal_the_stored_ones(name, tmp_path):
    with np.load(Path(__file__).parent / "fixtures" / f"{name}.npz") as stored:
        tokens, mask, expected = stored["tokens"], stored["mask"], stored["logits"]
    logits = our_logits(write_folder(tmp_path, HF_CONFIGS[name]), tokens, mask)[:, 3::4]
    real = mask[:, 3::4]
    assert np.abs(expected[real]).max() > 1  # the weights are not so small that all agree
    assert np.abs(logits - expected)[real].max() <= TOLERANCE


@pytest.mark.parametrize("name", HF_CONFIGS)
def test_parameters_are_counted_as_transformers_does(name):
    torch = pytest.importorskip("torch")
    import transformers

    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**copy.deepcopy(HF_CONFIGS[name]))
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    assert count_parameters(init_model(HF_CONFIGS[name])) == theirs.num_parameters()


@pytest.mark.wide
@pytest.mark.parametrize("name", HF_CONFIGS)
def test_logits_equal_those_of_transformers(name, tmp_path):
    pytest.importorskip("torch")
    tokens, mask = padded_tokens(1, [37, 12, 1], 37)
    folder = write_folder(tmp_path, HF_CONFIGS[name])
    expected = transformers_logits(folder, tokens, mask)
    assert np.abs(our_logits(folder, tokens, mask) - expected)[mask].max() <= TOLERANCE

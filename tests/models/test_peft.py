"""Adapters in the format of ``peft``: names, shapes and numbers; and, where it is there, logits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.models import Lora, init_model, save_pretrained, split
from spo_jax.models.families import family_of
from spo_jax.models.peft import save_adapters
from spo_jax.models.tensor_files import read_header
from tests.models.test_lora import adapted
from tests.models.tiny_models import HF_CONFIGS

LORA = Lora(rank=2, alpha=3.0, targets=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of the family, its adapters on it, and both as folders."""
    root = tmp_path_factory.mktemp("peft")
    hf = HF_CONFIGS["qwen3"]
    model = init_model(hf)
    params, base = model.init(jax.random.key(0)), str(root / "base")
    save_pretrained(base, params, model, source=hf)
    whole = adapted(params, LORA, spread=0.3)
    trained, _ = split(whole)
    save_adapters(root / "adapter", trained, LORA, names=family_of(hf).names, base=base)
    return root, hf, model, whole


def test_the_names_and_shapes_are_those_of_peft(saved):
    root, hf, _, whole = saved
    stored = read_header(root / "adapter" / "adapter_model.safetensors")
    module = "base_model.model.model.layers.{}.{}.lora_{}.weight"
    wanted = {
        module.format(layer, name, side)
        for layer in range(hf["num_hidden_layers"])
        for name in ("self_attn.q_proj", "mlp.down_proj")
        for side in "AB"
    }
    assert set(stored) == wanted
    a, b = (stored[module.format(1, "mlp.down_proj", side)].array() for side in "AB")
    assert (a.shape, b.shape) == ((2, 24), (16, 2))
    adapter = whole["layers"]["mlp"]["down_lora"]
    np.testing.assert_array_equal(a.T, adapter["a"][1])
    np.testing.assert_array_equal(b.T, adapter["b"][1])


def test_its_settings_are_those_of_the_adapters(saved):
    root = saved[0]
    found = json.loads((root / "adapter" / "adapter_config.json").read_text())
    assert (found["r"], found["lora_alpha"], found["bias"]) == (2, 3, "none")
    assert found["target_modules"] == ["q_proj", "down_proj"]
    assert found["base_model_name_or_path"] == str(root / "base")
    assert found["peft_type"] == "LORA"
    assert not found["use_rslora"]


def test_a_number_that_the_dtype_does_not_hold_is_refused_and_leaves_nothing(saved, tmp_path):
    _, hf, _, whole = saved
    trained = jax.tree.map(lambda x: x * 1e9, split(whole)[0])
    names = family_of(hf).names
    with pytest.raises(ValueError, match=r"beyond the largest float16.*dtype=float16"):
        save_adapters(tmp_path / "out", trained, LORA, names=names, base="base", dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_peft_loads_it_with_equal_logits(saved):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    root, _, model, whole = saved
    tokens = np.arange(1, 10)[None]
    hidden = model.hidden_plain(whole, jnp.asarray(tokens), jnp.ones((1, 9), bool))
    ours = hidden @ model.output_head(whole)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
        before = base(torch.as_tensor(tokens)).logits
        theirs = peft.PeftModel.from_pretrained(base, root / "adapter")(torch.as_tensor(tokens))
    np.testing.assert_allclose(ours, theirs.logits, rtol=1e-4, atol=1e-5)
    assert float((theirs.logits - before).abs().max()) > 0.05


def test_projections_that_share_a_matrix_are_refused(tmp_path):
    """``peft`` would have one adapter for them, and one of ours would be written over the other."""
    hf = HF_CONFIGS["phi3"]
    model = init_model(hf)
    trained, _ = split(adapted(model.init(jax.random.key(0)), LORA, spread=0.3))
    with pytest.raises(ValueError, match=r"qkv_proj.*one matrix of 3.*export without --adapter"):
        save_adapters(tmp_path / "a", trained, LORA, names=family_of(hf).names, base="b")
    assert not (tmp_path / "a").exists()

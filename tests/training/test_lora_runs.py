"""Runs that train adapters on a base: both stages, resumed, exported, judged; what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from spo_jax.cli import main
from spo_jax.config.parsing import ConfigError, read_tree
from spo_jax.config.validation import checked_config
from spo_jax.data import load_tokenizer
from spo_jax.evaluation.scoring import evaluate_model
from spo_jax.models import init_model, load_model, load_params, merge, save_pretrained, split
from spo_jax.models.nf4 import dequantize
from spo_jax.models.tensor_files import read_header
from spo_jax.parallel.mesh import make_mesh
from spo_jax.policies.loading import params_of_run
from spo_jax.tasks import arithmetic
from spo_jax.training.run import train
from spo_jax.training.trackers import read_metrics
from tests.runs import PAIRS, TREE, state_of
from tests.tiny import ARCHITECTURE

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder with the arithmetic task's tokenizer, and a file of pairs."""
    root = tmp_path_factory.mktemp("lora")
    arithmetic.write_tokenizer(root / "tokenizer")
    hf = ARCHITECTURE | {"vocab_size": len(load_tokenizer(root / "tokenizer"))}
    model = init_model(hf)
    save_pretrained(root / "model", model.init(jax.random.key(0)), model, source=hf)
    arithmetic.write_tokenizer(root / "model")
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return root


def tree_of(base, output, **sections):
    tree = {k: dict(v) if isinstance(v, dict) else v for k, v in TREE.items()}
    pairs = {"train": str(base / "pairs.jsonl")}
    tree |= {
        "output_dir": str(output),
        "model": {"path": str(base / "model")},
        "lora": {"rank": 3, "targets": ["q_proj", "v_proj", "down_proj"]},
        "stages": ["sft", "preference"],
        "data": tree["data"] | pairs,
        "sft_data": pairs | {"prompt_buckets": [4], "completion_buckets": [4]},
        "sft": {"steps": 3, "batch_size": 8},
        "sft_optimizer": {"learning_rate": 1e-2},
        "train": {"steps": 4, "batch_size": 8, "save_every": 2, "gradient_accumulation": 2},
        "reference": {"cache_dir": str(base / "cache")},
    }
    for key, section in sections.items():
        tree[key] = {**tree.get(key, {}), **section} if isinstance(section, dict) else section
    return tree


def two():
    """Two devices, which the parameters are cut over."""
    return make_mesh(fsdp=2, devices=jax.devices()[:2])


@pytest.fixture(scope="module")
def run(base):
    tree = tree_of(base, base / "run")
    results = train(checked_config(tree), mesh=two())
    return tree, base / "run", results


def leaves_of(folder, step):
    return state_of(folder, step)[0]


def same(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_the_checkpoint_has_adapters_and_their_moments_alone(run):
    _, folder, _ = run
    for stage, step in (("sft", 3), ("preference", 4)):
        leaves = jax.tree_util.tree_leaves_with_path(leaves_of(folder / stage, step))
        shapes = {jax.tree_util.keystr(p): x.shape for p, x in leaves}
        weights = [name for name, shape in shapes.items() if len(shape) > 1]
        assert weights
        assert all("_lora'" in name for name in weights), weights
    saved = sum(f.stat().st_size for f in (folder / "preference" / "reference").rglob("*"))
    assert saved < 50_000


def test_the_reference_is_the_policy_that_the_stage_begins_with(run):
    _, folder, results = run
    first = next(line for line in read_metrics(folder / "preference") if "lr" in line)
    for name in ("log_ratio/chosen", "log_ratio/rejected", "gap"):
        assert abs(first[name]) < 1e-4, name
    last = results["preference"].metrics
    assert abs(last["log_ratio/chosen"]) > 1e-3
    # It is SFT's end, and not the bare base.
    model = load_model(folder / "preference" / "model")
    at_start = params_of_run(folder / "sft", model, make_mesh())
    assert not same(at_start, load_params(run[0]["model"]["path"], model))


def test_the_base_stays_as_it_was_bit_for_bit(run, base):
    _, frozen = split(run[2]["preference"].policy.params)
    model = run[2]["preference"].policy.model
    before = load_params(base / "model", model)
    for path, x in jax.tree_util.tree_leaves_with_path(before):
        found = frozen
        for key in path:
            found = found[key.key]
        np.testing.assert_array_equal(found, x)


def test_resume_is_exact(run, tmp_path):
    """2 + 2 updates of the preference stage are 4, bit for bit; SFT's end is read back."""
    tree, folder, _ = run
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "preference" / "checkpoints" / "4")
    train(checked_config(tree | {"output_dir": str(tmp_path / "run")}), mesh=two(), resume=True)
    again, before = (state_of(root / "preference", 4) for root in (tmp_path / "run", folder))
    assert same(again[0], before[0])
    assert again[1] == before[1]


def test_export_is_the_merged_model_and_adapter_that_of_peft(run, tmp_path, capsys):
    _, folder, results = run
    assert main(["export", str(folder), str(tmp_path / "merged")]) == 0
    policy = results["preference"].policy
    found = load_params(tmp_path / "merged", policy.model)
    wanted = jax.jit(merge)(policy.params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert main(["export", str(folder), str(tmp_path / "adapter"), "--adapter"]) == 0
    stored = read_header(tmp_path / "adapter" / "adapter_model.safetensors")
    a = stored["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].array()
    own = policy.params["layers"]["attention"]["q_lora"]["a"][0]
    np.testing.assert_array_equal(a.T, own)
    assert "peft loads them onto" in capsys.readouterr().out


def test_evaluate_compares_it_with_its_own_reference(run, base, tmp_path):
    _, folder, _ = run
    data = str(base / "pairs.jsonl")
    found = evaluate_model(str(folder), data, split="train")
    assert abs(found["log_ratio/chosen"]) > 1e-3
    begun = evaluate_model(str(folder / "sft"), data, split="train", reference=str(folder / "sft"))
    assert found["logprobs/chosen"] - found["log_ratio/chosen"] == pytest.approx(
        begun["logprobs/chosen"], abs=1e-3
    )


def test_a_run_may_begin_from_a_run_with_adapters(run, base, tmp_path):
    """Its adapters are merged into the base of the new ones."""
    _, folder, results = run
    tree = tree_of(base, tmp_path / "next", stages=["sft"], model={"path": str(folder)})
    for section in ("data", "loss", "objective", "solver", "outer", "train", "reference"):
        del tree[section]
    tree["sft"]["steps"] = 1
    policy = train(checked_config(tree), mesh=two())["sft"].policy
    _, frozen = split(policy.params)
    wanted = jax.jit(merge)(results["preference"].policy.params)
    kernel = frozen["layers"]["attention"]["q"]["kernel"]
    np.testing.assert_allclose(kernel, wanted["layers"]["attention"]["q"]["kernel"], atol=1e-6)


def test_another_base_than_that_of_the_adapters_is_refused(run, base, tmp_path):
    tree, folder, _ = run
    shutil.copytree(base / "model", tmp_path / "model")
    model = load_model(base / "model")
    other = jax.tree.map(lambda x: x * 1.01, load_params(base / "model", model))
    save_pretrained(tmp_path / "model", other, model, source=base / "model", overwrite=True)
    moved = tree | {"model": {"path": str(tmp_path / "model")}, "output_dir": str(tmp_path / "r")}
    shutil.copytree(folder, tmp_path / "r")
    with pytest.raises(ValueError, match=r"are not those that the adapters in .*sft were trained"):
        train(checked_config(moved), mesh=two(), resume=True, allow_changes=True)
    with pytest.raises(ValueError, match=r"model.path: .*holds the parameters of the model"):
        train(checked_config(moved), mesh=two(), resume=True)


def test_a_run_of_all_weights_has_no_adapters(run, tmp_path, capsys):
    """As one of an earlier version is, whose config.yaml has no such section."""
    tree, folder, _ = run
    full = tmp_path / "full"
    shutil.copytree(folder, full)
    for stage in ("sft", "preference"):
        (full / stage / "base.json").unlink()
        saved = read_tree(full / stage / "config.yaml")
        (full / stage / "config.yaml").write_text(yaml.safe_dump(saved | {"lora": None}))
    config = checked_config(tree | {"output_dir": str(full)})
    with pytest.raises(ValueError, match=r"lora\.rank: None -> 3 .*--allow-changes"):
        train(config, mesh=two(), resume=True)
    with pytest.raises(ValueError, match=r"sft trains all weights, and lora\.rank is set"):
        train(config, mesh=two(), resume=True, allow_changes=True)
    assert main(["export", str(full), str(tmp_path / "x"), "--adapter"]) == 2
    assert "it has no adapters to export: leave --adapter out" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_does_not_go_with_adapters_is_named(base, tmp_path):
    def said(**sections):
        with pytest.raises(ConfigError) as found:
            checked_config(tree_of(base, tmp_path, **sections))
        return str(found.value)

    assert "dynamics.every with lora" in said(dynamics={"every": 2})
    assert "reference.path with lora" in said(reference={"path": "other"})
    model = {"path": None, "init": ARCHITECTURE, "tokenizer": "builtin:arithmetic"}
    assert "lora with model.init" in said(model=model)
    assert "lora.quantize=nf4 with model.remat=none" in said(
        lora={"quantize": "nf4"}, model={"remat": "none"}
    )
    assert "lora.targets is empty" in said(lora={"targets": []})
    assert "lora.rank=0: expected a whole number from 1" in said(lora={"rank": 0})
    tree = tree_of(base, tmp_path)
    tree["lora"] = {"alpha": 4.0}
    with pytest.raises(ConfigError, match=r"lora would be ignored: lora\.rank is not set"):
        checked_config(tree)
    assert checked_config(tree | {"lora": {"rank": None, "alpha": 4.0}}).lora.rank is None


@pytest.mark.long
def test_a_base_in_four_bits(base, tmp_path):
    """Trained, resumed bit for bit, exported: what was read is what was quantized before."""
    hf = ARCHITECTURE | {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
    arithmetic.write_tokenizer(tmp_path / "model")
    hf |= {"vocab_size": len(load_tokenizer(tmp_path / "model"))}
    model = init_model(hf)
    params = model.init(jax.random.key(0))
    save_pretrained(tmp_path / "model", params, model, source=hf, overwrite=True)
    arithmetic.write_tokenizer(tmp_path / "model")
    tree = tree_of(
        base, tmp_path / "run", model={"path": str(tmp_path / "model")}, stages=["preference"],
        lora={"quantize": "nf4"},
    )  # fmt: skip
    for section in ("sft", "sft_data", "sft_optimizer"):
        del tree[section]
    policy = train(checked_config(tree), mesh=two())["preference"].policy
    stored = policy.params["layers"]["attention"]["k"]
    assert stored["codes"].dtype == jnp.uint8
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    train(checked_config(tree | {"output_dir": str(tmp_path / "again")}), mesh=two(), resume=True)
    assert same(state_of(tmp_path / "again", 4)[0], state_of(tmp_path / "run", 4)[0])
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    found = load_params(tmp_path / "merged", model)["layers"]["attention"]
    np.testing.assert_allclose(found["k"]["kernel"], dequantize(stored), atol=1e-6)  # no target
    q = found["q"]["kernel"] - dequantize(policy.params["layers"]["attention"]["q"])
    assert np.linalg.matrix_rank(np.asarray(q[0]), tol=1e-5) == 3


@pytest.mark.long
def test_dropout_goes_on_where_it_was(base, tmp_path):
    """It draws by the key that the checkpoint holds: 2 + 2 updates are 4, bit for bit."""
    tree = tree_of(base, tmp_path / "run", stages=["preference"], lora={"dropout": 0.2})
    for section in ("sft", "sft_data", "sft_optimizer"):
        del tree[section]
    train(checked_config(tree), mesh=two())
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    train(checked_config(tree | {"output_dir": str(tmp_path / "again")}), mesh=two(), resume=True)
    assert same(state_of(tmp_path / "again", 4)[0], state_of(tmp_path / "run", 4)[0])
    plain = tree | {"output_dir": str(tmp_path / "plain"), "lora": tree["lora"] | {"dropout": 0.0}}
    train(checked_config(plain), mesh=two())
    assert not same(state_of(tmp_path / "plain", 4)[0], state_of(tmp_path / "run", 4)[0])

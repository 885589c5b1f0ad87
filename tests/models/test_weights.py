"""Weights in and out: round trips, shards, devices, and every tensor that does not fit."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spo_jax.models import (
    Execution,
    WeightsError,
    load_hf_config,
    load_model,
    load_params,
    resolve_model_folder,
    save_pretrained,
)
from spo_jax.models.tensor_files import read_header, read_index, write_file
from tests.models.tiny_models import HF_CONFIGS, weights, write_folder


@pytest.fixture(
    params=[
        *("llama_tied", "qwen3", "smollm3", "olmo2", "phi3", "gemma2", "gemma3"),
        *("qwen3_moe", "mixtral"),
    ]
)
def folder(request, tmp_path):
    return write_folder(tmp_path / "source", HF_CONFIGS[request.param])


def assert_equal_trees(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def rewrite(folder, tensors):
    shapes = {name: array.shape for name, array in tensors.items()}
    write_file(folder / "model.safetensors", shapes, np.float32, tensors.values())


def test_parameters_are_the_stored_tensors(folder):
    model = load_model(folder)
    params = load_params(folder, model)
    stored = weights(load_hf_config(folder))
    for layer in range(3):
        attention = f"model.layers.{layer}.self_attn"
        expected = stored.get(f"{attention}.k_proj.weight")
        if expected is None:  # between four heads of queries and two of values
            expected = stored[f"{attention}.qkv_proj.weight"][4 * 8 : 6 * 8]
        expected = expected.T
        np.testing.assert_array_equal(params["layers"]["attention"]["k"]["kernel"][layer], expected)
    np.testing.assert_array_equal(params["embed"], stored["model.embed_tokens.weight"])
    assert ("head" in params) == ("lm_head.weight" in stored)


@pytest.mark.wide
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_bit_equal_also_in_shards(dtype, folder, tmp_path):
    write_folder(folder, load_hf_config(folder), dtype)
    model = load_model(folder, Execution(param_dtype=dtype))
    params = load_params(folder, model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    save_pretrained(tmp_path / "out", params, model, source=folder, max_shard_bytes=3000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert_equal_trees(params, load_params(tmp_path / "out", model))
    original, written = read_index(folder), read_index(tmp_path / "out")
    assert original.keys() == written.keys() == index["weight_map"].keys()
    for name, tensor in original.items():
        assert tensor.array().tobytes() == written[name].array().tobytes()


@pytest.mark.wide
def test_transformers_loads_the_export(folder, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    model = load_model(folder)
    save_pretrained(
        tmp_path / "out", load_params(folder, model), model, source=folder, dtype="bfloat16"
    )
    theirs, expected = (
        transformers.AutoModelForCausalLM.from_pretrained(path, **dtype).state_dict()
        for path, dtype in ((tmp_path / "out", {}), (folder, {"dtype": torch.bfloat16}))
    )
    assert theirs["model.norm.weight"].dtype == torch.bfloat16
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in theirs.items())
    stored = weights(load_hf_config(folder))
    for name in stored.keys() & theirs.keys():  # experts are stacked as they are read
        assert torch.equal(theirs[name], torch.tensor(stored[name]).to(torch.bfloat16)), name


@pytest.mark.eight_devices
def test_pieces_land_on_eight_devices(folder):
    model = load_model(folder)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))

    def rule(leaf):
        axes = (*(None,) * (leaf.ndim - 2), "data", "model")[-leaf.ndim :]
        axes = (None,) if leaf.ndim == 1 else axes
        fits = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, leaf.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*fits))

    shardings = jax.tree.map(rule, model.abstract_params())
    params = load_params(folder, model, shardings)
    assert_equal_trees(params, load_params(folder, model))
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
    assert params["embed"].addressable_shards[0].data.shape == (10, model.config.hidden_size // 2)


def test_an_export_in_another_dtype_says_so_once(folder, tmp_path):
    both = load_hf_config(folder) | {"dtype": "float32", "torch_dtype": "float32"}
    write_folder(folder, both)
    model = load_model(folder)
    save_pretrained(
        tmp_path / "out", load_params(folder, model), model, source=folder, dtype="bfloat16"
    )
    written = load_hf_config(tmp_path / "out")
    assert (written["dtype"], written["torch_dtype"]) == ("bfloat16", "bfloat16")
    load_model(tmp_path / "out")


@pytest.mark.wide
def test_export_gathers_from_devices_and_carries_files(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text("{}")
    (folder / "optimizer.bin").write_text("not part of a model")
    model = load_model(folder)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    layered = NamedSharding(mesh, PartitionSpec(None, "data"))
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(
        lambda leaf: layered if leaf.ndim == 3 and leaf.shape[1] % 4 == 0 else whole,
        model.abstract_params(),
    )
    params = load_params(folder, model, shardings)
    save_pretrained(tmp_path / "out", params, model, source=folder)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert_equal_trees(load_params(tmp_path / "out", model), load_params(folder, model))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_pretrained(tmp_path / "out", params, model, source=folder)
    save_pretrained(tmp_path / "out", params, model, source=folder, overwrite=True)
    assert {file.name for file in tmp_path.iterdir()} == {"source", "out"}


def test_interrupted_export_leaves_nothing(folder, tmp_path, monkeypatch):
    model = load_model(folder)
    params = load_params(folder, model)
    monkeypatch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(tmp_path / "out", params, model, source=folder)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_all_tensors_that_do_not_fit_are_named_together(tmp_path):
    folder = write_folder(tmp_path, HF_CONFIGS["llama_tied"])
    tensors = weights(HF_CONFIGS["llama_tied"])
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.norm.weight"] = np.zeros(17, np.float32)
    tensors["model.layers.3.surprise"] = np.zeros((2, 2), np.float32)
    # These two are no mistake: a buffer old versions stored, and the tied head.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    rewrite(folder, tensors)
    with pytest.raises(WeightsError) as error:
        load_params(folder, load_model(folder))
    message = str(error.value)
    assert "3 tensors" in message
    assert "missing model.layers.1.mlp.up_proj.weight: expected (24, 16)" in message
    assert "unused model.layers.3.surprise: found (2, 2)" in message
    assert "misshapen model.norm.weight: expected (16,), found (17,)" in message
    assert "inv_freq" not in message
    assert "lm_head" not in message


def test_a_tied_head_that_differs_is_refused(tmp_path):
    folder = write_folder(tmp_path, HF_CONFIGS["llama_tied"])
    tensors = weights(HF_CONFIGS["llama_tied"])
    head = tensors["model.embed_tokens.weight"].copy()
    rewrite(folder, tensors | {"lm_head.weight": head})
    load_params(folder, load_model(folder))
    head[-1, -1] += 1
    for wrong in (head, head[:-1]):
        rewrite(folder, tensors | {"lm_head.weight": wrong})
        with pytest.raises(WeightsError, match="set tie_word_embeddings to false"):
            load_params(folder, load_model(folder))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_that_are_not_finite_are_named(dtype, value, tmp_path):
    folder = write_folder(tmp_path, HF_CONFIGS["llama_tied"])
    model = load_model(folder, Execution(param_dtype=dtype))
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        tensors = weights(HF_CONFIGS["llama_tied"])
        tensors[name].flat[-1] = value
        shapes = {key: array.shape for key, array in tensors.items()}
        write_file(folder / "model.safetensors", shapes, jnp.dtype(dtype), tensors.values())
        with pytest.raises(ValueError, match=rf"{name} holds (nan|-?inf)"):
            load_params(folder, model)


def test_values_beyond_the_dtype_are_named(tmp_path):
    folder = write_folder(tmp_path / "source", HF_CONFIGS["llama_tied"])
    tensors = weights(HF_CONFIGS["llama_tied"])
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = -70_000
    rewrite(folder, tensors)
    model = load_model(folder, Execution(param_dtype="float16"))
    message = r"down_proj\.weight holds -70000, beyond the largest float16 \(65504\)"
    with pytest.raises(ValueError, match=message):
        load_params(folder, model)
    whole = load_model(folder)
    params = load_params(folder, whole)
    with pytest.raises(ValueError, match=r"beyond the largest float16.*dtype=float16"):
        save_pretrained(tmp_path / "out", params, whole, source=folder, dtype="float16")
    assert not (tmp_path / "out").exists()
    load_params(folder, load_model(folder, Execution(param_dtype="bfloat16")))
    half = load_model(folder, Execution(param_dtype="bfloat16", compute_dtype="float16"))
    with pytest.raises(ValueError, match=r"holds -70\d+, .* compute_dtype=float16 does not do"):
        load_params(folder, half)


def in_shards(folder):
    """The folder's tensors in two files with an index; gives that index."""
    model = load_model(folder)
    target = folder.with_name("shards")
    save_pretrained(target, load_params(folder, model), model, source=folder, max_shard_bytes=8000)
    index = target / "model.safetensors.index.json"
    return target, index, json.loads(index.read_text())


def test_an_index_and_its_files_name_the_same_tensors(tmp_path):
    whole = write_folder(tmp_path / "source", HF_CONFIGS["llama_tied"])
    folder, file, index = in_shards(whole)
    places = index["weight_map"]
    first, last = next(iter(places)), list(places)[-1]
    assert places[first] != places[last]
    spoiled = [
        ({**places, first: places[last]}, f"{first} not in {places[last]}"),
        ({**places, "surprise": places[last]}, f"surprise not in {places[last]}"),
        ({k: v for k, v in places.items() if k != first}, f"{first} in .*not in the index"),
        ({**places, first: "../model.safetensors"}, "expected files beside it"),
        ({**places, first: 3}, "expected a weight_map"),
        ([*places], "expected a weight_map"),
    ]
    for weight_map, message in spoiled:
        file.write_text(json.dumps(index | {"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            read_index(folder)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json cannot be read as JSON"):
        read_index(folder)


def test_two_sets_of_weights_are_refused(tmp_path):
    whole = write_folder(tmp_path / "source", HF_CONFIGS["llama_tied"])
    folder, file, index = in_shards(whole)
    shutil.copy(whole / "model.safetensors", folder)
    with pytest.raises(ValueError, match="two sets of weights"):
        read_index(folder)
    file.write_text(
        json.dumps({"weight_map": dict.fromkeys(index["weight_map"], "model.safetensors")})
    )
    assert read_index(folder).keys() == read_index(whole).keys()


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder, _, index = in_shards(write_folder(tmp_path / "source", HF_CONFIGS["llama_tied"]))
    one, other = sorted(set(index["weight_map"].values()))[:2]
    shutil.copy(folder / one, folder / other)
    with pytest.raises(ValueError, match=f"in {one} and {other}"):
        read_index(folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "does not fill"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "begins at byte"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "describes"),
        (b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}', "cannot be"),
        (b'{"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}', "is not dtype"),
        (b'{"a": {"dtype": 4, "shape": [2], "data_offsets": [0, 8]}}', "cannot be"),
        (b'{"a": 3}', "is not dtype"),
        (b'{"a": {"x": 1}, "a": {"x": 2}}', "'a' stands twice"),
        (b"[]", "no JSON object"),
        (b"\xff", "utf-8"),
    ],
)
def test_a_header_that_cannot_be_is_refused(header, message, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=f"not a complete safetensors file.*{message}"):
        read_header(file)


def test_folders_that_hold_no_model_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.* does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_model(tmp_path)
    folder = write_folder(tmp_path / "model", HF_CONFIGS["llama_tied"])
    model = load_model(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_params(folder, model)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        load_params(folder, model)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load_params(folder, model)
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.safetensors"):
        load_params(folder, model)


def test_model_folder_is_found_or_explained(tmp_path):
    assert resolve_model_folder(str(tmp_path)) == tmp_path
    with pytest.raises(FileNotFoundError, match="not a hub name"):
        resolve_model_folder(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"'nobody/nothing' does not exist.*hub"):
        resolve_model_folder("nobody/nothing")


def test_files_are_those_of_the_safetensors_package(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(0, np.float32)}
    write_file(
        tmp_path / "ours", {k: v.shape for k, v in arrays.items()}, np.float32, arrays.values()
    )
    safetensors.save_file(arrays, tmp_path / "theirs")
    read = safetensors.load_file(tmp_path / "ours")
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        stored = read_header(tmp_path / "theirs")[name].array()
        np.testing.assert_array_equal(stored, array)

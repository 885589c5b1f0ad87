"""Parameters from the devices into a folder that ``transformers`` loads."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.models.architecture import DTYPES
from spo_jax.models.decoder import Model
from spo_jax.models.families import HFConfig, family_of
from spo_jax.models.folders import files_to_carry, load_hf_config
from spo_jax.models.hf_configs import decoder_config_from_hf
from spo_jax.models.names import StoredAs, stored_tensors
from spo_jax.models.tensor_files import check_values, write_file
from spo_jax.types import Params


def save_pretrained(
    folder: str | os.PathLike,
    params: Params,
    model: Model,
    *,
    source: str | os.PathLike | HFConfig,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    card: str | None = None,
) -> None:
    """Write a folder that ``transformers`` loads: weights, ``config.json``, tokenizer.

    ``source`` is the folder the model came from, whose configuration and tokenizer files
    are carried along, or the content of a ``config.json``. ``dtype=None`` keeps the
    model's ``param_dtype``. Tensors are gathered one at a time; in a multi-host run every
    host must call this, and the first one writes. The folder appears whole or not at all;
    an existing, non-empty one is an error unless ``overwrite``. ``card`` becomes its README.md.
    """
    folder = Path(folder)
    dtype = dtype or model.execution.param_dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} is not empty: choose another, or pass overwrite=True")
    source_folder = None if isinstance(source, Mapping) else Path(source)
    hf_config = dict(source) if source_folder is None else load_hf_config(source_folder)
    if decoder_config_from_hf(hf_config) != model.config:
        raise ValueError(
            "the source's config.json describes another decoder than the model: "
            "pass the folder or configuration the model was built from"
        )
    shards = _cut(stored_tensors(params, family_of(hf_config).names), dtype, max_shard_bytes)
    if jax.process_index() != 0:
        _write_weights(None, params, shards, dtype)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_weights(partial, params, shards, dtype)
        (partial / "config.json").write_text(_config_json(hf_config, dtype))
        if source_folder is not None:
            _carry_files(source_folder, partial)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        # mkdtemp made the folder private; give it the mode an ordinary one would have.
        partial.chmod(0o777 & ~_umask())
        _move_into_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _config_json(hf_config: dict[str, Any], dtype: str) -> str:
    keys = [key for key in ("dtype", "torch_dtype") if key in hf_config] or ["torch_dtype"]
    return json.dumps(hf_config | dict.fromkeys(keys, dtype), indent=2) + "\n"


def _carry_files(source: Path, target: Path) -> None:
    for name in files_to_carry(source):
        if name != "config.json":
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def _move_into_place(partial: Path, folder: Path) -> None:
    if not folder.exists():
        partial.rename(folder)
        return
    replaced = partial.with_name(partial.name + ".replaced")
    folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _cut(tensors: dict[str, StoredAs], dtype: str, max_bytes: int) -> list[dict[str, StoredAs]]:
    """Cut the tensors, ordered by layer, into files of at most ``max_bytes`` (or one tensor)."""
    shards: list[dict[str, StoredAs]] = [{}]
    size = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: _layer(item[1])):
        needed = int(np.prod(tensor.shape)) * jnp.dtype(dtype).itemsize
        if shards[-1] and size + needed > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += needed
    return shards


def _layer(tensor: StoredAs) -> int:
    return tensor.place[0] if tensor.place else -1


def _write_weights(
    folder: Path | None, params: Params, shards: list[dict[str, StoredAs]], dtype: str
) -> None:
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def gather(shard: dict[str, StoredAs]) -> Iterator[np.ndarray]:
        for name, tensor in shard.items():
            parts = [to_host(leaves[path], tensor.place) for path, _ in tensor.parts]
            axis = -1 if tensor.transpose else 0
            array = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)
            with np.errstate(over="ignore", invalid="ignore"):
                stored = np.asarray(array, jnp.dtype(dtype))
            check_values(name, array, stored, "the parameters", f"dtype={dtype}")
            yield stored.T if tensor.transpose else stored

    weight_map = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        shapes = {name: tensor.shape for name, tensor in shard.items()}
        write_file(folder and folder / file, shapes, jnp.dtype(dtype), gather(shard))
        weight_map |= dict.fromkeys(shard, file)
        total += sum(int(np.prod(shape)) for shape in shapes.values())
    if folder and len(shards) > 1:
        total *= jnp.dtype(dtype).itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def to_host(leaf: Any, place: tuple[int, ...]) -> np.ndarray:
    """Gather one layer (and expert) of a parameter; on a multi-host mesh all hosts take part."""
    for index in place:
        leaf = _take(leaf, index)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


@jax.jit
def _take(leaf: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)

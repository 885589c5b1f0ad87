"""Parameters from a Hugging Face model folder straight onto the devices."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.models.architecture import Execution
from spo_jax.models.decoder import Model
from spo_jax.models.families import HFConfig, family_of
from spo_jax.models.folders import load_hf_config
from spo_jax.models.hf_configs import decoder_config_from_hf
from spo_jax.models.names import StoredAs, stored_tensors
from spo_jax.models.tensor_files import StoredTensor, check_values, read_index
from spo_jax.types import Params

_ROWS = 1024


class WeightsError(ValueError):
    """The tensors of a folder do not fit the model; the message lists every one of them."""


def init_model(hf_config: HFConfig, execution: Execution | None = None) -> Model:
    """Build the model a ``config.json`` describes; ``model.init(key)`` draws its parameters."""
    return Model(decoder_config_from_hf(hf_config), execution or Execution())


def load_model(folder: str | os.PathLike, execution: Execution | None = None) -> Model:
    """Build the model that a folder's ``config.json`` describes; reads no weights."""
    return init_model(load_hf_config(folder), execution)


def load_params(folder: str | os.PathLike, model: Model, shardings: Any = None) -> Params:
    """Read the folder's safetensors straight onto the devices, in the model's ``param_dtype``.

    ``shardings`` is a tree of ``jax.sharding.Sharding`` like the parameters (``None``: the
    default device). The host holds one device's piece of one parameter at a time.
    Raises ``WeightsError`` with all missing, unused and misshapen tensors together, and for
    values that are not finite, or not so in that dtype.
    """
    folder = Path(folder)
    names = family_of(load_hf_config(folder)).names
    stored = read_index(folder)
    abstract = model.abstract_params()
    expected = stored_tensors(abstract, names)
    _check_tensors(folder, stored, expected, model)
    if model.config.tie_word_embeddings:
        _check_tied(folder, stored)
    anywhere = shardings is None
    if anywhere:
        shardings = jax.tree.map(lambda _: False, abstract)

    # Of the dtypes to compute in, only this one reaches less far than float32.
    narrow = model.execution.compute_dtype == "float16"
    sources: dict[str, list[tuple[str, np.ndarray]]] = {}
    for theirs, piece in expected.items():
        array, start = stored[theirs].array(), 0
        for ours, length in piece.parts:
            part = array[start : start + length]
            source = (theirs, part.T if piece.transpose else part)
            sources.setdefault(ours, []).append(source)
            start += length

    def place(path: Any, leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
        ours = jax.tree_util.keystr(path, simple=True, separator="/")
        stacked = names[ours].stacked

        def convert(source: tuple[str, np.ndarray], index: tuple[slice, ...]) -> np.ndarray:
            theirs, array = source[0], source[1][index]
            with np.errstate(over="ignore", invalid="ignore"):
                found = np.array(array, leaf.dtype)
                check_values(theirs, array, found, str(folder), f"param_dtype={leaf.dtype}")
                if narrow and leaf.dtype != np.float16:
                    half = np.asarray(found, np.float16)
                    check_values(theirs, array, half, str(folder), "compute_dtype=float16")
            return found

        def read(index: tuple[slice, ...]) -> np.ndarray:
            if not stacked:
                return convert(sources[ours][0], index)
            numbers = np.arange(len(sources[ours])).reshape(leaf.shape[:stacked])[index[:stacked]]
            found = [convert(sources[ours][i], index[stacked:]) for i in numbers.ravel()]
            return np.stack(found).reshape(*numbers.shape, *found[0].shape)

        if anywhere:
            # Not committed to the default device, as nothing is that JAX makes there: a step whose
            # state were so in part would be compiled twice.
            whole = read(tuple(slice(0, size) for size in leaf.shape))
            return jax.block_until_ready(jnp.asarray(whole))
        return _place(leaf, sharding, read)

    return jax.tree_util.tree_map_with_path(place, abstract, shardings)


def _place(leaf: jax.ShapeDtypeStruct, sharding: Any, read: Callable) -> jax.Array:
    """Like ``jax.make_array_from_callback``, which would hold all devices' pieces at once."""
    devices: dict[Any, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        key = tuple(part.indices(size) for part, size in zip(index, leaf.shape, strict=True))
        devices.setdefault(key, []).append(device)
    pieces = []
    for key, same in devices.items():
        piece = read(tuple(slice(*part) for part in key))
        pieces += [jax.device_put(piece, device) for device in same]
        jax.block_until_ready(pieces[-len(same) :])
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, pieces)


def _check_tied(folder: Path, stored: dict[str, StoredTensor]) -> None:
    """A head that is stored beside the embedding it is tied to has to be the same numbers."""
    head = stored.get("lm_head.weight")
    if head is None:
        return
    embed = stored["model.embed_tokens.weight"]
    here, there = head.array(), embed.array()
    same = head.shape == embed.shape and all(
        np.array_equal(np.asarray(here[rows], np.float32), np.asarray(there[rows], np.float32))
        for rows in (slice(start, start + _ROWS) for start in range(0, len(here), _ROWS))
    )
    if not same:
        raise WeightsError(
            f"{folder}: config.json has tie_word_embeddings=true, and lm_head.weight is not "
            "model.embed_tokens.weight: set tie_word_embeddings to false to keep this head, or "
            "remove the tensor to use the embedding"
        )


def _check_tensors(
    folder: Path,
    stored: dict[str, StoredTensor],
    expected: dict[str, StoredAs],
    model: Model,
) -> None:
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    ignorable = re.compile(r"rotary_emb\.inv_freq$")
    missing = [name for name in expected if name not in stored]
    unused = [n for n in stored if n not in expected and n not in tied and not ignorable.search(n)]
    misshapen = [n for n in expected if n in stored and stored[n].shape != expected[n].shape]
    lines = [f"missing {name}: expected {expected[name].shape}" for name in missing]
    lines += [f"unused {name}: found {stored[name].shape}" for name in unused]
    lines += [
        f"misshapen {name}: expected {expected[name].shape}, found {stored[name].shape}"
        for name in misshapen
    ]
    if "lm_head.weight" in missing and len(lines) == 1:
        lines[0] += " (or tie_word_embeddings=true, if the model's head is its embedding)"
    if lines:
        listed = "\n  ".join(lines)
        raise WeightsError(
            f"{folder}: {len(lines)} tensors do not fit its config.json, so check that the two "
            f"belong together:\n  {listed}"
        )

"""Adapters as a folder that the package ``peft`` loads: its two files, by its names."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.models.architecture import DTYPES
from spo_jax.models.lora import LORA, PROJECTIONS, Lora
from spo_jax.models.names import TensorName
from spo_jax.models.saving import to_host
from spo_jax.models.tensor_files import check_values, write_file
from spo_jax.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The two files of such a folder."""


def save_adapters(
    folder: str | os.PathLike,
    adapters: Params,
    lora: Lora,
    *,
    names: Mapping[str, TensorName],
    base: str,
    dtype: str = "float32",
) -> None:
    """Write ``adapters`` into the new folder ``folder``, for the model ``base`` (a path or name).

    ``names`` are those of the base's family. Tensors are gathered one at a time; in a multi-host
    run every host must call this, and the first one writes. The folder appears whole or not at all.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: use one of {', '.join(DTYPES)}")
    leaves = adapter_tensors(adapters, names)

    def gather() -> Iterator[np.ndarray]:
        for name, (leaf, layer) in leaves.items():
            array = to_host(leaf, (layer,))
            with np.errstate(over="ignore", invalid="ignore"):
                stored = np.asarray(array, jnp.dtype(dtype))
            check_values(name, array, stored, "the adapters", f"dtype={dtype}")
            yield stored.T

    shapes = {name: leaf.shape[:0:-1] for name, (leaf, _) in leaves.items()}
    if jax.process_index() != 0:
        write_file(None, shapes, jnp.dtype(dtype), gather())
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write_file(partial / WEIGHTS, shapes, jnp.dtype(dtype), gather())
        settings = adapter_config(lora, base)
        (partial / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def adapter_tensors(
    adapters: Params, names: Mapping[str, TensorName]
) -> dict[str, tuple[jax.Array, int]]:
    """``peft``'s name of each matrix -> our stack of it and its layer; stored it is transposed.

    Raises:
        ValueError: a family with several projections in one matrix, of which ``peft`` would have
            one adapter.
    """
    found = {}
    shared = Counter(name.template for name in names.values())
    for block, ours in PROJECTIONS.values():
        adapter = adapters["layers"].get(block, {}).get(ours + LORA)
        if adapter is None:
            continue
        template = names[f"layers/{block}/{ours}/kernel"].template
        if shared[template] > 1:
            raise ValueError(
                f"{template.split('.')[-2]} of this family is one matrix of {shared[template]} "
                "projections, each with an adapter of its own here, and peft has one for all: "
                "export without --adapter, which merges them"
            )
        template = template.removesuffix(".weight")
        for layer in range(adapter["a"].shape[0]):
            module = f"base_model.model.{template.format(layer=layer)}"
            found[f"{module}.lora_A.weight"] = (adapter["a"], layer)
            found[f"{module}.lora_B.weight"] = (adapter["b"], layer)
    return found


def adapter_config(lora: Lora, base: str) -> dict[str, object]:
    """The content of ``adapter_config.json``."""
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.projections),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }

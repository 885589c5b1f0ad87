"""The adapters of a run: put on the policy it starts from, and read back onto their base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from spo_jax.checkpoints import CheckpointReader, load_reference
from spo_jax.checkpoints.atomic import replace_text, to_json
from spo_jax.checkpoints.checksums import params_fingerprint
from spo_jax.config.parsing import config_from_tree, read_tree
from spo_jax.config.schema import LoraConfig, ModelConfig
from spo_jax.models import Lora, Model, as_base, join, make_adapters, merge
from spo_jax.models.folders import read_object
from spo_jax.parallel.mesh import sharded_shapes, tree_shardings
from spo_jax.parallel.processes import by_first
from spo_jax.types import Params

BASE = "base.json"
"""Inside a stage's folder: the model its adapters lie on, and a fingerprint of its weights."""

ReadBase = Callable[[str, Model], Params]
"""``(path, model) -> parameters``: how the model at ``path`` is read."""


class AdapterRun(NamedTuple):
    """What a run with adapters says of itself."""

    folder: Path
    base: str
    model: ModelConfig
    lora: Lora


def lora_of(config: LoraConfig) -> Lora:
    """The adapters that a section ``lora`` with a rank asks for."""
    alpha = 2.0 * config.rank if config.alpha is None else config.alpha
    return Lora(config.rank, alpha, config.targets, config.quantize, config.dropout)


def adapted(params: Params, config: LoraConfig, mesh: Mesh, *, seed: int) -> Params:
    """``params`` with new adapters beside them, each where it lives; they change nothing yet."""
    lora = lora_of(config)
    key = jax.random.fold_in(jax.random.key(seed), 1)  # 0 draws weights, where there are none
    shapes = jax.eval_shape(lambda: make_adapters(params, lora, key))
    make = jax.jit(
        lambda key: make_adapters(params, lora, key), out_shardings=tree_shardings(shapes, mesh)
    )
    adapters = make(key)
    return join(as_base(params, lora), adapters)


def adapted_shapes(shapes: Params, config: LoraConfig) -> Params:
    """What ``adapted`` makes of parameters of these ``shapes``, as shapes; nothing is computed."""
    lora = lora_of(config)

    def make(params: Params) -> Params:
        adapters = make_adapters(params, lora, jax.random.key(0))
        return join(as_base(params, lora), adapters)

    return jax.eval_shape(make, shapes)


def find_adapters(run: Path) -> AdapterRun | None:
    """What the stage at ``run`` trained, if that were adapters."""
    tree = read_tree(run / "config.yaml")
    if (tree.get("lora") or {}).get("rank") is None:
        return None
    config = config_from_tree({name: tree.get(name) for name in ("model", "lora")})
    return AdapterRun(run, config.model.path, config.model, lora_of(config.lora))


def write_base(folder: Path, path: str, base: Params) -> None:
    """Put down which weights the adapters in ``folder`` are trained on."""
    facts = {"path": path, "fingerprint": params_fingerprint(base)}
    by_first(lambda: replace_text(folder / BASE, to_json(facts, BASE, indent=1) + "\n"))


def check_base(folder: Path, path: str, base: Params) -> None:
    """Raise ``ValueError`` where the adapters in ``folder`` were trained on another ``base``."""
    found = params_fingerprint(base)
    written = by_first(lambda: _facts(folder))
    if written is None:
        raise ValueError(
            f"{folder} trains all weights, and lora.rank is set: set it to null, or start a new "
            "run (model.path may be the folder of this one)"
        )
    if written["fingerprint"] != found:
        raise ValueError(
            f"the weights of {path} are not those that the adapters in {folder} were trained on "
            f"(then at {written['path']}): bring those back, or start a new run"
        )


def _facts(folder: Path) -> dict | None:
    return read_object(folder / BASE) if (folder / BASE).is_file() else None


def read_adapters(run: AdapterRun, base: Params, mesh: Mesh, step: int | None = None) -> Params:
    """The adapters of ``run`` at ``step`` (its newest)."""
    shapes = jax.eval_shape(lambda: make_adapters(base, run.lora, jax.random.key(0)))
    return CheckpointReader(run.folder).restore_params(sharded_shapes(shapes, mesh), step)


def read_reference(run: AdapterRun, base: Params, mesh: Mesh) -> Params:
    """The adapters that ``run`` has as its frozen reference."""
    shapes = jax.eval_shape(lambda: make_adapters(base, run.lora, jax.random.key(0)))
    return load_reference(run.folder, sharded_shapes(shapes, mesh))


def merged_params(
    run: AdapterRun,
    model: Model,
    mesh: Mesh,
    read_base: ReadBase,
    read: Callable[[AdapterRun, Params, Mesh], Params],
) -> Params:
    """The base of ``run`` with the adapters that ``read`` finds, as plain parameters of ``model``.

    The base is read anew, and checked.
    """
    as_trained = dataclasses.replace(model.execution, param_dtype=run.model.param_dtype)
    own = dataclasses.replace(model, execution=as_trained)
    base = as_base(read_base(run.base, own), run.lora)
    check_base(run.folder, run.base, base)
    adapters = read(run, base, mesh)
    dtype = model.execution.param_dtype

    def whole(base, adapters):
        return jax.tree.map(lambda x: x.astype(dtype), merge(join(base, adapters)))

    shardings = tree_shardings(model.abstract_params(), mesh)
    return jax.jit(whole, out_shardings=shardings)(base, adapters)

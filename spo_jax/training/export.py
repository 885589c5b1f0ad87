"""``spo-jax export``: a run's policy as a Hugging Face folder, or its adapters as peft's."""

from __future__ import annotations

from pathlib import Path

from spo_jax.checkpoints import CheckpointReader
from spo_jax.config.parsing import config_from_tree, read_tree
from spo_jax.models import load_hf_config, load_model, save_pretrained
from spo_jax.models.families import family_of
from spo_jax.models.peft import save_adapters
from spo_jax.parallel.mesh import make_mesh
from spo_jax.parallel.stores import check_local
from spo_jax.policies.adapters import find_adapters, read_adapters
from spo_jax.policies.loading import MODEL_FOLDER, execution, find_run, params_of_run
from spo_jax.training.model_card import model_card


def export_run(
    run: str | Path, out: str | Path, *, step: int | None = None, dtype: str | None = None
) -> str:
    """Write the policy of ``run`` to the new folder ``out``; returns what was done, in words.

    Adapters are merged into their base. ``step`` is the newest checkpoint and ``dtype`` that of
    training where not given.

    Raises:
        FileNotFoundError: ``run`` is no run.
        FileExistsError: ``out`` is there already.
    """
    folder = _folder(run, out)
    # The model section alone: a run saved by another version may know other keys.
    config = config_from_tree({"model": read_tree(folder / "config.yaml").get("model")})
    model = load_model(folder / MODEL_FOLDER, execution(config.model))
    step = CheckpointReader(folder).latest_step() if step is None else step
    dtype = dtype or config.model.param_dtype
    params = params_of_run(folder, model, make_mesh(), step)
    card = model_card(folder, name=Path(out).name, step=step, dtype=dtype)
    save_pretrained(out, params, model, source=folder / MODEL_FOLDER, dtype=dtype, card=card)
    return f"{out}: policy of {folder} after {step} updates, {dtype}; transformers loads it"


def export_adapters(
    run: str | Path, out: str | Path, *, step: int | None = None, dtype: str | None = None
) -> str:
    """Write the adapters of ``run`` to the new folder ``out``, as ``peft`` loads them.

    As ``export_run``; ``dtype`` is float32 where not given.

    Raises:
        ValueError: ``run`` trains no adapters.
    """
    folder = _folder(run, out)
    found = find_adapters(folder)
    if found is None:
        raise ValueError(
            f"{folder} trains all weights, it has no adapters to export: leave --adapter out"
        )
    step = CheckpointReader(folder).latest_step() if step is None else step
    dtype = dtype or "float32"
    names = family_of(load_hf_config(folder / MODEL_FOLDER)).names
    model = load_model(folder / MODEL_FOLDER, execution(found.model))
    adapters = read_adapters(found, model.abstract_params(), make_mesh(), step)
    save_adapters(out, adapters, found.lora, names=names, base=found.base, dtype=dtype)
    return (
        f"{out}: adapters of {folder} after {step} updates, {dtype}; peft loads them onto "
        f"{found.base}"
    )


def _folder(run: str | Path, out: str | Path) -> Path:
    """The stage's folder that ``run`` names; ``out`` must not be there."""
    check_local("OUT", out)
    folder = find_run(run)
    if folder is None:
        raise FileNotFoundError(
            f"{run} is not the folder of a run: it has no checkpoints. Name the "
            "output_dir of a spo-jax train or sft"
        )
    if Path(out).exists():
        raise FileExistsError(f"{out} exists already: name a folder to make")
    return folder

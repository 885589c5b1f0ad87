"""``spo-jax export``: a run's policy as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from spo_jax.checkpoints import CheckpointReader
from spo_jax.config.parsing import config_from_tree, read_tree
from spo_jax.models import load_model, save_pretrained
from spo_jax.parallel.mesh import make_mesh, sharded_shapes
from spo_jax.policies.loading import MODEL_FOLDER, execution, find_run
from spo_jax.training.model_card import model_card


def export_run(
    run: str | Path, out: str | Path, *, step: int | None = None, dtype: str | None = None
) -> str:
    """Write the policy of ``run`` to the new folder ``out``; returns what was done, in words.

    ``step`` is the newest checkpoint and ``dtype`` that of training where not given.

    Raises:
        FileNotFoundError: ``run`` is no run.
        FileExistsError: ``out`` is there already.
    """
    folder = find_run(run)
    if folder is None:
        raise FileNotFoundError(
            f"{run} is not the folder of a run: it has no checkpoints. Name the "
            "output_dir of a spo-jax train or sft"
        )
    if Path(out).exists():
        raise FileExistsError(f"{out} exists already: name a folder to make")
    # The model section alone: a run saved by another version may know other keys.
    config = config_from_tree({"model": read_tree(folder / "config.yaml").get("model")})
    model = load_model(folder / MODEL_FOLDER, execution(config.model))
    checkpoints = CheckpointReader(folder)
    step = checkpoints.latest_step() if step is None else step
    like = sharded_shapes(model.abstract_params(), make_mesh())
    dtype = dtype or config.model.param_dtype
    params = checkpoints.restore_params(like, step)
    card = model_card(folder, name=Path(out).name, step=step, dtype=dtype)
    save_pretrained(out, params, model, source=folder / MODEL_FOLDER, dtype=dtype, card=card)
    return f"{out}: policy of {folder} after {step} updates, {dtype}; transformers loads it"

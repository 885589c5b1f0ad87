"""What a plan has to know of a model and its data: a ``config.json``, a number of rows."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from spo_jax.config.mixtures import data_sets
from spo_jax.config.schema import BUILTIN_TASK, Config, DataConfig, PreferenceDataConfig
from spo_jax.data import load_records, load_tokenizer
from spo_jax.data.formats import begin
from spo_jax.data.layouts import LAYOUTS
from spo_jax.models import load_hf_config
from spo_jax.parallel.copies import local_path
from spo_jax.policies.loading import MODEL_FOLDER, find_run
from spo_jax.policies.pair_scores import number_displacing
from spo_jax.tasks import arithmetic

MAX_BYTES = 256 * 2**20
"""Largest file of rows that is read for nothing but their number."""


def find_architecture(config: Config, file: str | Path | None = None) -> dict[str, Any]:
    """The ``config.json`` of the model of ``config``, or the content of ``file``; never weights.

    From ``model.init`` (its vocabulary by the tokenizer's size where it names none), a model
    folder, the folder of a run, or the hub, where this one file is fetched.

    Raises:
        ValueError: a ``file`` that is no ``config.json``.
        FileNotFoundError: no such file, model or network; it says what to give instead.
    """
    if file is not None:
        return _read(Path(file))
    model = config.model
    if model.init is not None:
        if "vocab_size" in model.init:
            return dict(model.init)
        return {"vocab_size": _vocabulary(model.tokenizer), **model.init}
    run = find_run(model.path)
    folder = run / MODEL_FOLDER if run else local_path(model.path).expanduser()
    if folder.is_dir():
        return load_hf_config(folder)
    return _from_hub(model.path)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"--architecture {file}: there is no such file")
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"--architecture {file} is not JSON: {error}") from None
    if not isinstance(found, dict) or "model_type" not in found:
        raise ValueError(f"--architecture {file} is no model's config.json: it has no model_type")
    return found


def _vocabulary(tokenizer: str) -> int:
    if tokenizer != BUILTIN_TASK:
        return len(load_tokenizer(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        arithmetic.write_tokenizer(Path(folder))
        return len(load_tokenizer(folder))


def _from_hub(name: str) -> dict[str, Any]:
    mend = "give the model's shape with --architecture config.json: weights are not needed"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise FileNotFoundError(f"model.path={name} does not exist: check it, or {mend}")
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(name, "config.json")
    except Exception as cause:  # the hub client fails in many ways; all mean the same here
        brief = str(cause).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"model.path={name} is no folder here, and the Hugging Face hub gave no config.json "
            f"of that name ({brief}): {mend}"
        ) from cause
    return json.loads(Path(file).read_text())


def count_rows(data: DataConfig, kind: str = "preference") -> int | None:
    """Rows of a local file that train, bad ones included; ``None`` if not cheap to know.

    Of ``kind`` ``unpaired`` each pair of a file of pairs is two. Of a mixture those of an epoch.
    """
    if data.mix:
        counts = [count_rows(own, kind) for _, _, own in data_sets(data)]
        if None in counts:
            return None
        weighed = zip(counts, data.mix, strict=True)
        return sum(max(1, round(part.weight * count)) for count, part in weighed)
    path = local_path(data.train or "").expanduser()
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        return None
    count = sum(1 for _ in load_records(path))
    if data.max_rows is not None:
        count = min(count, data.max_rows)
    if kind == "unpaired":
        layout, _ = begin(
            load_records(path), kind=kind, columns=data.columns, ignore_columns=data.ignore_columns
        )
        count *= 2 if layout in LAYOUTS["preference"] else 1
    count = count if data.eval is not None else round(count * (1 - data.eval_fraction))
    if isinstance(data, PreferenceDataConfig) and data.drop_displacing is not None:
        count -= number_displacing(data.drop_displacing, count)
    return count

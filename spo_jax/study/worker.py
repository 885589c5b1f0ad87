"""One cell of a study: run it, keep its result beside it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spo_jax.checkpoints import REFERENCE, STEPS
from spo_jax.checkpoints.atomic import replace_text, to_json, without_nan
from spo_jax.sampling.builtin import PAIRS_FILE
from spo_jax.study.grid import (
    START_ROW,
    Cell,
    StudyConfig,
    has_sft,
    pair_options,
    pairs_config,
    resolved,
    run_cells,
)

RESULT_FILE = "result.json"
LOG_FILE = "log.txt"


class CellFailed(RuntimeError):
    """A run of the grid did not get to its end; the text says why and where its log is."""


def set_up(cores: tuple[int, ...] | None, compiled: Path) -> None:
    """Before JAX starts: this process' processor cores, and where compiled programs are shared.

    ``JAX_COMPILATION_CACHE_DIR`` wins over ``compiled``: several studies may share one.
    """
    if cores is not None:
        os.sched_setaffinity(0, cores)
    _end_with_the_parent()
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _end_with_the_parent() -> None:
    """On Linux: be told to save and stop when the process that started this one is gone."""
    if multiprocessing.parent_process() is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def run_cell(study: StudyConfig, cell: Cell) -> dict[str, Any]:
    """Train, evaluate and grade one cell, from its newest checkpoint where there is one.

    Everything said on the way goes to its ``log.txt``. Returns what ``result.json`` keeps.

    Raises:
        CellFailed: with the last line of the error.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    log = cell.folder / LOG_FILE
    started = time.perf_counter()
    failed = ""
    try:
        with _output_to(log):
            try:
                metrics = _start(study, cell) if cell.row == START_ROW else _pairs(cell)
            except BaseException:
                traceback.print_exc()
                raise
    except Exception as error:
        failed = f"{cell.name}: {_in_words(error, study.jobs)} (the whole of it: {log})"
    gc.collect()  # arrays in circles of references: the next run needs the device's memory
    if failed:  # not from within: the error's frames would keep its arrays alive
        raise CellFailed(failed)
    _, broken = without_nan(metrics)
    if broken:
        raise CellFailed(
            f"{cell.name}: {', '.join(broken)} is no number (NaN or infinite): look at {log}, and "
            f"at the run in {cell.folder}"
        )
    result = {
        "config": resolved(cell),
        "metrics": metrics,
        "seconds": round(time.perf_counter() - started, 1),
    }
    path = cell.folder / RESULT_FILE
    replace_text(path, to_json(result, str(path), indent=1) + "\n")
    if not study.keep_weights and cell.row != START_ROW:
        for weights in (STEPS, REFERENCE):
            shutil.rmtree(cell.folder / weights, ignore_errors=True)
    return result


_DEVICE_IS_FULL = ("RESOURCE_EXHAUSTED", "out of memory", "unable to initialize backend")


def _in_words(error: Exception, jobs: int) -> str:
    """The first line of an error; of a device without memory also what to do."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    if not any(sign.lower() in str(error).lower() for sign in _DEVICE_IS_FULL):
        return said[0]
    mend = (
        f"fewer --jobs (now {jobs})"
        if jobs > 1
        else "a smaller batch_size or more gradient_accumulation"
    )
    return (
        f"{said[0]} The device seems to have too little memory for this run and what else is on "
        f"it: take {mend}, and see that no other process holds it. The same command takes the "
        "run up again"
    )


def _start(study: StudyConfig, cell: Cell) -> dict[str, float]:
    """The SFT stage, the pairs its policy gives, and its own held-out metrics."""
    import jax

    from spo_jax.config.validation import checked_config
    from spo_jax.sampling.builtin import builtin_data
    from spo_jax.sampling.make_pairs import make_pairs
    from spo_jax.training.run import judge_start, train

    config, metrics = checked_config(cell.tree), {}
    if has_sft(study):
        finished = train(config, resume=True)["sft"]
        metrics |= finished.metrics
        pairs = pairs_config(study, cell)
        if pairs is not None:
            builtin_data(pairs, "data", finished.policy, cell.folder, resume=True)
    if study.pairs and not (cell.folder / PAIRS_FILE).exists():
        rows, settings = pair_options(study.pairs, cell.seed)
        model = str(cell.folder) if has_sft(study) else config.model.path
        make_pairs(model, rows.pop("data"), cell.folder / PAIRS_FILE, settings, **rows)
    own = [c for c in run_cells(study) if (c.start, c.seed) == (cell.start, cell.seed)]
    if own:
        judged = {**own[0].tree, "output_dir": str(cell.folder / "judged")}
        found = judge_start(checked_config(judged), resume=True)
        # Rewards are of no loss here, and against itself the start has none.
        metrics |= {k: v for k, v in found.items() if not k.startswith("rewards/") and k != "loss"}
        answers = cell.folder / "judged" / "answers.jsonl"
        if answers.exists():
            answers.replace(cell.folder / "answers.jsonl")
    jax.clear_caches()
    return metrics


def _pairs(cell: Cell) -> dict[str, float]:
    import jax

    from spo_jax.config.validation import checked_config
    from spo_jax.training.run import train

    found = train(checked_config(cell.tree), resume=True)["preference"].metrics
    jax.clear_caches()
    return found


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send this process' standard output and error, libraries' too, to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with path.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, number)
                os.close(saved)

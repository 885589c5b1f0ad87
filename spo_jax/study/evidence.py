"""The results that lie in a study's folder, as the records that its tables are made of."""

from __future__ import annotations

import json
import platform
import time

from spo_jax.config.parsing import config_from_tree
from spo_jax.evaluation.answers import ANSWERS_FILE
from spo_jax.parallel.software import processor, versions
from spo_jax.study.grid import START_ROW, Cell, StudyConfig, run_cells, start_cells
from spo_jax.study.records import Record, Study
from spo_jax.study.runner import read_result
from spo_jax.study.worker import RESULT_FILE
from spo_jax.tasks import TASKS


def read_evidence(study: StudyConfig, *, command: str) -> Study:
    """Everything that is finished; ``command`` is what makes it, for the page."""
    cells = [*start_cells(study), *run_cells(study)]
    records, times, seconds = [], [], 0.0
    for cell in cells:
        result = read_result(cell)
        if result is None:
            continue
        times.append((cell.folder / RESULT_FILE).stat().st_mtime)
        seconds += result["seconds"]
        records.append(
            Record(
                row=cell.row,
                start=cell.start,
                loss=cell.loss,
                variant=cell.variant,
                point=dict(cell.point),
                seed=cell.seed,
                metrics=result["metrics"],
                right=_verdicts(cell),
                folder=cell.folder,
            )
        )
    return Study(
        title=study.title,
        baseline=study.baseline,
        rows=tuple(dict.fromkeys(cell.row for cell in cells)),
        records=tuple(records),
        command=command,
        facts=_facts(study, times, seconds),
        start_row=START_ROW,
        starts=tuple(study.starts),
        seeds=study.seeds,
    )


def _verdicts(cell: Cell) -> tuple[bool, ...] | None:
    path = cell.folder / ANSWERS_FILE
    if not path.is_file():
        return None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    task = config_from_tree({"answers": cell.tree.get("answers")}).answers.task or "arithmetic"
    main = next(iter(TASKS[task].graders))
    return tuple(bool(line[main]) for line in lines)


def _facts(study: StudyConfig, times: list[float], seconds: float) -> dict[str, str]:
    config = config_from_tree(study.run)
    loops = {"SFT": config.sft, "preference": config.train}
    lengths = [
        f"{name} {loop.steps or loop.epochs} {'updates' if loop.steps else 'epochs'} of "
        f"{loop.batch_size} rows"
        for name, loop in loops.items()
        if name != "SFT" or "sft" in study.run
    ]
    facts = {
        "page made on": processor(),  # the runs may be of another machine
        "versions there": f"Python {platform.python_version()}, "
        + ", ".join(f"{k} {v}" for k, v in versions(("jax", "flax", "optax")).items()),
        "seeds": ", ".join(map(str, study.seeds)),
        "graded on": f"{config.answers.split} problems",
        "training": "; ".join(lengths),
        "processes at once": str(study.jobs),
    }
    if times:
        day = "%Y-%m-%d %H:%M"
        facts["results from"] = " to ".join(
            dict.fromkeys(
                time.strftime(day, time.gmtime(t)) + " UTC" for t in (min(times), max(times))
            )
        )
        facts["time of all runs together"] = f"{seconds / 60:.0f} min"
    return facts

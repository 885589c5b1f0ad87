"""The built-in task in a run: its rows as files like any other data, and its final exam."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo_jax.config import Config, DataConfig
from spo_jax.evaluate import complete
from spo_jax.prepare import Policy, say, task_problems
from spo_jax.tasks import arithmetic

PAIRS_FILE = "pairs.jsonl"
"""Inside a run: the pairs sampled for it."""


def builtin_data(
    config: Config, section: str, policy: Policy, root: Path, *, resume: bool
) -> DataConfig:
    """Write the task's rows into the run ``root``; the section that reads them.

    Pairs are sampled from ``policy``; those of the run that is resumed stay.
    """
    task, seed = config.task, config.seed
    sft, preference, test = task_problems(task, seed)
    data = getattr(config, section)
    if section == "sft_data":
        path, heldout = root / "sft.jsonl", root / "test.jsonl"
        for file, problems in ((path, sft), (heldout, test)):
            arithmetic.write_rows(file, [p._asdict() for p in problems])
        return dataclasses.replace(data, train=str(path), eval=str(heldout))
    path = root / PAIRS_FILE
    if not (resume and path.exists()):
        say(f"sampling {task.samples} solutions of each of {len(preference)} problems")
        samples = [
            complete(
                policy.model,
                policy.params,
                policy.tokenizer,
                [p.prompt for p in preference],
                max_new_tokens=len(preference[0].completion) + 8,
                temperature=task.temperature,
                seed=seed + i,
            )
            for i in range(task.samples)
        ]
        texts = [[completion.text for completion in some] for some in samples]
        pairs = arithmetic.make_pairs(preference, list(zip(*texts, strict=True)))
        arithmetic.write_rows(path, pairs)
    fraction = data.eval_fraction or 0.1
    return dataclasses.replace(data, train=str(path), eval_fraction=fraction)


def task_table(config: Config, root: Path, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Exact answers of each stage on the task's test problems, with held-out metrics.

    ``results`` are the ``StageResult`` of stages; the table is kept as ``results.json``.
    """
    _, _, test = task_problems(config.task, config.seed)
    table = []
    for stage, result in results.items():
        found = complete(
            result.policy.model,
            result.policy.params,
            result.policy.tokenizer,
            [p.prompt for p in test],
            max_new_tokens=len(test[0].completion) + 8,
        )
        texts = [completion.text for completion in found]
        right = [arithmetic.is_correct(p.prompt, t) for p, t in zip(test, texts, strict=True)]
        formed = [arithmetic.is_well_formed(t) for t in texts]
        keys = ("log_ratio/chosen", "log_ratio/rejected", "rewards/margins", "rewards/accuracies")
        table.append(
            {
                "stage": stage,
                "accuracy": sum(right) / len(right),
                "unanswered": 1 - sum(formed) / len(formed),
                "problems": len(right),
                **{k: result.metrics[k] for k in keys if k in result.metrics},
            }
        )
    (root / "results.json").write_text(json.dumps(table, indent=2) + "\n")
    return table

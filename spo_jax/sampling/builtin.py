"""The built-in task in a run: its rows as files like any other data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from spo_jax.checkpoints.atomic import write_rows
from spo_jax.config.schema import Config, DataConfig
from spo_jax.parallel.processes import by_first, say
from spo_jax.policies.loading import Policy
from spo_jax.policies.rows import task_problems
from spo_jax.sampling.make_pairs import PairSettings, Problem, right_path, summary, write_pairs

PAIRS_FILE = "pairs.jsonl"
"""Inside a run: the pairs sampled for it."""


def builtin_data(
    config: Config, section: str, policy: Policy, root: Path, *, resume: bool
) -> DataConfig:
    """Write the task's rows into the run ``root``; the section that reads them.

    Pairs are sampled from ``policy``; those of the run that is resumed stay.
    """
    if section == "sft_data":
        return builtin_sft(config, root)
    task, seed = config.task, config.seed
    preference = task_problems(task, seed).preference
    path = root / PAIRS_FILE

    def is_missing() -> bool:
        if not resume:
            # What a stopped attempt left too.
            for old in (*root.glob(f"{PAIRS_FILE}*"), right_path(path)):
                old.unlink(missing_ok=True)
        return not path.exists()

    if by_first(is_missing):
        settings = PairSettings(
            "arithmetic",
            samples=task.samples,
            temperature=task.temperature,
            seed=seed,
            chosen=task.chosen,
            max_new_tokens=len(preference[0].completion) + 8,
            keep_right=True,
        )
        problems = [Problem(*problem, row=i) for i, problem in enumerate(preference)]
        counts = write_pairs(policy, problems, path, settings, model=str(root))
        say(f"{path}: {summary(counts)}")
    return sampled_data(config, root)


def builtin_sft(config: Config, root: Path) -> DataConfig:
    """Write the task's SFT rows into ``root``; the section that reads them."""
    sft, _, test, _ = task_problems(config.task, config.seed)
    path, heldout = root / "sft.jsonl", root / "test.jsonl"

    def write() -> None:
        for file, problems in ((path, sft), (heldout, test)):
            write_rows(file, [p._asdict() for p in problems])

    by_first(write)
    return dataclasses.replace(config.sft_data, train=str(path), eval=str(heldout))


def sampled_data(config: Config, root: Path) -> DataConfig:
    """The section that reads the pairs which were sampled into ``root``."""
    fraction = config.data.eval_fraction or 0.1
    return dataclasses.replace(config.data, train=str(root / PAIRS_FILE), eval_fraction=fraction)

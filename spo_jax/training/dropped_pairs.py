"""Pairs left out because they would displace most, chosen once a run and kept in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spo_jax.checkpoints.atomic import replace_text, to_json
from spo_jax.config.schema import Config
from spo_jax.parallel.copies import local_path
from spo_jax.parallel.processes import by_first, say
from spo_jax.policies.loading import Policy, is_run
from spo_jax.policies.pair_scores import most_displacing, number_displacing, score_pairs
from spo_jax.policies.rows import Rows
from spo_jax.training.resuming import stage_folder

DROPPED_FILE = "dropped_pairs.json"
"""Inside a run: which pairs ``data.drop_displacing`` left out, with their scores."""


def without_displacing(config: Config, policy: Policy, rows: Rows, *, resume: bool) -> Rows:
    """``rows`` without the top ``data.drop_displacing`` of the training pairs by CHES.

    The length-normalised score under ``policy``, that from which the stages of pairs start. A run
    that goes on leaves out what it left out when it began, as long as share and rows are the same:
    another number of devices may round scores otherwise. Held-out pairs are not touched.

    Raises:
        ValueError: the share is less than a pair, or no policy is there to score with.
    """
    path, share = local_path(config.output_dir) / DROPPED_FILE, config.data.drop_displacing
    facts = {"share": share, "pairs": len(rows.train), "rows": rows.train.fingerprint()}
    found = by_first(lambda: _kept(config, path, facts) if resume else None)
    news = "as when the run began"
    if found is None:
        found, news = _choose(config, policy, rows, facts), "under the policy it starts from"
        by_first(lambda: replace_text(path, to_json(found, str(path), indent=1) + "\n"))
    dropped = found["dropped"]
    say(
        f"data: {len(dropped)} of {len(rows.train)} training pairs dropped, of length-normalised "
        f"CHES {found['threshold']:.6g} and above, {news} ({path})"
    )
    kept = np.ones(len(rows.train), bool)
    kept[[pair["row"] for pair in dropped]] = False
    return rows._replace(train=rows.train.take(kept))


def _kept(config: Config, path: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """What the run in the folder left out, if it is begun and of the same rows and share."""
    folders = [stage_folder(config, name) for name in config.stages if name != "sft"]
    if not path.is_file() or not any(map(is_run, folders)):
        return None
    found = json.loads(path.read_text())
    return found if facts.items() <= found.items() else None


def _choose(config: Config, policy: Policy, rows: Rows, facts: dict[str, Any]) -> dict[str, Any]:
    share, pairs = facts["share"], facts["pairs"]
    count = number_displacing(share, pairs)
    if count == 0:
        raise ValueError(
            f"data.drop_displacing={share} of {pairs} training pairs is less than one: set at "
            f"least {1 / pairs:.2g}, or leave it out"
        )
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(policy.params)):
        raise ValueError(
            f"{local_path(config.output_dir) / DROPPED_FILE} is of other pairs or another share "
            f"than data.drop_displacing={share}: probe with the data and the share of the run"
        )
    size = config.train.eval_batch_size or config.train.batch_size
    scores = score_pairs(policy, rows, batch_size=size, name="data")
    dropped = most_displacing(scores, count)
    return facts | {
        "threshold": float(scores.normalised[dropped[-1]]),
        "dropped": [
            {
                "row": int(row),
                "record": int(rows.train.source_rows[row]),
                "ches": float(scores.raw[row]),
                "normalised_ches": float(scores.normalised[row]),
            }
            for row in dropped
        ],
    }

"""``spo-jax score-pairs``: the training pairs by how much they would displace, before training."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spo_jax.checkpoints.atomic import write_rows
from spo_jax.checkpoints.run_folder import check_shared, run_folder
from spo_jax.config.mixtures import data_sets
from spo_jax.config.parsing import ConfigError
from spo_jax.config.schema import BUILTIN_TASK, Config, ModelConfig
from spo_jax.data import TokenizedRows, load_records
from spo_jax.parallel.copies import local_path
from spo_jax.parallel.mesh import make_mesh
from spo_jax.parallel.processes import by_first, is_first
from spo_jax.policies.kept_format import keep_stop_ids
from spo_jax.policies.loading import Policy, is_run, load_policy
from spo_jax.policies.pair_scores import PairScores, most_displacing, score_pairs
from spo_jax.sampling.builtin import PAIRS_FILE
from spo_jax.training.material import rows_of_stage
from spo_jax.training.pinned import pin, trained_template
from spo_jax.training.resuming import stage_folder

SCORES_FILE = "pair_scores.jsonl"
"""Inside a run, where no other file is named."""

_WORK = ".scored_model"
_SHARES = (0, 5, 25, 50, 75, 95, 100)
_WIDTH, _BEFORE = 32, 12


def rank_pairs(config: Config, *, out: str | Path | None = None, show: int = 10) -> str:
    """Score every training pair under the policy that the stages of pairs start from.

    Writes a JSON line a pair into ``out``, worst first: ``row`` (its place among the training
    rows), ``record``, ``file``, ``line``, ``ches``, ``normalised_ches`` and the two lengths in
    tokens. Returns quantiles and the ``show`` worst as text. Where SFT is a stage, the policy is
    that of the newest checkpoint of it.

    Raises:
        ConfigError: no stage of pairs.
        FileNotFoundError: the SFT stage has not been trained yet.
        RunLocked: a run goes on in the folder.
    """
    model = _starting_model(config)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    with run_folder(config.output_dir) as root, _scratch(root / _WORK) as work:
        path = root / SCORES_FILE if out is None else Path(out)
        check_shared(root)
        folders = [stage_folder(config, name) for name in config.stages]
        config = pin(config, folders, resume=True, allow_changes=False)
        policy = load_policy(model, mesh, seed=config.seed, work=work)
        by_first(lambda: keep_stop_ids(work, policy.tokenizer, trained_template(config)))
        # All pairs are scored, those that training will leave out too.
        whole = dataclasses.replace(config.data, drop_displacing=None)
        rows = rows_of_stage(
            dataclasses.replace(config, data=whole), "baseline", policy, {}, resume=True
        ).own
        size = config.train.eval_batch_size or config.train.batch_size
        scores = score_pairs(policy, rows, batch_size=size, name="data")
        order = most_displacing(scores, len(rows.train))
        lines = by_first(lambda: _write(config, path, rows.train, scores, order)[:show])
    shown = [_shown(line, rows.train, policy) for line in lines]
    head = f"{len(rows.train)} training pairs under {model.path or 'the policy at random'}: {path}"
    return "\n".join([head, *_quantiles(scores), "Displacing most:", *shown])


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """``folder``, gone afterwards, whatever happens; it is the first process that removes it."""
    try:
        yield folder
    finally:
        if is_first():
            shutil.rmtree(folder, ignore_errors=True)


def _starting_model(config: Config) -> ModelConfig:
    """What the stages of pairs start from."""
    if set(config.stages) == {"sft"}:
        raise ConfigError(
            f"stages={list(config.stages)} has no stage of pairs to score: add preference"
        )
    if "sft" not in config.stages:
        return config.model
    folder = stage_folder(config, "sft")
    if not is_run(folder):
        raise FileNotFoundError(
            f"{folder} holds no checkpoint, and it is the policy of the stage sft that the pairs "
            "are scored under: train it first (spo-jax sft CONFIG)"
        )
    return dataclasses.replace(config.model, path=str(folder), init=None, tokenizer=None)


def _write(
    config: Config, path: Path, rows: TokenizedRows, scores: PairScores, order: np.ndarray
) -> list[dict[str, Any]]:
    places = dict(_places(config, rows))
    lines = []
    for row in order.tolist():
        record = int(rows.source_rows[row])
        file, line = places[record]
        chosen, rejected, *_ = rows.completion_lengths[row].tolist()
        lines.append(
            {
                "row": row,
                "record": record,
                "file": file,
                "line": line,
                "ches": float(scores.raw[row]),
                "normalised_ches": float(scores.normalised[row]),
                "chosen_tokens": chosen,
                "rejected_tokens": rejected,
            }
        )
    write_rows(path, lines)
    return lines


def _places(config: Config, rows: TokenizedRows) -> Iterator[tuple[int, tuple[str, int]]]:
    """File and line (from 1) of the record of each row."""
    wanted = set(rows.source_rows.tolist())
    counts = (None,) if rows.mixture is None else rows.mixture.records
    streams = []
    for (_, _, data), count in zip(data_sets(config.data), counts, strict=True):
        train = (
            data.train if data.train != BUILTIN_TASK else local_path(config.output_dir) / PAIRS_FILE
        )
        records = load_records(
            train, split=data.train_split, subset=data.subset, streaming=data.streaming
        )
        streams.append(itertools.islice(records, count))
    for record, found in enumerate(itertools.chain(*streams)):
        if record in wanted:
            yield record, (found.file, found.row)


def _quantiles(scores: PairScores) -> list[str]:
    def line(name: str, cells: Sequence[str]) -> str:
        return f"{name:<17}" + "".join(cell.rjust(11) for cell in cells)

    named = {"normalised CHES": scores.normalised, "CHES": scores.raw}
    return [
        line("percentile", [f"{share}" for share in _SHARES]),
        *(line(k, [f"{x:.4g}" for x in np.percentile(v, _SHARES)]) for k, v in named.items()),
    ]


def _shown(line: dict[str, Any], rows: TokenizedRows, policy: Policy) -> str:
    """A pair in a line: both completions from where they begin to differ."""
    n, row = rows.num_completions, line["row"]
    at = rows.completion_offsets[row * n : row * n + 3]
    ids = (
        rows.prompt_ids[slice(*rows.prompt_offsets[row : row + 2])],
        rows.completion_ids[at[0] : at[1]],
        rows.completion_ids[at[1] : at[2]],
    )
    prompt, chosen, rejected = (
        " ".join(policy.tokenizer.decode(x, skip_special_tokens=True).split()) for x in ids
    )
    alike = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)
    )
    start = max(0, sum(1 for _ in alike) - _BEFORE)
    texts = (_cut(prompt, len(prompt) - _WIDTH), _cut(chosen, start), _cut(rejected, start))
    return f"{line['normalised_ches']:12.4g}  {Path(line['file']).name}:{line['line']}  " + (
        "{!r} -> {!r} | {!r}".format(*texts)
    )


def _cut(text: str, start: int) -> str:
    start = max(0, start)
    end = start + _WIDTH
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")

"""What of the tokens laid out is real: a row for each example, and packed rows.

python benchmarks/padding.py DATA TOKENIZER [--batch-size 16 64] [--shards 1] [--width 256]

DATA is a file, folder or hub name of pairs, TOKENIZER a folder or hub name. Shares and shapes are
those of eight epochs. With --width a DPO step of a Llama of that width and 4 layers is timed on
--steps batches of each layout, in turns; programs are compiled before. Real tokens a second tell.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from shared import make_llama

from spo_jax import make_logprobs_fn, make_objective, make_preference_loss
from spo_jax.config.schema import DataConfig
from spo_jax.data import TokenizedRows, TrainIterator, choose_buckets, make_train_iterator
from spo_jax.data.tokenize import load_tokenizer
from spo_jax.policies import prepare_rows
from spo_jax.types import BilevelBatch, CompletionBatch

EPOCHS, ROUNDS = 8, 3


class Laid(NamedTuple):
    """Tokens of some batches, and the shapes that they are compiled for."""

    real: int
    laid_out: int
    shapes: set[tuple[int, ...]]


def tokens_of(rows: TokenizedRows, batches: Iterable[CompletionBatch]) -> Laid:
    """Count the tokens of ``rows`` in ``batches``, and the room for them."""
    lengths = rows.prompt_lengths + rows.completion_lengths.sum(axis=1)
    real = laid_out = 0
    shapes = set()
    for batch in batches:
        ids = batch.row_ids[batch.row_ids >= 0]
        real += int(lengths[ids].sum())
        laid_out += batch.prompt_tokens.size + batch.completion_tokens.size
        count, prompt = batch.prompt_tokens.shape
        shapes.add((count, prompt, batch.completion_tokens.shape[2], *batch.row_ids.shape[1:]))
    return Laid(real, laid_out, shapes)


def batches_of(
    rows: TokenizedRows, batch_size: int, shards: int, epochs: int | None, *, packing: bool
) -> TrainIterator:
    """Training batches as a run without settings of its own would have them."""
    return make_train_iterator(
        rows,
        batch_size=batch_size,
        buckets=choose_buckets(rows),
        seed=0,
        num_epochs=epochs,
        packing=packing,
        rows_unit=shards,
        reference_logprobs=np.zeros((len(rows), rows.num_completions), np.float32),
    )


def make_timed(width: int, vocabulary: int) -> Any:
    """``batch -> seconds`` of the gradient of one DPO step."""
    model = make_llama(width, 4, vocabulary=vocabulary, tied=True)
    loss = make_preference_loss("dpo", beta=0.1)
    objective = make_objective(make_logprobs_fn(model), loss)
    params = model.init(jax.random.key(0))

    @jax.jit
    def gradient(params, batch):
        return objective.levels(objective.init()).gradient(params, BilevelBatch(batch), (1.0, 1.0))

    def seconds(batch: CompletionBatch) -> float:
        began = time.perf_counter()
        jax.block_until_ready(gradient(params, batch))
        return time.perf_counter() - began

    return seconds


def main() -> None:
    """Print a line for each batch size and layout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("tokenizer")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--width", type=int)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    section = DataConfig(train=options.data, on_bad_row="skip")
    rows = prepare_rows(section, "preference", tokenizer, seed=0, name="data").train
    for size in options.batch_size:
        for packing in (False, True):
            batches = batches_of(rows, size, options.shards, EPOCHS, packing=packing)
            found = tokens_of(rows, batches)
            print(
                f"batches of {size}, {'packed' if packing else 'a row each'}: "
                f"{found.real / found.laid_out:.1%} real, {len(found.shapes)} shapes: "
                f"{sorted(found.shapes)}"
            )
        if options.width:
            print(timed(rows, size, options, len(tokenizer)))


def timed(rows: TokenizedRows, size: int, options: argparse.Namespace, vocabulary: int) -> str:
    """Real tokens a second of both layouts, measured in turns."""
    seconds = make_timed(options.width, vocabulary)
    speeds: dict[bool, list[float]] = {}
    batches = {
        packing: batches_of(rows, size, options.shards, None, packing=packing)
        for packing in (False, True)
    }
    chosen = {packing: [next(of) for _ in range(options.steps)] for packing, of in batches.items()}
    for batch in chosen[False] + chosen[True]:
        seconds(batch)  # compiled
    for _ in range(ROUNDS):
        for packing, some in chosen.items():
            spent = sum(seconds(batch) for batch in some)
            speeds.setdefault(packing, []).append(tokens_of(rows, some).real / spent)
    plain, packed = (statistics.median(speeds[packing]) for packing in (False, True))
    return (
        f"batches of {size}: {plain:,.0f} real tokens a second, packed {packed:,.0f}: "
        f"{packed / plain:.2f} times as many"
    )


if __name__ == "__main__":
    main()

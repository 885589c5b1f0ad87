"""The folder data/ of the studies on a real model, made of the public files they rest on.

    python benchmarks/study_data.py --tokenizer MODEL --out data \\
        --mawps train.jsonl test.jsonl --tinystories tinystories.json \\
        --llmbar llmbar.jsonl --hh harmless-base.test.jsonl

MAWPS is two files of {question, answer}, the answer closed by "#### N"; TinyStories a JSON list of
texts, or lines of {text}; LLMBar lines of {prompt, chosen, rejected}; Anthropic HH the test part of
harmless-base, lines of {chosen, rejected} dialogues, or of {prompt, chosen, rejected}. What is not
named is not made. docs/study.md says where the files are from.

Nothing is drawn: MAWPS is cut in the order of its file (800 for SFT, 300 for pairs, the rest for
validation), of TinyStories the first 100 texts in ASCII are taken, of LLMBar the first 100 rows
whose three texts have at most 250 tokens; of HH all such rows, of which the 400 whose prompts
have the smallest SHA-256 are held out, no prompt on both sides; and all rows as they are in hh.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spo_jax.checkpoints.atomic import write_rows
from spo_jax.data import load_tokenizer

SFT, PAIRS = 800, 300
TEXTS, HELD_OUT, MOST_TOKENS = 100, 400, 250
_TURN = "\n\nAssistant:"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--tokenizer", help="of the model: counts tokens of LLMBar and HH")
    parser.add_argument("--mawps", type=Path, nargs=2, metavar=("TRAIN", "TEST"))
    parser.add_argument("--tinystories", type=Path)
    parser.add_argument("--llmbar", type=Path)
    parser.add_argument("--hh", type=Path)
    options = parser.parse_args()
    if (options.llmbar or options.hh) and options.tokenizer is None:
        parser.error("--llmbar and --hh need --tokenizer: rows are chosen by their tokens")
    found: dict[str, list[dict[str, Any]]] = {}
    if options.mawps:
        found |= word_problems(*map(read, options.mawps))
    if options.tinystories:
        found["tinystories"] = texts(read(options.tinystories))
    if options.llmbar or options.hh:
        tokenizer = load_tokenizer(options.tokenizer)

        def is_short(row: Mapping[str, str]) -> bool:
            lengths = (len(tokenizer(text)["input_ids"]) for text in row.values())
            return all(length <= MOST_TOKENS for length in lengths)

        if options.llmbar:
            rows = (pair(row) for row in read(options.llmbar))
            short = [row for row in rows if is_short(row)][:TEXTS]
            found["llmbar"] = [{"question": row.pop("prompt"), **row} for row in short]
        if options.hh:
            rows = told_apart(map(pair, read(options.hh)))
            found |= {"hh": rows, **preferences(row for row in rows if is_short(row))}
    if not found:
        parser.error("name at least one file: --mawps, --tinystories, --llmbar, --hh")
    for name, rows in found.items():
        write_rows(options.out / f"{name}.jsonl", rows)
        print(f"{options.out / name}.jsonl: {len(rows)} rows")


def read(path: Path) -> list[Any]:
    """JSON lines (also ``.gz``), or a JSON list."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def word_problems(train: list[Any], test: list[Any]) -> dict[str, list[Any]]:
    """MAWPS cut in the order of the file."""
    parts = {"sft": train[:SFT], "pairs": train[SFT : SFT + PAIRS]}
    parts |= {"validation": train[SFT + PAIRS :], "test": test}
    for name, rows in parts.items():
        if not rows:
            raise SystemExit(f"--mawps: no row is left for {name}: {len(train)} to train on")
    return {f"mawps_{name}": rows for name, rows in parts.items()}


def texts(rows: Iterable[Any]) -> list[dict[str, str]]:
    """The first texts in ASCII."""
    found = [row if isinstance(row, str) else row["text"] for row in rows]
    return [{"text": text} for text in found if text.isascii()][:TEXTS]


def pair(row: Mapping[str, str]) -> dict[str, str]:
    """Prompt, chosen and rejected: of whole dialogues the last turn of the assistant is cut off."""
    if "prompt" in row:
        return {key: row[key] for key in ("prompt", "chosen", "rejected")}
    prompts, ends = zip(*(row[key].rsplit(_TURN, 1) for key in ("chosen", "rejected")), strict=True)
    same = prompts[0] == prompts[1]
    return {"prompt": prompts[0] + _TURN if same else "", "chosen": ends[0], "rejected": ends[1]}


def told_apart(rows: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    """Those with a prompt and two completions that differ, none of them blank."""
    whole = (row for row in rows if all(text.strip() for text in row.values()))
    return [dict(row) for row in whole if row["chosen"] != row["rejected"]]


def preferences(rows: Iterable[Mapping[str, str]]) -> dict[str, list[Any]]:
    """HH: those that can be told apart, held out by the hash of their prompts."""
    whole = told_apart(rows)
    by_hash = sorted({row["prompt"] for row in whole}, key=_hash)
    count: dict[str, int] = {}
    for row in whole:
        count[row["prompt"]] = count.get(row["prompt"], 0) + 1
    held, number = set(), 0
    for prompt in by_hash:
        if number + count[prompt] <= HELD_OUT:
            held.add(prompt)
            number += count[prompt]
    parts = {"train": False, "test": True}
    return {
        f"hh_{name}": [row for row in whole if (row["prompt"] in held) == side]
        for name, side in parts.items()
    }


def _hash(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()


if __name__ == "__main__":
    main()

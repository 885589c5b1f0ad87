"""Rows a second from records to ids, checks included, on conversational pairs.

python benchmarks/reading.py TOKENIZER_FOLDER [ROWS]

The tokenizer's own chat template is used, ChatML where it has none. Best of three.
"""

from __future__ import annotations

import random
import sys
import time

from spo_jax.data import Record, format_rows, load_tokenizer, make_chat_format, tokenize_rows

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WORDS = (  # noqa: SIM905
    "the of and to in is that it was for on are with as his they at be this from have or by one "
    "had not but what all were when we there can an your which their said if do will each about "
    "how up out them then she many some so these would other into has more her two like him see"
).split()


def pairs(count: int, seed: int = 0) -> list[Record]:
    """Pairs of four turns before answers of 120 words each, with columns about the row."""
    draw = random.Random(seed)

    def turn(role: str, words: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(WORDS, k=words)) + "."}

    return [
        Record(
            "pairs.jsonl",
            i + 1,
            {
                "prompt": [turn("system", 5), turn("user", 40), turn("assistant", 40),
                           turn("user", 30)],
                "chosen": [turn("assistant", 120)],
                "rejected": [turn("assistant", 120)],
                "id": i,
                "score": 1.0,
            },
        )
        for i in range(count)
    ]  # fmt: skip


def main(folder: str, rows: str = "20000") -> None:
    """Print rows a second of both steps, and what the reports say."""
    tokenizer = load_tokenizer(folder)
    chat = make_chat_format(tokenizer, template=None if tokenizer.chat_template else CHATML)
    records, best = pairs(int(rows)), [float("inf")] * 2
    for _ in range(3):
        start = time.perf_counter()
        text, report = format_rows(records, chat, kind="preference")
        between = time.perf_counter()
        _, tokens = tokenize_rows(
            text, tokenizer, max_prompt_length=4096, max_completion_length=4096
        )
        found = between - start, time.perf_counter() - between
        best = [min(pair) for pair in zip(best, found, strict=True)]
    both = len(records) / sum(best)
    print(
        f"{len(records) / best[0]:.0f} rows/s to text, {len(records) / best[1]:.0f} to ids, "
        f"{both:.0f} both\n{report}\n{tokens}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

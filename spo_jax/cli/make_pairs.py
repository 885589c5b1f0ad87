"""``spo-jax make-pairs``: preference pairs from a model's own mistakes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spo_jax.cli.row_options import ROW_OPTIONS, add_row_options
from spo_jax.cli.written_files import check_writable

_DESCRIPTION = """\
Sample answers to the prompts of ROWS, grade them, and write preference pairs: chosen is the
row's own answer (or a right sample), rejected a wrong sample.

Stopped, the same command goes on where it was and writes the same file. A description of the
pairs, with all counts, is written beside them: PAIRS.meta.yaml.
"""

_SETTINGS = (
    *("task", "samples", "temperature", "top_k", "top_p", "seed", "max_new_tokens"),
    *("max_prompt_length", "chosen", "cut_off", "max_pairs_per_prompt", "keep_right"),
)
_READING = (
    *("split", "subset", "max_rows", "chat_template", "compute_dtype", "on_bad_row"),
    "batch_size",
    *ROW_OPTIONS,
)


def add_commands(commands: Any) -> None:
    """Enter the command into the parser."""
    from spo_jax.tasks import TASKS

    command = commands.add_parser(
        "make-pairs",
        help="Preference pairs from a model's own mistakes.",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("model", metavar="RUN_OR_MODEL", help="run, model folder or hub name")
    add("--data", required=True, metavar="ROWS", help="file, folder or hub name: SFT rows or pairs")
    add("--task", required=True, choices=tuple(TASKS), help="how samples are graded")
    add("--out", required=True, metavar="PAIRS.jsonl", help="file to make; must not exist")
    add("--samples", type=int, default=4, metavar="K", help="of each prompt [4]")
    add("--temperature", type=float, default=1.0, help="[1.0]")
    add("--top-k", type=int, help="sample from the likeliest K tokens only")
    add("--top-p", type=float, help="sample from the fewest tokens that hold P of the mass only")
    add("--seed", type=int, default=0, help="[0]")
    add("--max-new-tokens", type=int, help="of a sample (default: by the task)")
    add(
        "--chosen",
        choices=("gold", "own"),
        default="gold",
        help="the row's answer, or the model's right samples in turn [gold]",
    )
    add(
        "--cut-off",
        choices=("drop", "keep"),
        default="drop",
        help="wrong samples without an end: not used, or rejected like others [drop]",
    )
    add("--max-pairs-per-prompt", type=int, metavar="N", help="(default: every wrong sample)")
    add(
        "--keep-right",
        action="store_true",
        help="also write PAIRS.right.jsonl: SFT rows, a right sample of each prompt that has one "
        "(objective.inner_data: own reads them)",
    )
    add("--batch-size", type=int, default=256, help="prompts at once, at most 256 [256]")
    add("--max-rows", type=int, help="only the first rows")
    add("--split", default="train", help="split of a hub data set [train]")
    add("--subset", help="configuration of a hub data set (gsm8k: main)")
    add("--max-prompt-length", type=int, default=1024, help="tokens [1024]")
    add("--chat-template", help="Jinja template or its file")
    add("--compute-dtype", help="(default: as trained, else float32)")
    add("--on-bad-row", choices=("error", "skip"), default="error")
    add_row_options(command)
    command.set_defaults(command_function=_make_pairs)


def _make_pairs(options: argparse.Namespace) -> int:
    from spo_jax.sampling.make_pairs import (
        PairSettings,
        make_pairs,
        meta_path,
        right_path,
        summary,
    )

    check_writable("--out", options.out, makes_folder=True)
    given = vars(options)
    settings = PairSettings(**{key: given[key] for key in _SETTINGS})
    reading = {key: given[key] for key in _READING}
    counts = make_pairs(options.model, options.data, options.out, settings, **reading)
    print(summary(counts))
    print(f"{options.out} (described in {meta_path(Path(options.out))})")
    if settings.keep_right:
        with right_path(Path(options.out)).open() as file:
            print(f"{file.name}: right answers to {sum(1 for _ in file)} prompts")
    print(f"Next: spo-jax train CONFIG --data.train {options.out}")
    return 0

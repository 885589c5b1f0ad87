"""``spo-jax data``: the rows and batches of a configuration, before any training."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from spo_jax.cli.written_files import check_writable

_DESCRIPTION = """\
Show what CONFIG would train on: the first rows token by token, lengths, buckets, padding, updates.

Rows are read, checked, tokenized and batched by the functions of spo-jax train. Every row that
cannot be used is named. The tokenizer and the model's config.json are read, weights are not;
nothing is written but FILE. Without a terminal, or with NO_COLOR, marks stand for colours.

Exit status: 0 it can be trained on, 2 it cannot.
Any key of the configuration can be set here as in spo-jax train.
"""


def add_commands(commands: Any) -> None:
    """Enter the command into the parser."""
    command = commands.add_parser(
        "data",
        help="The rows and batches of a configuration, before training.",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="spo-jax data CONFIG [--rows N] [--json [FILE]] [--KEY VALUE ...]",
        allow_abbrev=False,
    )
    command.add_argument("config", metavar="CONFIG", help="YAML file")
    command.add_argument("--rows", type=int, default=3, metavar="N", help="rows shown [3]")
    command.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="as JSON, here or into FILE"
    )
    command.set_defaults(command_function=_data, takes_keys=True)


def _data(options: argparse.Namespace) -> int:
    from spo_jax.cli.train import read_overrides, say_shipped
    from spo_jax.config.parsing import ConfigError
    from spo_jax.config.validation import load_config

    if options.rows < 0:
        raise ConfigError(f"--rows {options.rows}: expected 0 or more")
    check_writable("--json", None if options.json == "-" else options.json)
    # A run that has the GPU goes on: a look takes none of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    config = load_config(options.config, read_overrides(options.overrides))
    say_shipped(options.config)
    from spo_jax.checkpoints.atomic import replace_text, to_json
    from spo_jax.training.preview import look_at_data, preview_text

    facts, error = look_at_data(config, first_rows=options.rows)
    if options.json:
        facts = {"config": options.config, **facts}
        text = to_json(facts, options.json, indent=1, ensure_ascii=False)
        if options.json != "-":
            replace_text(Path(options.json), text + "\n")
    if options.json != "-":
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        text = preview_text(facts, colour=colour)
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    if error is not None:
        raise error
    return 0

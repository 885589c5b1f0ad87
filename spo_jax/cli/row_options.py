"""Options of every command that reads a file of rows."""

from __future__ import annotations

import argparse
from typing import Any

ROW_OPTIONS = ("columns", "ignore_columns")


def add_row_options(parser: Any) -> None:
    """What the columns of the file are called, and which are left out."""
    parser.add_argument(
        "--columns",
        type=_mapping,
        metavar="{OURS: THEIRS}",
        help="our name of a column to the file's: '{prompt: instruction}'",
    )
    parser.add_argument(
        "--ignore-columns",
        type=_names,
        default=(),
        metavar="A,B",
        help="columns and keys of messages that are left out",
    )


def _mapping(text: str) -> dict[str, str]:
    from spo_jax.config.parsing import parse_value

    value = parse_value(text)
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected '{{prompt: instruction}}'")
    return value


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.strip("[] ").split(",") if name.strip())

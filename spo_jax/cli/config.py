"""``spo-jax config``: a configuration shown as it would be run, or made from one of TRL's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from spo_jax.cli.written_files import check_writable

_SHOW = """\
Print CONFIG as spo-jax train would run it, each value with where it comes from: a file, the
command line, or default. Sections that nothing uses are left out. Nothing is loaded or started.

Any key of the configuration can be set here as in spo-jax train.
"""

_FROM_TRL = """\
Write what a run of TRL asks for as a configuration of ours. FILE is YAML or JSON of its trainers'
settings, or a text with the command line: trl dpo --config x.yaml, accelerate launch dpo.py ...

TRL's defaults are written where ours are others. What has no place here is listed on stderr, with
the reason. docs/from_trl.md has every setting.
"""


def add_commands(commands: Any) -> None:
    """Enter the commands into the parser."""
    config = commands.add_parser("config", help="Show a configuration, or make one from TRL's.")
    actions = config.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser(
        "show",
        help="The resolved configuration, each value with where it comes from.",
        description=_SHOW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="spo-jax config show CONFIG [--only-set] [--KEY VALUE ...]",
        allow_abbrev=False,
    )
    show.add_argument("config", metavar="CONFIG", help="YAML file")
    show.add_argument("--only-set", action="store_true", help="leave out defaults")
    show.set_defaults(command_function=_show, takes_keys=True)
    made = actions.add_parser(
        "from-trl",
        help="A configuration from a YAML file or a command line of TRL.",
        description=_FROM_TRL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("file", metavar="FILE", help="YAML, JSON, or a text with the command line")
    made.add_argument(
        "--trainer", choices=("dpo", "cpo", "orpo", "kto"), help="(default: as FILE tells)"
    )
    made.add_argument(
        "--devices", type=int, metavar="N", help="TRL ran on (default: as FILE tells, or 1)"
    )
    made.add_argument("--out", metavar="OUT.yaml", help="a new file (default: print it)")
    made.set_defaults(command_function=_from_trl)


def _show(options: argparse.Namespace) -> int:
    from spo_jax.cli.train import read_overrides
    from spo_jax.config.origins import resolved_text

    overrides = read_overrides(options.overrides)
    print(resolved_text(options.config, overrides, only_set=options.only_set), end="")
    return 0


def _from_trl(options: argparse.Namespace) -> int:
    from spo_jax.config.from_trl import convert
    from spo_jax.config.parsing import ConfigError

    if options.devices is not None and options.devices < 1:
        raise ConfigError(f"--devices {options.devices}: expected a number from 1")
    if options.out and Path(options.out).exists():
        raise ConfigError(f"--out {options.out} exists: name a new file")
    check_writable("--out", options.out)
    found = convert(options.file, trainer=options.trainer, devices=options.devices)
    for line in found.left:
        print(f"not carried: {line}", file=sys.stderr)
    if options.out:
        Path(options.out).write_text(found.text, encoding="utf-8")
        print(f"{options.out}: spo-jax train {options.out}")
    else:
        print(found.text, end="")
    return 0

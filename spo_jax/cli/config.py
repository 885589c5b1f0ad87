"""``spo-jax config``: a configuration shown as it would be run."""

from __future__ import annotations

import argparse
from typing import Any

_SHOW = """\
Print CONFIG as spo-jax train would run it, each value with where it comes from: a file, the
command line, or default. Sections that nothing uses are left out. Nothing is loaded or started.

Any key of the configuration can be set here as in spo-jax train.
"""


def add_commands(commands: Any) -> None:
    """Enter the commands into the parser."""
    config = commands.add_parser("config", help="Show a configuration.")
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


def _show(options: argparse.Namespace) -> int:
    from spo_jax.cli.train import read_overrides
    from spo_jax.config.origins import resolved_text

    overrides = read_overrides(options.overrides)
    print(resolved_text(options.config, overrides, only_set=options.only_set), end="")
    return 0

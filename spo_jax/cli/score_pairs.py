"""``spo-jax score-pairs``: which pairs would displace their own chosen completions."""

from __future__ import annotations

import argparse
from typing import Any

from spo_jax.cli.train import add_process_flags, join_processes, read_overrides, say_shipped
from spo_jax.cli.written_files import check_writable

_DESCRIPTION = """\
List the training pairs of CONFIG by how much they would displace, before anything is trained.

The score is CHES (arXiv 2410.08847), from hidden states of the policy that the pairs are trained
from: the model of CONFIG, or what its stage sft has made (spo-jax sft CONFIG). It is low where
chosen and rejected are far apart, near 0 where they are nearly alike to the model, and above where
the rejected has more of the chosen's direction than the chosen itself. Compare pairs by the
length-normalised score. data.drop_displacing leaves the top share out of training.

All pairs are written, worst first, with file and line; printed are quantiles and the worst, with
both completions from where they part.

Any key of the configuration can be set here as in spo-jax train.
"""


def add_commands(commands: Any) -> None:
    """Enter the command into the parser."""
    command = commands.add_parser(
        "score-pairs",
        help="The pairs that would displace their chosen completions, before training.",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="spo-jax score-pairs CONFIG [--out FILE.jsonl] [--show N] [--KEY VALUE ...]",
        allow_abbrev=False,
    )
    command.add_argument("config", metavar="CONFIG", help="YAML file")
    command.add_argument(
        "--out", metavar="FILE.jsonl", help="(default: pair_scores.jsonl in output_dir)"
    )
    command.add_argument("--show", type=int, default=10, metavar="N", help="pairs printed [10]")
    add_process_flags(command)
    command.set_defaults(command_function=_score_pairs, takes_keys=True)


def _score_pairs(options: argparse.Namespace) -> int:
    from spo_jax.config.parsing import ConfigError
    from spo_jax.config.validation import load_config

    if options.show < 0:
        raise ConfigError(f"--show {options.show}: expected 0 or more")
    check_writable("--out", options.out, makes_folder=True)
    join_processes(options)
    config = load_config(options.config, read_overrides(options.overrides))
    say_shipped(options.config, several=True)
    from spo_jax.parallel.processes import is_first
    from spo_jax.training.ranked_pairs import rank_pairs

    text = rank_pairs(config, out=options.out, show=options.show)
    if is_first():
        print(text)
    return 0

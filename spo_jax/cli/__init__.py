"""The command line ``spo-jax``: arguments only."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from spo_jax.cli import generation, make_pairs, models, reports, study, training

_DESCRIPTION = """\
Align a language model on preference pairs with Stable Preference Optimization (SPO).

  spo-jax train configs/quickstart.yaml        the whole way on built-in data, offline
  spo-jax train CONFIG --resume                go on where a run stopped
  spo-jax export RUN OUT                       a folder that transformers loads
  spo-jax evaluate RUN_OR_MODEL --data FILE    held-out log-probs and margins
  spo-jax generate RUN_OR_MODEL --data FILE --out OUTPUTS.json
                                               outputs that AlpacaEval 2 reads
  spo-jax judge OUTPUTS.json OTHER.json --judge COMMAND
                                               win rate by a judge of your own
  spo-jax make-pairs RUN_OR_MODEL --data FILE --task TASK --out PAIRS.jsonl
                                               pairs from the model's own mistakes
  spo-jax dynamics CONFIG_OR_RUN               why probabilities moved: train with probes, or
                                               probe a run's checkpoints
  spo-jax report RUN                           figures and tables of a run as one HTML page
  spo-jax study CONFIG                         methods with and without SPO over seeds
"""

_COMMANDS = (training, models, generation, make_pairs, study, reports)


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command; each sets the function that runs it."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("spo-jax", description=_DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in _COMMANDS:
        module.add_commands(commands)
    return parser


def _is_ours(error: BaseException) -> bool:
    """Raised by this package with words for the user, not by a library from inside."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status: 0 done, 2 wrong input, 128 + signal when stopped."""
    parser = make_parser()
    options, overrides = parser.parse_known_args(arguments)
    if overrides and not getattr(options, "takes_keys", False):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    options.overrides = overrides
    try:
        return options.command_function(options)
    except KeyboardInterrupt:
        print("spo-jax: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, RuntimeError, OSError) as error:
        if not _is_ours(error):
            raise
        print(f"spo-jax: error: {error}", file=sys.stderr)
        return 2

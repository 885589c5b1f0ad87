"""The command line ``spo-jax``: arguments only."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from spo_jax.cli import (
    completion,
    config,
    data,
    evaluate,
    generation,
    make_pairs,
    plan,
    report,
    rounds,
    score_pairs,
    study,
    train,
)

_DESCRIPTION = """\
Align a language model on preference pairs with Stable Preference Optimization (SPO).

  spo-jax train configs/quickstart.yaml        the whole way on built-in data, offline
  spo-jax train CONFIG --resume                go on where a run stopped
  spo-jax config show CONFIG                   what would be run, and where each value comes from
  spo-jax config from-trl FILE --out CONFIG    a configuration from TRL's YAML or command line
  spo-jax data CONFIG                          the rows as they would be trained on, token by token,
                                               lengths, padding, updates; no weights
  spo-jax plan CONFIG --topology v5e:4x4       memory, collectives and time on a machine that is
                                               not there
  spo-jax export RUN OUT                       a folder that transformers loads
  spo-jax evaluate RUN_OR_MODEL --data FILE    held-out log-probs and margins
  spo-jax generate RUN_OR_MODEL --data FILE --out OUTPUTS.json
                                               outputs that AlpacaEval 2 reads
  spo-jax judge OUTPUTS.json OTHER.json --judge COMMAND
                                               win rate by a judge of your own
  spo-jax make-pairs RUN_OR_MODEL --data FILE --task TASK --out PAIRS.jsonl
                                               pairs from the model's own mistakes
  spo-jax score-pairs CONFIG                   the pairs that would displace their chosen
                                               completions, before training
  spo-jax dynamics CONFIG_OR_RUN               why probabilities moved: train with probes, or
                                               probe a run's checkpoints
  spo-jax report RUN                           figures and tables of a run as one HTML page
  spo-jax study CONFIG                         methods with and without SPO over seeds
  spo-jax rounds CONFIG                        iterated: pairs of the policy, training, and again
  spo-jax completion bash                      a script for the shell's completion (or zsh)
"""

_COMPILING = ("evaluate", "generate", "make-pairs", "score-pairs", "dynamics")
"""Commands beside those of training, which keep compiled programs as their keys say."""
_TRAINING = ("train", "sft", "study", "rounds")
_COMMANDS = (
    *(train, config, data, plan, evaluate, generation, make_pairs, score_pairs),
    *(study, rounds, report, completion),
)


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


def _fail(error: BaseException) -> int:
    """Say what went wrong; one process of several tells the others, and waits for none."""
    from spo_jax.parallel.copies import named
    from spo_jax.parallel.failures import joined

    _, number, count = joined()
    where = f" (process {number} of {count})" if count > 1 else ""
    text = named(f"{error}")
    print(f"spo-jax: error{where}: {text}", file=sys.stderr, flush=True)
    status = getattr(error, "exit_status", 2)
    _leave_others(text, status)
    return status


def _leave_others(text: str, status: int, *, trace: bool = False) -> None:
    """Where this is one process of several: tell them, and end here.

    An error with a ``trace`` was not expected: it may be that of waiting for one that failed.
    """
    from spo_jax.parallel.failures import end_if_told, joined, leave

    if joined()[2] > 1:
        if trace:
            end_if_told()
            traceback.print_exc()
        leave(text, status)


def start() -> int:
    """``main`` as a command of its own: it may take memory as computing wants it."""
    if sys.argv[1:2] and sys.argv[1] in (*_TRAINING, *_COMPILING):
        from spo_jax.cli.huge_pages import start_on_huge_pages

        start_on_huge_pages()
    return main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status.

    0 done, 2 wrong input, 75 what another start may mend, 128 + signal when stopped.
    """
    parser = make_parser()
    options, overrides = parser.parse_known_args(arguments)
    if overrides and not getattr(options, "takes_keys", False):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    options.overrides = overrides
    try:
        if options.command in _COMPILING and not getattr(options, "help", False):
            from spo_jax.checkpoints.user_cache import keep_compiled

            keep_compiled()
        return options.command_function(options)
    except KeyboardInterrupt:
        print("spo-jax: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, ValueError | RuntimeError | OSError) and _is_ours(error):
            return _fail(error)
        _leave_others(f"{type(error).__name__}: {error}", 1, trace=True)
        raise

"""``spo-jax rounds``: iterated preference optimization."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spo_jax.cli.train import add_process_flags

_ROUNDS = """\
Iterated preference optimization: sample from the policy, make pairs of its mistakes, train on
them, and again from where that ended. The same command goes on where it stopped.

Any key of CONFIG can be set here and wins over it; those of the training start with run:
  spo-jax rounds CONFIG --rounds 3 --extrapolation 0.3 --run.outer.learning-rate 5e-7
"""


def add_commands(commands: Any) -> None:
    """Enter the command into the parser."""
    rounds = commands.add_parser(
        "rounds",
        help="Iterated: pairs of the policy, training on them, and again.",
        description=_ROUNDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="spo-jax rounds CONFIG [--distributed] [--KEY VALUE ...]",
    )
    rounds.add_argument("config", metavar="CONFIG", help="YAML file of rounds")
    rounds.add_argument(
        "--resume", action="store_true", help="changes nothing: rounds go on where they stopped"
    )
    add_process_flags(rounds)
    rounds.set_defaults(command_function=_rounds, takes_keys=True)


def _rounds(options: argparse.Namespace) -> int:
    from spo_jax.checkpoints.atomic import replace_text
    from spo_jax.cli.train import join_processes, read_overrides, say_shipped
    from spo_jax.parallel.processes import by_first, is_first
    from spo_jax.study.iterated import policy_path, read_rounds, rounds_table, run_rounds

    join_processes(options)
    plan = read_rounds(options.config, read_overrides(options.overrides))
    say_shipped(options.config, several=True)
    table, path = rounds_table(run_rounds(plan)), Path(plan.output_dir) / "table.md"
    by_first(lambda: replace_text(path, f"# {plan.title}\n\n{table}\n"))
    if is_first():
        print(f"{table}\nThe policy: {policy_path(plan, plan.rounds)}")
    return 0

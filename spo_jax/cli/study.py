"""``spo-jax study``: a grid of runs, and what it shows."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

_STUDY = """\
Run the grid of CONFIG, losses x variants x seeds beside SFT and controls, and write a table,
pictures and a page into its output_dir. The same command goes on where it stopped.

Any key of the study can be set here and wins over CONFIG; those of its runs start with run:
  spo-jax study CONFIG --seeds '[0]' --jobs 1 --run.train.steps 50 --output-dir runs/short
"""


def add_commands(commands: Any) -> None:
    """Enter the command into the parser."""
    study = commands.add_parser(
        "study",
        help="Run methods with and without SPO over seeds: table, pictures, page.",
        description=_STUDY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="spo-jax study CONFIG [--page-only] [--KEY VALUE ...]",
    )
    study.add_argument("config", metavar="CONFIG", help="YAML file of a study")
    study.add_argument(
        "--page-only", action="store_true", help="run nothing: the page of what is finished"
    )
    study.add_argument(
        "--resume", action="store_true", help="changes nothing: a study goes on where it stopped"
    )
    study.set_defaults(command_function=_study, takes_keys=True)


def _study(options: argparse.Namespace) -> int:
    from spo_jax.cli.train import read_overrides, say_shipped
    from spo_jax.study import make_study_page, read_evidence, read_study, run_study

    study = read_study(options.config, read_overrides(options.overrides))
    say_shipped(options.config)
    failed = [] if options.page_only else run_study(study)
    command = shlex.join(["spo-jax", "study", options.config, *options.overrides])
    evidence = read_evidence(study, command=command)
    if not evidence.records:
        raise RuntimeError(
            "no run is finished: " + (failed[0] if failed else "start it without --page-only")
        )
    page = make_study_page(evidence, Path(study.output_dir))
    print((Path(study.output_dir) / "table.md").read_text())
    print(f"{page}: the table with intervals, pictures and how to read them")
    for text in failed:
        print(f"FAILED {text}", file=sys.stderr)
    return 1 if failed else 0

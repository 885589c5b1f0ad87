"""``spo-jax report``: runs as pictures and pages."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Enter the commands into the parser."""
    report = commands.add_parser(
        "report",
        help="Figures of one run, or of several side by side, as one HTML page.",
        description="Write what RUN logged as one HTML page, and its figures as PNG files beside "
        "it. Several runs are overlaid; of a run of several stages, preference and baseline are. "
        "A run that is still going is shown as far as it went.",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    report.add_argument(
        "--out", type=Path, metavar="FILE.html", help="(default: RUN/report.html; ./report.html)"
    )
    report.add_argument("--label", nargs="+", metavar="NAME", help="one name for each RUN")
    report.set_defaults(command_function=_report)


def _report(options: argparse.Namespace) -> int:
    from spo_jax.parallel.copies import local_path
    from spo_jax.parallel.stores import check_local, scheme_of
    from spo_jax.report import make_report

    check_local("--out", options.out)
    if options.out is None and scheme_of(options.runs[0]) is not None:
        raise ValueError(f"{options.runs[0]} is in a bucket: name a local file with --out")
    runs = [local_path(run) for run in options.runs]
    print(make_report(runs, options.out, labels=options.label))
    return 0

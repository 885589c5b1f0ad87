"""``spo-jax train``, ``sft`` and ``dynamics``: commands that take any key of the configuration."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

_TRAIN = """\
Run the stages of CONFIG (YAML): sft, preference, and baseline (the loss without SPO).

Any key of the configuration can be set here, hyphen or underscore, and wins over CONFIG:
  spo-jax train CONFIG --outer.learning-rate 5e-7 --loss.name simpo --loss.beta 2.5
A whole section is given as a YAML mapping:
  spo-jax train CONFIG --loss '{name: simpo, beta: 2.5, gamma_beta_ratio: 0.4}'
"""

_DYNAMICS = """\
Probe why probabilities moved, on a fixed set of pairs, into dynamics.jsonl.

The terms of the first-order law and what it predicts, the changes measured after a step, where
the probability went (the policy's own completions), entropy, repetition.

  spo-jax dynamics CONFIG    trains CONFIG as spo-jax train does, with probes on
                             (dynamics.every: auto where it is not set)
  spo-jax dynamics RUN       probes the checkpoints that a run keeps
Any key can be set here as in spo-jax train.
"""


def add_commands(commands: Any) -> None:
    """Enter the commands into the parser."""
    training = {
        "train": (_TRAIN, "CONFIG", "YAML file"),
        "sft": ("Run only the SFT stage of CONFIG.\n", "CONFIG", "YAML file"),
        "dynamics": (_DYNAMICS, "CONFIG_OR_RUN", "YAML file, or folder of a run"),
    }
    for name, (text, argument, meaning) in training.items():
        command = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage=f"spo-jax {name} {argument} [--resume] [--distributed] [--KEY VALUE ...]",
            add_help=False,
        )
        command.add_argument("-h", "--help", action="store_true", help="this text and every key")
        command.add_argument("config", nargs="?", metavar=argument, help=meaning)
        command.add_argument(
            "--resume", action="store_true", help="go on from the newest checkpoint of the run"
        )
        command.add_argument(
            "--allow-changes",
            action="store_true",
            help="with --resume: go on with another model, optimizer or data all the same",
        )
        add_process_flags(command)
        command.set_defaults(
            command_function=_train, takes_keys=True, show_help=partial(_show_help, command)
        )


def add_process_flags(command: argparse.ArgumentParser) -> None:
    """The flags of a run of several processes."""
    several = command.add_argument_group("several processes, each started with the same command")
    several.add_argument(
        "--distributed",
        action="store_true",
        help="join the processes of this TPU pod, SLURM or Open MPI job, or Kubernetes job",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="elsewhere: where process 0 is")
    several.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")


def join_processes(options: argparse.Namespace) -> None:
    """Become one process of several, where the flags or the environment say so."""
    from spo_jax.parallel.processes import ENVIRONMENT, initialize

    given = {name: getattr(options, name) for name in ENVIRONMENT}
    described = any(value is not None for value in given.values())
    if options.distributed or described or any(v in os.environ for v in ENVIRONMENT.values()):
        initialize(**given)


def read_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """``--a.b value`` and ``--a.b=value`` pairs; values are read as YAML."""
    from spo_jax.config.parsing import ConfigError, parse_value

    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--"):
            raise ConfigError(f"{key!r} is not understood: keys are given as --KEY VALUE")
        key, equals, value = key[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key} needs a value: --{key} VALUE")
            value = rest.pop(0)
        found[key] = parse_value(value)
    return found


def say_shipped(given: str, *, several: bool = False) -> None:
    """A line where ``given`` names no file here; ``several`` processes write it once.

    One alone asks nobody whether it is the first: that would start JAX and take its devices.
    """
    from spo_jax.config.parsing import find_config
    from spo_jax.parallel.processes import say

    found = find_config(given)
    if found != Path(given):
        text = f"{given}: no file here, so the configuration that comes with spo-jax: {found}"
        say(text) if several else print(text, file=sys.stderr, flush=True)


def _train(options: argparse.Namespace) -> int:
    overrides = options.overrides
    if options.help:
        return options.show_help()
    from spo_jax.config.parsing import ConfigError
    from spo_jax.parallel.stores import scheme_of

    if options.config is None or options.config.startswith("-"):
        raise ConfigError(f"name a configuration: spo-jax {options.command} CONFIG (see --help)")
    if options.allow_changes and not options.resume:
        raise ConfigError("--allow-changes would be ignored: it goes with --resume")
    join_processes(options)
    if options.command == "dynamics":
        if scheme_of(options.config) is not None:
            raise ConfigError(
                f"{options.config}: the checkpoints of a run are probed on a local disk, where the "
                "probings are written too: copy it, or probe while training (dynamics.every)"
            )
        if Path(options.config).is_dir():
            return _probe(options, overrides)
        from spo_jax.training.revisit import probed_config as load_config
    else:
        if scheme_of(options.config) is not None:
            raise ConfigError(f"{options.config}: a configuration is a local file; copy it here")
        from spo_jax.config.validation import load_config
    config = load_config(options.config, read_overrides(overrides))
    say_shipped(options.config, several=True)
    only = None
    if options.command == "sft":
        if "sft" not in config.stages:
            raise ConfigError(
                f"stages={list(config.stages)} of {options.config} has no sft: add it, or give "
                "--stages '[sft]'"
            )
        only = "sft"

    from spo_jax.checkpoints.run_folder import bucket_folder

    with bucket_folder(config.output_dir):
        return _train_and_show(options, config, only)


def _train_and_show(options: argparse.Namespace, config: Any, only: str | None) -> int:
    from spo_jax.parallel.copies import named
    from spo_jax.parallel.processes import is_first, say
    from spo_jax.training.resuming import write_results
    from spo_jax.training.run import train
    from spo_jax.training.stopping import Stopped

    try:
        results = train(
            config, resume=options.resume, only=only, allow_changes=options.allow_changes
        )
    except Stopped as stopped:
        say(
            f"\n{stopped}; everything is saved in {config.output_dir}. Go on with: "
            f"spo-jax {options.command} {options.config} --resume"
        )
        return 128 + stopped.signal_number
    table = [{"stage": stage, **result.metrics} for stage, result in results.items()]
    if not is_first():
        return 0
    broken = write_results(config, table)
    print(format_table(table, _title(config)))
    for result in results.values():
        print(named(f"{result.folder}: metrics.jsonl, tensorboard/, checkpoints/"))
    if broken:
        raise ValueError(
            f"{', '.join(broken)}: no number (NaN or infinite), null in results.json. The run is "
            "saved; find the held-out rows with spo-jax evaluate, in float32"
        )
    if options.command == "dynamics":
        return _probed([r.folder / "dynamics.jsonl" for r in results.values()], config.output_dir)
    last = results.get("preference") or list(results.values())[-1]
    print(named(f"Next: spo-jax export {last.folder} OUT"))
    return 0


def _probe(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from spo_jax.config.parsing import ConfigError
    from spo_jax.training.revisit import probe_run

    if options.resume:
        raise ConfigError(
            f"--resume would be ignored: {options.config} is a run, whose checkpoints are "
            "probed. Name its configuration to go on training"
        )
    return _probed(probe_run(options.config, read_overrides(overrides)), options.config)


def _probed(written: list[Path], run: str) -> int:
    print("\n".join(str(path) for path in written if path.exists()))
    print(f"Next: spo-jax report {run}")
    return 0


def _title(config: Any) -> str:
    loss, solver = config.loss.name, config.solver.name
    stages = {"preference": f"{loss} + {solver}", "baseline": loss}
    said = [f"{stage} = {what}" for stage, what in stages.items() if stage in config.stages]
    return ", ".join(["Held out", *said])


_COLUMNS = {
    "stage": "stage",
    "accuracy": "exact answers %",
    "unanswered": "no answer %",
    "rewards/accuracies": "preferred %",
    "logprobs/accuracies": "chosen more likely %",
    "log_ratio/chosen": "chosen log-ratio",
    "log_ratio/rejected": "rejected log-ratio",
    "rewards/margins": "margin",
    "loss": "loss",
    "inner_loss": "SFT loss",
}


def format_table(rows: list[dict[str, Any]], title: str) -> str:
    """Aligned columns of what the rows have."""
    columns = [k for k in _COLUMNS if any(k in row for row in rows)]

    def cell(row, key):
        value = row.get(key)
        if value is None:
            return "-"
        if key.endswith(("accuracy", "unanswered", "accuracies")):
            return f"{100 * value:.1f}"
        return value if isinstance(value, str) else f"{value:+.3f}"

    cells = [[_COLUMNS[k] for k in columns]] + [[cell(row, k) for k in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([title, *lines])


def _show_help(command: argparse.ArgumentParser) -> int:
    from spo_jax.config.key_help import describe
    from spo_jax.config.validation import choices

    print(command.format_help())
    print("keys [default]:\n" + describe(choices()))
    return 0

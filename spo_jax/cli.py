"""The command line ``spo-jax``: arguments only."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Align a language model on preference pairs with Stable Preference Optimization (SPO).

  spo-jax train configs/quickstart.yaml        the whole way on built-in data, offline
  spo-jax train CONFIG --resume                go on where a run stopped
  spo-jax export RUN OUT                       a folder that transformers loads
  spo-jax evaluate RUN_OR_MODEL --data FILE    held-out log-probs and margins
  spo-jax dynamics CONFIG_OR_RUN               why probabilities moved: train with probes, or
                                               probe a run's checkpoints
  spo-jax report RUN                           figures and tables of a run as one HTML page
"""

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


def _parser() -> argparse.ArgumentParser:
    from spo_jax.tasks import TASKS

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("spo-jax", description=_DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

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
            formatter_class=raw,
            usage=f"spo-jax {name} {argument} [--resume] [--KEY VALUE ...]",
            add_help=False,
        )
        command.add_argument("-h", "--help", action="store_true", help="this text and every key")
        command.add_argument("config", nargs="?", metavar=argument, help=meaning)
        command.add_argument(
            "--resume", action="store_true", help="go on from the newest checkpoint of the run"
        )

    export = commands.add_parser(
        "export",
        help="Write a run's policy as a Hugging Face folder.",
        description="Write the policy of RUN as a folder that transformers loads: safetensors, "
        "config and tokenizer.",
    )
    export.add_argument("run", metavar="RUN", help="folder of a run (or of one of its stages)")
    export.add_argument("out", metavar="OUT", help="folder to make; must not exist")
    export.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="(default: as trained)"
    )

    evaluate = commands.add_parser(
        "evaluate",
        help="Held-out log-probs, margins and exact answers.",
        description="Score rows under a run's policy or a model. Preference pairs give accuracies, "
        "log-probs, and against a reference log-ratios and margins; SFT rows give loss and "
        "perplexity. A run is compared with the reference it was trained with.",
    )
    evaluate.add_argument("model", metavar="RUN_OR_MODEL", help="run, model folder or hub name")
    evaluate.add_argument("--data", required=True, help="file, folder or hub name of the rows")
    evaluate.add_argument("--split", default="test", help="split of a hub data set [test]")
    evaluate.add_argument("--kind", choices=("preference", "sft"), help="(default: by the columns)")
    evaluate.add_argument("--reference", help="run or model to compare with")
    evaluate.add_argument(
        "--task", choices=tuple(TASKS), help="also generate answers and grade them"
    )
    evaluate.add_argument("--max-new-tokens", type=int, help="of an answer (default: by the task)")
    evaluate.add_argument(
        "--outputs", metavar="FILE.jsonl", help="with --task: each answer and its verdict"
    )
    evaluate.add_argument("--batch-size", type=int, default=8, help="rows at once [8]")
    evaluate.add_argument("--max-prompt-length", type=int, default=1024, help="tokens [1024]")
    evaluate.add_argument("--max-completion-length", type=int, default=1024, help="tokens [1024]")
    evaluate.add_argument("--max-rows", type=int, help="only the first rows")
    evaluate.add_argument("--on-bad-row", choices=("error", "skip"), default="error")
    evaluate.add_argument("--chat-template", help="Jinja template or its file")
    evaluate.add_argument("--compute-dtype", default="float32", help="[float32]")
    evaluate.add_argument("--output", help="also write the result as JSON here")

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
    return parser


def _overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """``--a.b value`` and ``--a.b=value`` pairs; values are read as YAML."""
    from spo_jax.config_io import ConfigError, parse_value

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


def _train(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from spo_jax.config import BUILTIN_TASK
    from spo_jax.config_io import ConfigError
    from spo_jax.loop import Stopped

    if options.config is None or options.config.startswith("-"):
        raise ConfigError(f"name a configuration: spo-jax {options.command} CONFIG (see --help)")
    if options.command == "dynamics":
        if Path(options.config).is_dir():
            return _probe(options, overrides)
        from spo_jax.probing import probed_config as load_config
    else:
        from spo_jax.validation import load_config
    config = load_config(options.config, _overrides(overrides))
    only = None
    if options.command == "sft":
        if "sft" not in config.stages:
            raise ConfigError(
                f"stages={list(config.stages)} of {options.config} has no sft: add it, or give "
                "--stages '[sft]'"
            )
        only = "sft"

    from spo_jax.builtin import task_table
    from spo_jax.train import Trainer

    trainer = Trainer(config, resume=options.resume, only=only)
    try:
        results = trainer.run()
    except Stopped as stopped:
        print(
            f"\n{stopped}; everything is saved in {config.output_dir}. Go on with: "
            f"spo-jax {options.command} {options.config} --resume",
            file=sys.stderr,
        )
        return 128 + stopped.signal_number
    if BUILTIN_TASK in (config.data.train, config.sft_data.train):
        table = task_table(config, trainer.root, results)
        print(_table(table, _title(config)))
    else:
        print(_table([{"stage": k, **v.metrics} for k, v in results.items()], "held out"))
    for result in results.values():
        print(f"{result.folder}: metrics.jsonl, tensorboard/, checkpoints/")
    if options.command == "dynamics":
        return _probed([r.folder / "dynamics.jsonl" for r in results.values()], config.output_dir)
    last = results.get("preference") or list(results.values())[-1]
    print(f"Next: spo-jax export {last.folder} OUT")
    return 0


def _probe(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from spo_jax.config_io import ConfigError
    from spo_jax.probing import probe_run

    if options.resume:
        raise ConfigError(
            f"--resume would be ignored: {options.config} is a run, whose checkpoints are "
            "probed. Name its configuration to go on training"
        )
    return _probed(probe_run(options.config, _overrides(overrides)), options.config)


def _probed(written: list[Path], run: str) -> int:
    print("\n".join(str(path) for path in written if path.exists()))
    print(f"Next: spo-jax report {run}")
    return 0


def _title(config: Any) -> str:
    loss, solver = config.loss.name, config.solver.name
    return (
        f"Built-in arithmetic, loss {loss}; preference = {loss} + SPO ({solver}), baseline = {loss}"
    )


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


def _table(rows: list[dict[str, Any]], title: str) -> str:
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


def _export(options: argparse.Namespace) -> int:
    from spo_jax.export import export_run

    print(export_run(options.run, options.out, step=options.step, dtype=options.dtype))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from spo_jax.evaluation import evaluate_model

    result = evaluate_model(
        options.model,
        options.data,
        **{
            k: v
            for k, v in vars(options).items()
            if k not in ("command", "model", "data", "output")
        },
    )
    text = json.dumps(result, indent=2)
    if options.output:
        Path(options.output).write_text(text + "\n")
    print(text)
    return 0


def _report(options: argparse.Namespace) -> int:
    from spo_jax.report import make_report

    print(make_report(options.runs, options.out, labels=options.label))
    return 0


def _is_ours(error: BaseException) -> bool:
    """Raised by this package with words for the user, not by a library from inside."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status: 0 done, 2 wrong input, 128 + signal when stopped."""
    parser = _parser()
    options, overrides = parser.parse_known_args(arguments)
    if getattr(options, "help", False):
        return _help(parser, options.command)
    if overrides and options.command not in ("train", "sft", "dynamics"):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        if options.command in ("train", "sft", "dynamics"):
            return _train(options, overrides)
        return {"export": _export, "evaluate": _evaluate, "report": _report}[options.command](
            options
        )
    except KeyboardInterrupt:
        print("spo-jax: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, RuntimeError, OSError) as error:
        if not _is_ours(error):
            raise
        print(f"spo-jax: error: {error}", file=sys.stderr)
        return 2


def _help(parser: argparse.ArgumentParser, command: str) -> int:
    from spo_jax.config import describe
    from spo_jax.validation import choices

    found = next(a for a in parser._actions if a.dest == "command").choices[command]
    print(found.format_help())
    print("keys [default]:\n" + describe(choices()))
    return 0

"""``spo-jax export`` and ``evaluate``: what is done with a run's policy or a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spo_jax.cli.row_options import add_row_options
from spo_jax.cli.written_files import check_writable


def add_commands(commands: Any) -> None:
    """Enter the commands into the parser."""
    from spo_jax.tasks import TASKS

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
    export.add_argument(
        "--adapter",
        action="store_true",
        help="of a run with lora: its adapters, as peft loads them",
    )
    export.set_defaults(command_function=_export)

    evaluate = commands.add_parser(
        "evaluate",
        help="Held-out log-probs, margins and exact answers.",
        description="Score rows under a run's policy or a model. Preference pairs give accuracies, "
        "log-probs, and against a reference log-ratios and margins; unpaired rows the same but "
        "against KTO's reference point; SFT rows give loss and perplexity. A run is compared with "
        "the reference it was trained with.",
    )
    evaluate.add_argument("model", metavar="RUN_OR_MODEL", help="run, model folder or hub name")
    evaluate.add_argument("--data", required=True, help="file, folder or hub name of the rows")
    evaluate.add_argument("--split", default="test", help="split of a hub data set [test]")
    evaluate.add_argument(
        "--kind", choices=("preference", "unpaired", "sft"), help="(default: by the columns)"
    )
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
    add_row_options(evaluate)
    evaluate.add_argument("--compute-dtype", help="(default: as trained, else float32)")
    evaluate.add_argument("--output", help="also write the result as JSON here")
    evaluate.set_defaults(command_function=_evaluate)


def _export(options: argparse.Namespace) -> int:
    from spo_jax.training.export import export_adapters, export_run

    export = export_adapters if options.adapter else export_run
    from spo_jax.parallel.copies import named

    print(named(export(options.run, options.out, step=options.step, dtype=options.dtype)))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from spo_jax.checkpoints.atomic import to_json
    from spo_jax.evaluation.scoring import evaluate_model

    check_writable("--output", options.output)
    result = evaluate_model(
        options.model,
        options.data,
        **{
            k: v
            for k, v in vars(options).items()
            if k not in ("command", "command_function", "overrides", "model", "data", "output")
        },
    )
    text = to_json(result, f"evaluate {options.model}", indent=2)
    print(text, flush=True)
    if options.output:
        Path(options.output).write_text(text + "\n")
    return 0

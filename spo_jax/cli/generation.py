"""``spo-jax generate`` and ``judge``: a policy's outputs, and how they compare with others."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spo_jax.cli.row_options import ROW_OPTIONS, add_row_options
from spo_jax.cli.written_files import check_writable

_SETTINGS = (
    "generator", "split", "max_rows", "chat_template", "max_new_tokens", "max_prompt_length",
    "temperature", "top_k", "top_p", "seed", "batch_size", "compute_dtype",
    *ROW_OPTIONS,
)  # fmt: skip
_JUDGE = (
    "A judge is any command. It is started once, reads lines of JSON from stdin, each an object "
    "with id, instruction, output_1 and output_2, and answers each with a line on stdout: the id "
    "and a preference, 1 for the first output, 2 for the second, 1.5 for a tie. Every pair is "
    "asked in both orders and averaged. Verdicts are kept beside the outputs, in .verdicts.jsonl, "
    "and not asked again."
)


def add_commands(commands: Any) -> None:
    """Enter the commands into the parser."""
    generate = commands.add_parser(
        "generate",
        help="Outputs on a file of prompts, as AlpacaEval 2 reads them.",
        description="Answer the prompts of a file and write the answers as a JSON list of objects "
        "with instruction, output and generator, which the AlpacaEval 2 tool reads, with a report "
        "of their lengths beside it. A start that was stopped goes on where it was. " + _JUDGE,
    )
    generate.add_argument("model", metavar="RUN_OR_MODEL", help="run, model folder or hub name")
    generate.add_argument("--data", required=True, help="file, folder or hub name of the rows")
    generate.add_argument("--out", required=True, type=Path, metavar="OUTPUTS.json")
    generate.add_argument("--generator", metavar="NAME", help="(default: the model folder's name)")
    generate.add_argument("--split", default="test", help="split of a hub data set [test]")
    generate.add_argument("--max-rows", type=int, help="only the first rows")
    generate.add_argument(
        "--chat-template", metavar="FILE", help="Jinja (default: the tokenizer's)"
    )
    add_row_options(generate)
    generate.add_argument("--max-new-tokens", type=int, default=512, help="[512]")
    generate.add_argument(
        "--max-prompt-length", type=int, help="tokens (default: what the context leaves)"
    )
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy [0]")
    generate.add_argument("--top-k", type=int, help="draw from so many likeliest tokens")
    generate.add_argument("--top-p", type=float, help="draw from the fewest that hold this mass")
    generate.add_argument("--seed", type=int, default=0, help="[0]")
    generate.add_argument("--batch-size", type=int, default=64, help="rows at once [64]")
    generate.add_argument("--compute-dtype", help="(default: as trained, else float32)")
    generate.add_argument("--against", metavar="OTHER.json", help="outputs to be judged against")
    _add_judge(generate, required=False)
    generate.set_defaults(command_function=_generate)

    judge = commands.add_parser(
        "judge",
        help="Win rate of one file of outputs over another, by a judge of your own.",
        description="Compare two files of outputs on the instructions they share. " + _JUDGE,
    )
    judge.add_argument("outputs", metavar="OUTPUTS.json")
    judge.add_argument("others", metavar="OTHER.json")
    _add_judge(judge, required=True)
    judge.set_defaults(command_function=_judge)


def _add_judge(parser: Any, *, required: bool) -> None:
    parser.add_argument("--judge", metavar="COMMAND", required=required, help="see above")
    parser.add_argument(
        "--judge-timeout", type=float, default=600.0, help="seconds without an answer [600]"
    )


def _generate(options: argparse.Namespace) -> int:
    from spo_jax.evaluation.judge import check_judge, read_outputs
    from spo_jax.sampling.outputs import generate_outputs, shown_lengths

    check_writable("--out", options.out, makes_folder=True)
    if (options.judge is None) != (options.against is None):
        raise ValueError(
            "--judge and --against go together: a command, and outputs to hold against"
        )
    if options.judge is not None:
        # Before hours of generating.
        check_judge(options.judge)
        read_outputs(options.against)
    settings = {name: getattr(options, name) for name in _SETTINGS}
    report = generate_outputs(options.model, options.data, options.out, **settings)
    print(f"{options.out}: {shown_lengths(report)}")
    return 0 if options.judge is None else _compare(options, options.out, options.against)


def _judge(options: argparse.Namespace) -> int:
    return _compare(options, Path(options.outputs), options.others)


def _compare(options: argparse.Namespace, outputs: Path, others: str) -> int:
    from spo_jax.evaluation.judge import judge_outputs, shown_summary
    from spo_jax.sampling.outputs import write_json

    found = judge_outputs(outputs, others, command=options.judge, timeout=options.judge_timeout)
    path = outputs.with_suffix(".judged.json")
    write_json(path, found)
    print(f"{path}: {shown_summary(found)}")
    return 0

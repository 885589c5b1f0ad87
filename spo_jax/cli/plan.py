"""``spo-jax plan``: what a run would take on a machine that is not there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spo_jax.cli.written_files import check_writable

_PLAN = """\
Compile the update of CONFIG for a machine before it is rented: memory, collectives, time.

The real update, with its solver, loss, kernels and shardings, is compiled ahead of time from
shapes alone: no accelerator, no weights, no data. TPUs need pip install 'spo-jax[plan]'.

  spo-jax plan CONFIG --topology v5e:4x4      a TPU slice (v4, v5e, v5p, v6e, tpu7x)
  spo-jax plan CONFIG --topology gpu:8 --chip h100
                                              GPUs; without N of them, N CPU devices stand in
  spo-jax plan CONFIG --topology v5p:2x2x4 --search
                                              find mesh, remat and micro-batches that fit
Exit status: 0 it fits (or the memory is not known), 1 it does not, 2 wrong input.
Any key of the configuration can be set here as in spo-jax train (--mesh.fsdp 8).
"""


def add_commands(commands: Any) -> None:
    """Enter the command into the parser."""
    plan = commands.add_parser(
        "plan",
        help=_PLAN.splitlines()[0],
        description=_PLAN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="spo-jax plan CONFIG --topology NAME [options] [--KEY VALUE ...]",
        allow_abbrev=False,
    )
    plan.add_argument("config", metavar="CONFIG", help="YAML file")
    plan.add_argument("--topology", required=True, help="v5e:4x4, v5p:2x2x4, gpu:8, cpu:8, ...")
    plan.add_argument(
        "--stage",
        choices=("sft", "preference", "baseline"),
        help="(default: every stage; with --search the first one of pairs)",
    )
    plan.add_argument("--prompt-length", type=int, help="tokens (default: the largest bucket)")
    plan.add_argument("--completion-length", type=int, help="tokens (default: as above)")
    plan.add_argument("--architecture", metavar="FILE", help="a config.json in place of the model")
    plan.add_argument("--rows", type=int, help="rows of the data, to turn epochs into updates")
    plan.add_argument("--chip", help="what gpu:N or cpu:N stands for: h100, a100-80, v5e, ...")
    plan.add_argument("--hbm", type=float, metavar="GIB", help="memory of a device")
    plan.add_argument("--full", action="store_true", help="every array's sharding")
    plan.add_argument("--json", metavar="FILE", help="also write everything as JSON here")
    plan.add_argument("--search", action="store_true", help="find what fits and is fast")
    plan.add_argument("--budget", type=int, help="with --search: most compiles [12]")
    plan.add_argument(
        "--kernels", nargs="+", metavar="NAME", help="with --search: attention kernels to try"
    )
    plan.set_defaults(command_function=_plan, takes_keys=True)


def _plan(options: argparse.Namespace) -> int:
    from spo_jax.plan import describe_machine, machine_record, software

    _check(options)
    # Before anything starts JAX: it settles what devices there are.
    machine = describe_machine(options.topology, chip=options.chip)
    from spo_jax.cli.train import read_overrides, say_shipped
    from spo_jax.config.validation import load_config
    from spo_jax.plan.inputs import find_architecture
    from spo_jax.plan.text import machine_text

    config = load_config(options.config, read_overrides(options.overrides))
    say_shipped(options.config)
    stages = _stages(options, config)
    architecture = find_architecture(config, options.architecture)
    known = software()
    record = {"config": options.config, "versions": known, "machine": machine_record(machine)}
    print(", ".join(f"{name} {number}" for name, number in known.items()))
    print(machine_text(record["machine"]) + "\n", flush=True)
    work = _search if options.search else _plan_stages
    status = work(options, config, architecture, machine, stages, record)
    if options.json:
        from spo_jax.checkpoints.atomic import to_json

        Path(options.json).write_text(to_json(record, options.json, indent=2) + "\n")
    return status


def _check(options: argparse.Namespace) -> None:
    from spo_jax.config.parsing import ConfigError

    check_writable("--json", options.json)
    if not options.search:
        for name in ("budget", "kernels"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name} would be ignored: give --search too")
    else:
        for name in ("rows", "full"):
            if getattr(options, name):
                raise ConfigError(f"--{name} would be ignored with --search: plan what it finds")
    for name in ("prompt_length", "completion_length", "rows", "hbm", "budget"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected a positive number")


def _stages(options: argparse.Namespace, config: Any) -> tuple[str, ...]:
    from spo_jax.config.parsing import ConfigError

    if options.stage is not None and options.stage not in config.stages:
        raise ConfigError(
            f"--stage {options.stage}: {options.config} has {', '.join(config.stages)}; "
            f"add it with --stages '[{options.stage}]'"
        )
    if options.stage is not None:
        return (options.stage,)
    if not options.search:
        return config.stages
    pairs = tuple(stage for stage in config.stages if stage != "sft")
    return (pairs or config.stages)[:1]


def _plan_stages(options, config, architecture, machine, stages, record) -> int:
    from spo_jax.config.choices import rows_kind
    from spo_jax.plan import plan_stage
    from spo_jax.plan.inputs import count_rows
    from spo_jax.plan.text import plan_text

    record["stages"] = []
    for stage in stages:
        rows = options.rows
        if rows is None:
            kind = "sft" if stage == "sft" else rows_kind(config.loss)
            rows = count_rows(config.sft_data if stage == "sft" else config.data, kind)
        found = plan_stage(
            config,
            architecture,
            machine,
            stage,
            rows=rows,
            hbm=_bytes(options),
            prompt_length=options.prompt_length,
            completion_length=options.completion_length,
        )
        record["stages"].append(found)
        print(plan_text(found, record["machine"], full=options.full) + "\n", flush=True)
    record["fits"] = all(found["fits"] is not False for found in record["stages"])
    return 0 if record["fits"] else 1


def _search(options, config, architecture, machine, stages, record) -> int:
    from spo_jax.plan.search import search
    from spo_jax.plan.text import TRIED_HEADER, search_text, tried_text

    print(f"stage {stages[0]}\n{TRIED_HEADER}", flush=True)
    record["search"] = search(
        config,
        architecture,
        machine,
        stages[0],
        prompt_length=options.prompt_length,
        completion_length=options.completion_length,
        hbm=_bytes(options),
        budget=options.budget or 12,
        remat=_remat(config.model.remat),
        attention=tuple(options.kernels or (config.model.attention,)),
        say=lambda tried, plan: print(tried_text(tried), flush=True),
    )
    record["fits"] = record["search"]["best"] is not None
    print("\n" + search_text(record["search"]))
    return 0 if record["fits"] else 1


def _remat(own: str) -> tuple[str, ...]:
    """The default, what keeps the layers' products, nothing; and the configuration's own."""
    return tuple(dict.fromkeys(("elementwise", "dots_no_batch", "full", own)))


def _bytes(options: argparse.Namespace) -> float | None:
    return None if options.hbm is None else options.hbm * 2**30

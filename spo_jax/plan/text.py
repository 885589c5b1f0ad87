"""A plan's record as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spo_jax.plan.candidates import Tried
from spo_jax.plan.machines import GIB
from spo_jax.plan.stage_plan import RESERVE

LARGEST = 8
"""Rows of the table of shardings that are shown without ``--full``."""


def plan_text(record: Mapping[str, Any], machine: Mapping[str, Any], *, full: bool) -> str:
    """All that a plan of one stage says; ``full`` lists every leaf."""
    parts = [_head(record), _shardings(record, full), _memory(record, machine)]
    if "estimate" in record:
        parts += [_work(record, machine), _time(record)]
    return "\n\n".join([*parts, verdict(record, machine)])


def _head(record: Mapping[str, Any]) -> str:
    model, batch = record["model"], record["batch"]
    mesh = " ".join(f"{k}={v}" for k, v in record["mesh"].items())
    rows = " + ".join(
        f"{r['count']} {r['level']} rows of {r['prompt']} + {r['branches']} x {r['completion']}"
        for r in batch["rows"]
    )
    trained = ""
    if record["adapters"] is not None:
        trained = f", {record['adapters']:,} of adapters on them are trained"
    lines = [
        f"stage {record['stage']}",
        f"model    {record['parameters']:,} parameters in {model['param_dtype']}{trained}, "
        f"products in {model['compute_dtype']}; remat {model['remat']}, attention "
        f"{model['attention']}",
        f"mesh     {mesh}",
        f"batch    {rows}: {batch['tokens']:,} tokens an update, padding included, in "
        f"{batch['micro_batches']} micro-batch{'es' if batch['micro_batches'] > 1 else ''}",
    ]
    return "\n".join(lines)


def machine_text(machine: Mapping[str, Any]) -> str:
    """Devices and, where they are known, a chip's figures."""
    chip = machine["chip"]
    text = f"machine  {machine['topology']}: {machine['devices']} x {machine['device_kind']}"
    if chip is not None:
        shared = f" of {chip['devices']} JAX devices" if chip["devices"] > 1 else ""
        text += (
            f"; a chip {chip['name']}{shared} has {chip['hbm'] / GIB:.1f} GiB, "
            f"{chip['flops'] / 1e12:.0f} TFLOP/s in bfloat16, {chip['bandwidth'] / 1e9:.0f} GB/s "
            f"of memory, {chip['links'] / 1e9:.0f} GB/s of links both ways"
        )
    if machine["stand_in"]:
        text += (
            "\n         stand-in: arguments, shardings and collectives are the partitioner's; "
            "temporaries, fusions\n         and memory traffic are a CPU compiler's, kernels of "
            "the accelerator are not used"
        )
    return text


def _shardings(record: Mapping[str, Any], full: bool) -> str:
    groups = record["shardings"]
    table = [["group", "arrays", "GiB", "GiB a device"]]
    for group in groups:
        sizes = (f"{group[key] / GIB:.3f}" for key in ("bytes", "bytes_per_device"))
        table.append([group["name"], str(len(group["leaves"])), *sizes])
    total = (f"{sum(g[key] for g in groups) / GIB:.3f}" for key in ("bytes", "bytes_per_device"))
    table.append(["all arguments", str(sum(len(g["leaves"]) for g in groups)), *total])
    parts = [columns(table)]

    leaves = [(group["name"], leaf) for group in groups for leaf in group["leaves"]]
    if not full:
        leaves = sorted(leaves, key=lambda row: -row[1]["bytes_per_device"])[:LARGEST]
    table = [["group", "path", "shape", "dtype", "cut over", "MiB a device"]]
    for name, leaf in leaves:
        shape = "x".join(map(str, leaf["shape"])) or "-"
        size = f"{leaf['bytes_per_device'] / 2**20:.2f}"
        table.append([name, leaf["path"], shape, leaf["dtype"], leaf["spec"], size])
    title = "every array" if full else f"the {len(leaves)} largest on a device (--full: all)"
    parts.append(f"{title}\n{columns(table, left=(0, 1))}")
    for leaf in record["large_unsharded"]:
        parts.append(
            f"warning: {leaf['path']} takes {leaf['bytes_per_device'] / 2**20:.0f} MiB on every "
            f"device: {leaf['note']}"
        )
    return "\n\n".join(parts)


_MEMORY = {
    "arguments": "arguments",
    "outputs": "outputs",
    "aliased": "outputs that take over arguments (aliased)",
    "temporaries": "temporaries",
    "peak": "peak",
    "generated_code": "program",
    "needed": "needed: peak + program",
}


def _memory(record: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    memory = record["memory"]
    if "peak" not in memory:
        return f"memory on each device: refused by the compiler\n  {record['refusal']}"
    rows = [[text, f"{memory[key] / GIB:.2f}"] for key, text in _MEMORY.items()]
    compiler = " of a CPU compiler" if machine["stand_in"] else ""
    return f"GiB on each device (peak: {memory['source']}{compiler})\n{columns(rows)}"


def _work(record: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    counts, devices = record["counts"], machine["devices"]
    model, once = record["model_flops"] / devices, record["compiler_flops_loops_once"]
    lines = ["TFLOP of an update on each device"]
    terms = "6 N T" if record["adapters"] is None else "4 N T, adapters"
    if counts is not None:
        lines.append(
            f"  compiled   {counts['flops'] / 1e12:10.3f}  matrix products in the program, loops "
            "times their turns"
        )
    lines += [
        f"  model      {model / 1e12:10.3f}  {terms} + causal attention, one forward and backward "
        f"pass; / {devices} devices",
        f"  XLA        {once / 1e12:10.3f}  the compiler's own count: the body of a loop once",
    ]
    if counts is None:
        reason = record["counts_error"]
        lines.append(f"the program itself could not be read, so nothing is counted: {reason}")
        return "\n".join(lines)
    for name, count in counts["kernels_not_counted"].items():
        lines.append(f"  not counted: {count} calls of the kernel {name}")
    if counts["loops_of_unknown_length"]:
        lines.append(
            f"  {counts['loops_of_unknown_length']} loops of unknown length are counted once"
        )
    traffic = counts["memory_traffic"] / 1e9
    lines.append(f"memory traffic of an update: {traffic:.1f} GB a device")
    return "\n".join([*lines, _collectives(counts["collectives"])])


def _collectives(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "no collectives"
    table = [["collective", "devices", "count", "MiB handed in", "MiB sent (ring)"]]
    for row in rows:
        sizes = (f"{row[key] / 2**20:.1f}" for key in ("bytes", "sent"))
        table.append([row["kind"], str(row["group"]), str(row["count"]), *sizes])
    return f"collectives of an update, on each device\n{columns(table)}"


def _time(record: Mapping[str, Any]) -> str:
    found, run = record["estimate"], record["run"]
    if found is None:
        return "no estimate of time: the chip's speed is not known (--chip), or nothing is counted"
    share = found["efficiency"]
    lines = [
        "ESTIMATE of an update's seconds, from the counts above; nothing was run",
        f"  products      {found['compute']:9.4f}  at {share['compute']:.0%} of the bfloat16 peak",
        f"  memory        {found['memory']:9.4f}  at {share['memory']:.0%} of its bandwidth",
        f"  interconnect  {found['interconnect']:9.4f}  at {share['interconnect']:.0%} of one "
        "direction of one axis' links",
        f"  update        {found['overlapped']:9.4f} if all overlaps, {found['serial']:.4f} if "
        "nothing does",
        "  tokens/s      " + " to ".join(f"{n:,.0f}" for n in run["tokens_per_second"][::-1])
        + " (padding included)",
    ]  # fmt: skip
    what = f"the stage's {run['updates']:,} updates" if run["updates"] else "each 1,000 updates"
    hours = " to ".join(f"{h:.2f}" for h in run["hours"])
    lines.append(f"  hours         {hours} for {what}")
    if run["updates"] is None:
        lines.append(
            f"                ({run['epochs']:g} epochs of unknown rows: give their number, --rows)"
        )
    seconds = record["compiler_seconds_loops_once"]
    if seconds is not None:
        lines.append(f"  the compiler's own estimate, the body of a loop once: {seconds:.4f} s")
    return "\n".join(lines)


def verdict(record: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    """The last line: whether it fits."""
    memory = record["memory"]
    needed = "more" if memory["needed"] is None else f"{memory['needed'] / GIB:.2f}"
    if record["fits"] is None:
        return f"needs {needed} GiB a device; what it has is not known (--chip or --hbm)"
    if "usable" not in memory:
        has = "it has" if memory["hbm"] is None else f"{memory['hbm'] / GIB:.2f} GiB"
        return f"DOES NOT FIT {machine['topology']}: the compiler refuses it, {needed} GiB of {has}"
    says = "fits" if record["fits"] else "DOES NOT FIT"
    usable = memory["usable"] / GIB
    return (
        f"{says} {machine['topology']}: needs {needed} of {usable:.2f} GiB a device "
        f"({memory['hbm'] / GIB:.2f} less a reserve of {RESERVE:.0%})"
    )


def tried_text(tried: Tried) -> str:
    """A line of the search."""
    c = tried.candidate
    size = "-" if tried.needed is None else f"{tried.needed / GIB:.2f}"
    seconds = "-" if tried.seconds is None else f"{tried.seconds:.3f}"
    mesh = f"{c.data} x {c.fsdp} x {c.tensor}"
    fits = "fits" if tried.fits else "too large"
    return (
        f"{mesh:>14} {c.remat:>14} {c.accumulation:>6} {c.attention:>9} {fits:>10} {size:>9} "
        f"{seconds:>9}"
    )


TRIED_HEADER = (
    f"{'data fsdp tensor':>14} {'remat':>12} {'micro':>6} {'attention':>9} {'':>10} {'GiB':>9} "
    f"{'s/update':>9}"
)


def search_text(record: Mapping[str, Any]) -> str:
    """What a search found."""
    lines = []
    for row in record["too_large_by_arithmetic"]:
        mesh = " x ".join(map(str, row["mesh"]))
        lines.append(
            f"mesh {mesh} not compiled: arguments and a gradient alone are "
            f"{row['at_least'] / GIB:.2f} GiB a device"
        )
    if not record["finished"]:
        lines.append(f"budget of {len(record['tried'])} compiles spent: raise it with --budget")
    if record["best"] is None:
        lines.append("nothing that was tried fits")
    else:
        lines.append("best by estimated seconds (nothing overlapped):")
        lines.append(f"  {record['best']}")
    return "\n".join(lines)


def columns(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Aligned columns, two spaces in; those of ``left`` start alike, the others end alike."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def cell(text, i):
        return text.ljust(widths[i]) if i in left else text.rjust(widths[i])

    return "\n".join("  " + "  ".join(cell(t, i) for i, t in enumerate(row)) for row in rows)

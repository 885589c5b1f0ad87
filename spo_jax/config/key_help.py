"""Every key of a configuration with its default, as ``--help`` shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from spo_jax.config.schema import Config, Named

SECTIONS = {
    "data": "preference pairs",
    "sft_data": "SFT rows: for the stage sft, or the inner level (objective.inner_data: sft)",
    "loss": "the preference loss: name and its hyper-parameters; or a list, each with a weight",
    "solver": "the bilevel solver: name and its hyper-parameters",
    "outer": "optimizer of the preference update",
    "inner": "optimizer of the inner steps that some solvers take in the preference stage",
    "sft_optimizer": "optimizer of the SFT stage",
    "train": "loop of the preference stage",
    "sft": "loop of the SFT stage",
}


def describe(choices: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Every key with its default, as text; ``choices`` are the options of the named sections."""
    lines = []

    def line(key, default, text, hint=None):
        literal = next((h for h in (hint, *get_args(hint)) if get_origin(h) is Literal), None)
        if literal is not None and "|" not in text:
            text = f"{text}: {' | '.join(map(str, get_args(literal)))}"
        default = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        shown = "" if default is None else f" [{default}]"
        lines.append(f"  --{key:<34}{text}{shown}")

    for item in fields(Config):
        default = getattr(Config(), item.name)
        if not hasattr(default, "__dataclass_fields__"):
            line(item.name, default, item.metadata["help"])
    for item in fields(Config):
        section = getattr(Config(), item.name)
        if not hasattr(section, "__dataclass_fields__"):
            continue
        title = SECTIONS.get(item.name) or (type(section).__doc__ or "").strip().splitlines()[0]
        lines.append(f"\n{item.name}: {title}")
        if isinstance(section, Named):
            line(f"{item.name}.name", section.name, " | ".join(choices[item.name]))
            for name, options in choices[item.name].items():
                shown = ", ".join(k if v is None else f"{k} [{v}]" for k, v in options.items())
                lines.append(f"      {name}: {shown or 'no options'}")
            continue
        hints = get_type_hints(type(section))
        for entry in fields(section):
            line(
                f"{item.name}.{entry.name.replace('_', '-')}",
                getattr(section, entry.name),
                entry.metadata["help"],
                hints[entry.name],
            )
    return "\n".join(lines)

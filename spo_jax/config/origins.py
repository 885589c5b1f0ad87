"""Where each value of a configuration comes from: a file, the command line, or a default."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from spo_jax.config.parsing import Dumper, config_to_dict, read_chain
from spo_jax.config.validation import load_config, unused_sections

COMMAND_LINE = "command line"
DEFAULT = "default"

Origins: TypeAlias = dict[tuple[str, ...], tuple[str, Any]]
"""The path of each value somebody set -> who set it, and what to."""


def resolved_text(
    path: str | Path, overrides: Mapping[str, Any] | None = None, *, only_set: bool = False
) -> str:
    """The configuration that ``spo-jax train`` would run, as YAML; each value says who set it.

    Sections that nothing uses are left out, with ``only_set`` defaults too. Read again it is the
    same configuration.

    Raises:
        ConfigError: as ``load_config``.
    """
    config = load_config(path, overrides)
    origins = find_origins(path, overrides or {})
    unused = unused_sections(config)
    tree = {k: v for k, v in config_to_dict(config).items() if k not in unused}
    return "".join(f"{line}\n" for line in _lines(tree, origins, (), only_set))


def find_origins(path: str | Path, overrides: Mapping[str, Any]) -> Origins:
    """Who has the last word on each value that is set, by the rules of ``read_tree``."""
    chain = read_chain(path)
    often = Counter(file.name for file, _ in chain)
    origins: Origins = {}
    for file, tree in chain:
        _lay_over(origins, tree, file.name if often[file.name] == 1 else str(file), ())
    for key, value in overrides.items():
        place = tuple(part.replace("-", "_") for part in key.split("."))
        _replace(origins, value, COMMAND_LINE, place)
    return origins


def _lay_over(origins: Origins, tree: Mapping[str, Any], who: str, above: tuple[str, ...]) -> None:
    for key, value in tree.items():
        place = (*above, key)
        merged = isinstance(value, Mapping) and value
        if merged and any(len(p) > len(place) and p[: len(place)] == place for p in origins):
            _lay_over(origins, value, who, place)
        else:
            _replace(origins, value, who, place)


def _replace(origins: Origins, value: Any, who: str, place: tuple[str, ...]) -> None:
    for old in [p for p in origins if p[: len(place)] == place]:
        del origins[old]
    if isinstance(value, Mapping) and value:
        for key, inside in value.items():
            _replace(origins, inside, who, (*place, key))
    else:
        origins[place] = (who, value)


def _lines(
    tree: Mapping[str, Any], origins: Origins, above: tuple[str, ...], only_set: bool
) -> Iterator[str]:
    indent = "  " * len(above)
    for key, value in tree.items():
        place = (*above, str(key))
        if isinstance(value, Mapping) and value:
            inside = list(_lines(value, origins, place, only_set))
            if inside:
                yield f"{indent}{_dump(key)}:"
                yield from inside
            continue
        who = origins[place][0] if place in origins else DEFAULT
        if only_set and who == DEFAULT:
            continue
        first, *more = _leaf(key, value)
        yield f"{indent}{first}  # {who}"
        yield from (f"{indent}{line}" for line in more)


def _leaf(key: str, value: Any) -> list[str]:
    """A key and its value; one line, but for a list of mappings."""
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [f"{_dump(key)}:", *(f"- {_dump(item)}" for item in value)]
    return [f"{_dump(key)}: {_dump(value)}"]


def _dump(value: Any) -> str:
    """One line of YAML, whatever the value is."""
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text = yaml.dump(
        value,
        Dumper=Dumper,
        default_style=style,
        default_flow_style=True,
        sort_keys=False,
        width=float("inf"),
    )
    return text.removesuffix("\n").removesuffix("\n...")

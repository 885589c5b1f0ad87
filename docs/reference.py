"""Pages that the code writes: the public names, and the keys of a configuration.

``conf.py`` calls both before the site is built; nothing here is typed twice.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
import types
import typing
from pathlib import Path

import spo_jax
from spo_jax.config.choices import choices
from spo_jax.config.key_help import SECTIONS
from spo_jax.config.schema import Config, Named

PACKAGE = Path(spo_jax.__file__).parent

GROUPS = {
    "losses": ("Losses", "losses"),
    "solvers": ("Solvers", "solvers"),
    "objective": ("Objective", "objective"),
    "models": ("Models", "models policies"),
    "data": ("Data and types", "types data tasks sampling"),
    "training": ("Training", "config training checkpoints parallel"),
    "dynamics": ("Dynamics", "dynamics"),
    "study": ("Study, report, plan", "study report plan"),
}
"""Page -> its title and the rooms whose public names it has."""

WITHOUT_NAMES = {"cli", "evaluation"}
"""Rooms that are commands: nothing of them is imported from the front door."""


# The public names


def room_of(module: str) -> str:
    """``spo_jax.dynamics.bandit`` -> ``dynamics``."""
    return module.split(".")[1]


def public_names(room: str) -> tuple[list[str], list[str]]:
    """A room's names at the front door, and the others of its ``__all__``."""
    front = [name for name, module in spo_jax._MODULE_OF.items() if room_of(module) == room]
    own = getattr(importlib.import_module(f"spo_jax.{room}"), "__all__", [])
    return front, [name for name in own if name not in front]


def api_page(title: str, rooms: list[str]) -> str:
    """One page of the reference, for autodoc."""
    parts = [heading(title, "=")]
    for room in rooms:
        module = f"spo_jax.{room}"
        parts += [heading(f"spo_jax.{room}", "-"), f".. automodule:: {module}\n   :no-members:\n"]
        front, others = public_names(room)
        if front:
            parts.append(heading("At the front door", "^"))
            parts.append("To be imported from ``spo_jax``.\n\n.. currentmodule:: spo_jax\n")
            parts += [entry("spo_jax", room, name) for name in front]
        if others:
            parts.append(heading(f"In spo_jax.{room}", "^"))
            parts.append(f".. currentmodule:: {module}\n")
            parts += [entry(module, room, name) for name in others]
    return "\n".join(parts)


def api_index() -> str:
    """The page above the groups."""
    lines = [
        "# API\n\nThe public names, made of the docstrings. What stands *at the front door* is "
        "imported from `spo_jax`, the rest from its room.\n"
    ]
    for name, (title, rooms) in GROUPS.items():
        listed = ", ".join(f"`spo_jax.{room}`" for room in rooms.split())
        lines.append(f"- [{title}](api/{name}.rst): {listed}")
    listed = "\n".join(f"api/{name}" for name in GROUPS)
    return "\n".join([*lines, f"\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"])


def heading(text: str, line: str) -> str:
    """A heading of reStructuredText."""
    return f"{text}\n{line * len(text)}\n"


def entry(module: str, room: str, name: str) -> str:
    """The directive that documents ``module.name``."""
    found = getattr(importlib.import_module(module), name)
    if inspect.isclass(found):
        # The fields of a NamedTuple stand in its signature.
        members = "" if issubclass(found, tuple) else "   :members:\n"
        return f".. autoclass:: {name}\n{members}"
    if callable(found) and hasattr(found, "__code__"):
        return f".. autofunction:: {name}\n"
    text, value = constants(room).get(name, ("", repr(found)))
    shown = ", ".join(f"``{key}``" for key in found) if isinstance(found, dict) else f"``{value}``"
    body = "\n".join(f"   {line}" for line in [*text.splitlines(), "", shown])
    return f".. py:data:: {name}\n\n{body}\n"


@functools.cache
def constants(room: str) -> dict[str, tuple[str, str]]:
    """The text below a constant of a room, which autodoc sees where it is defined only, and its
    value in the source."""
    files = [*sorted((PACKAGE / room).rglob("*.py")), PACKAGE / f"{room}.py"]
    found = {}
    for path in filter(Path.is_file, files):
        for node, after in itertools.pairwise([*ast.parse(path.read_text()).body, ast.Pass()]):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            text = after.value if isinstance(after, ast.Expr) else None
            said = text.value if isinstance(text, ast.Constant) else ""
            for target in targets:
                if isinstance(target, ast.Name):
                    found[target.id] = inspect.cleandoc(str(said)), ast.unparse(node.value)
    return found


def source_signature(function: typing.Any, *, bound: bool = False) -> tuple[str, str | None]:
    """Arguments and result with the annotations as they stand in the source.

    Evaluated, ``Float[Array, "B n C"]`` would be a class with a long name. ``bound`` leaves out
    the first argument, ``self``.
    """
    signature = inspect.signature(function)
    shown = [p.replace(annotation=Verbatim.of(p)) for p in signature.parameters.values()]
    shown = [p for p in shown if not (bound and p.name in ("self", "cls"))]
    result = "" if inspect.isclass(function) else Verbatim.of(signature, "return_annotation")
    plain = inspect.Signature(shown)
    return str(plain), None if result in ("", inspect.Signature.empty) else repr(result)


class Verbatim:
    """An annotation whose ``repr`` is its source."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text

    @classmethod
    def of(cls, holder: typing.Any, name: str = "annotation") -> typing.Any:
        """That of a parameter or a signature, ``empty`` where there is none."""
        found = getattr(holder, name)
        if found is inspect.Parameter.empty:
            return found
        if isinstance(found, typing.ForwardRef):
            found = found.__forward_arg__
        return cls(found if isinstance(found, str) else getattr(found, "__name__", str(found)))


# The keys of a configuration


def configuration_page() -> str:
    """Every key of ``spo_jax.config.schema``: type, default, meaning."""
    default = Config()
    whole = [f for f in dataclasses.fields(Config) if not is_section(getattr(default, f.name))]
    parts = [
        "# Configuration\n",
        "A configuration is YAML with these keys, the sections as mappings. Each can be set on the "
        "command line too: `--outer.learning-rate 5e-7`, `--seed 1`. `spo-jax train --help` prints "
        "this page, `spo-jax config show CONFIG` what a file comes to and who set each value. An "
        "unknown key is an error that names the nearest one.\n",
        table(Config, default, "", whole),
    ]
    for field in dataclasses.fields(Config):
        section = getattr(default, field.name)
        if not is_section(section):
            continue
        title = SECTIONS.get(field.name) or (type(section).__doc__ or "").strip().splitlines()[0]
        parts.append(f"## {field.name}\n\n{title[:1].upper()}{title[1:].rstrip('.')}.\n")
        if isinstance(section, Named):
            parts.append(named_table(field.name, section))
        else:
            keys = dataclasses.fields(section)
            parts.append(table(type(section), section, f"{field.name}.", keys))
    return "\n".join(parts)


def is_section(value: typing.Any) -> bool:
    """Whether a key is a mapping of keys of its own."""
    return dataclasses.is_dataclass(value)


def table(kind: type, values: typing.Any, prefix: str, keys: typing.Iterable) -> str:
    """A row for each key."""
    hints = typing.get_type_hints(kind)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        default = shown_value(getattr(values, key.name))
        text = cell(key.metadata["help"])
        rows.append(
            f"| `{prefix}{key.name}` | {shown_type(hints[key.name])} | {default} | {text} |"
        )
    return "\n".join(rows) + "\n"


def named_table(section: str, default: Named) -> str:
    """The choices of a section by name, with their options."""
    options = ", ".join(f"{key}: {value}" for key, value in default.options.items())
    chosen = f"{{name: {default.name}{', ' + options if options else ''}}}"
    rows = [
        f"Default: `{chosen}`. An option without a default is required. What each computes: "
        f"[{section}](../{'losses' if section == 'loss' else 'solvers'}.md).\n",
        f"| `{section}.name` | options `{section}.…` |",
        "|---|---|",
    ]
    for name, keys in choices()[section].items():
        shown = ", ".join(
            f"`{key}`" if value is None else f"`{key}: {plain(value)}`"
            for key, value in keys.items()
        )
        rows.append(f"| `{name}` | {shown or 'none'} |")
    return "\n".join(rows) + "\n"


def shown_type(hint: typing.Any) -> str:
    """A type in the words of YAML: ``text``, ``number``, or the values themselves."""
    words = {str: "text", int: "integer", float: "number", bool: "true, false"}
    if dataclasses.is_dataclass(hint):
        keys = ", ".join(f"`{key.name}`" for key in dataclasses.fields(hint))
        return f"mappings of {keys}"
    words[types.NoneType] = "null"
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{plain(value)}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return ", ".join(shown_type(one) for one in inner)
    if origin is tuple:
        return f"list of {shown_type(inner[0])}"
    if origin is dict:
        of = "" if inner[1] is typing.Any else f" of {shown_type(inner[1])}"
        return f"mapping{of}"
    return words[hint]


def shown_value(value: typing.Any) -> str:
    """A default as YAML writes it."""
    return f"`{plain(value)}`"


def plain(value: typing.Any) -> str:
    """A value as YAML writes it in one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(plain, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {plain(v)}' for k, v in value.items())}}}"
    return str(value) if value != "" else "''"


def cell(text: str) -> str:
    """Text that may stand in a table's cell."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")

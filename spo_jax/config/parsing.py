"""YAML and command-line overrides -> a checked ``Config``, and back."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import functools
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from spo_jax.config.schema import MIXTURE, Config, MixedData, Named


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key and the mend."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 5e-7 as a string; this loader reads it as the number it is.

    A key that stands twice is an error: the first one would be ignored.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As in the base class, each key once."""
        node = super().compose_mapping_node(anchor)
        found = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in found:
                raise yaml.composer.ComposerError(
                    problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                )
            found.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node


class Dumper(yaml.SafeDumper):
    """Text that ``_Loader`` reads as a number, such as a name ``5e-7``, goes into quotes."""


for _side in (_Loader, Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def parse_value(text: str) -> Any:
    """One command-line value, read as YAML (``5e-7``, ``true``, ``[64, 128]``, ``{name: dpo}``).

    Raises:
        ConfigError: text that is no YAML.
    """
    try:
        return _load_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{text!r} is not valid YAML ({error}): put it in quotes") from None


def _load_yaml(text: str) -> Any:
    """YAML as plain values whose keys are words; every error is a ``ConfigError`` of one line."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{error.problem or error.context}{where}") from None
    except RecursionError:
        raise ConfigError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a date that is none, say
        raise ConfigError(" ".join(str(error).split())) from None
    _check_keys(value, ())
    return value


def _check_keys(value: Any, above: tuple[int, ...]) -> None:
    if id(value) in above:
        raise ConfigError("an anchor (&) stands inside what it names")
    if isinstance(value, list | tuple | dict):
        above = (*above, id(value))
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or not key or not key.isprintable():
                raise ConfigError(f"the key {key!r}: expected a word")
    for inside in value.values() if isinstance(value, dict) else value if above else ():
        if isinstance(inside, list | tuple | dict):
            _check_keys(inside, above)


def nearest(word: str, words: Sequence[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing when no word is near."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


SHIPPED = Path(__file__).parent.parent / "shipped"
"""The configurations of the repository's folder ``configs``, which an installation brings along."""


def find_config(path: str | Path) -> Path:
    """The file at ``path``; where there is none, the shipped configuration of that name.

    ``quickstart``, ``solvers/penalty.yaml`` and ``configs/quickstart.yaml`` name shipped ones.
    """
    path = Path(path)
    if path.is_file() or path.is_absolute() or ".." in path.parts:
        return path
    name = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    name = name if name.suffix == ".yaml" else name.with_name(f"{name.name}.yaml")
    shipped = SHIPPED / name
    return shipped if shipped.is_file() else path


def read_tree(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a YAML file (``find_config``) and lay ``overrides`` (``{"seed": 1}``) over it.

    A file may begin with another one's keys, ``base: other.yaml`` (beside it, or shipped): its own
    are laid over them, key by key; a section with a ``name`` (loss, solver, an optimizer), or an
    empty one (``columns: {}``), replaces the whole section.

    Raises:
        ConfigError: a missing file, one that is no YAML mapping, or bases that go in a circle.
    """
    tree: dict[str, Any] = {}
    for _, own in read_chain(path):
        tree = lay_over(tree, own)
    return override(tree, overrides or {})


def read_chain(path: str | Path, above: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """A file and those it starts from, the one without a ``base`` first, each with its own keys.

    ``above`` are the files that led here. Raises as ``read_tree``.
    """
    path = find_config(path)
    tree = read_file(path)
    base = tree.pop("base", None)
    if base is None:
        return [(path, tree)]
    if not isinstance(base, str):
        raise ConfigError(f"base={base!r} of {path}: expected the path of a configuration")
    above = (*above, path.resolve())
    beside = path.parent / base
    below = beside if beside.is_file() else find_config(base)
    below = below if below.is_file() else beside
    if below.resolve() in above:
        raise ConfigError(f"base={base} of {path} goes in a circle: one must not have a base")
    return [*read_chain(below, above), (path, tree)]


def lay_over(below: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """``below`` with the keys of ``tree``; one with a ``name``, or an empty one, is taken whole."""
    found = _copy(below)
    for key, value in tree.items():
        old = found.get(key)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        merged = both and value and "name" not in value
        found[key] = lay_over(old, value) if merged else _copy(value)
    return found


def read_file(path: Path) -> dict[str, Any]:
    """One file's own keys, its ``base`` not followed; raises as ``read_tree``."""
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        siblings += [p.stem for p in SHIPPED.glob("*.yaml")]
        raise ConfigError(f"no configuration at {path}{nearest(path.name, siblings)}")
    try:
        tree = _load_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8: see byte {error.start}") from None
    except ConfigError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping of keys, got a {type(tree).__name__}")
    return tree


def override(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``tree`` with dotted keys set; hyphens in keys are underscores."""
    found = _copy(tree)
    for key, value in overrides.items():
        _set(found, [part.replace("-", "_") for part in key.split(".")], value)
    return found


def config_from_tree(tree: Mapping[str, Any]) -> Config:
    """Plain YAML values -> ``Config``; unknown keys and wrong types are errors."""
    return _build(Config, tree, "")


def _copy(tree: Any) -> Any:
    return {k: _copy(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for depth, part in enumerate(path[:-1]):
        if tree.get(part) is None:  # a section's heading with nothing under it
            tree[part] = {}
        node = tree[part]
        if not isinstance(node, dict):
            raise ConfigError(f"{'.'.join(path[: depth + 1])} is a value, it has no keys inside")
        tree = node
    tree[path[-1]] = _copy(value)


def _build(kind: type, tree: Any, prefix: str) -> Any:
    name = prefix.rstrip(".") or "configuration"
    if tree is None:
        tree = {}
    if kind is Named and name == "loss" and isinstance(tree, list | tuple):
        return Named(MIXTURE, {"losses": [_copy(member) for member in tree]})
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{name} is a section: expected keys under it, got {tree!r}")
    if kind is Named:
        if "name" not in tree:
            # `--loss.beta 0.2` alone adjusts the default choice.
            base = getattr(Config(), name)
            return Named(base.name, {**base.options, **tree})
        return Named(str(tree["name"]), {k: v for k, v in tree.items() if k != "name"})
    hints = _hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    values = {}
    for key, value in tree.items():
        if key not in names:
            raise ConfigError(
                f"unknown key {prefix}{key}{nearest(str(key), names)}; "
                f"{name} takes {', '.join(names)}"
            )
        hint = hints[key]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            values[key] = _build(hint, value, f"{prefix}{key}.")
        else:
            values[key] = _coerce(value, hint, f"{prefix}{key}")
    default = getattr(Config(), prefix[:-1]) if prefix and prefix.count(".") == 1 else None
    return dataclasses.replace(default, **values) if default is not None else kind(**values)


@functools.cache  # a study builds hundreds of configurations
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """``value`` as the annotated type, or a ConfigError that says what was expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _coerce(value, option, key)
            except ConfigError:
                continue
        shown = [name for option in args for name in _type_names(option)]
        raise ConfigError(
            f"{key}={value!r}: expected {' | '.join(shown)}{nearest(str(value), shown)}"
        )
    if origin is Literal:
        if value in args:
            return value
        near = nearest(str(value), [str(a) for a in args])
        raise ConfigError(f"{key}={value!r}: expected {' | '.join(map(str, args))}{near}")
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        inside = isinstance(args[0], type) and dataclasses.is_dataclass(args[0])
        return tuple(
            _coerce(item, args[0], f"{key}.{number}" if inside else key)
            for number, item in enumerate(items)
        )
    if origin is dict:
        if isinstance(value, Mapping):
            inside = args[1]
            return {
                k: v if inside is Any else _coerce(v, inside, f"{key}.{k}")
                for k, v in value.items()
            }
        raise ConfigError(f"{key}={value!r}: expected a mapping of keys to values")
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}={value!r}: expected a mapping of keys to values")
        return _build(hint, value, f"{key}.")
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{key}: expected a number below 1e308") from None
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if hint is str and isinstance(value, datetime.date):  # as YAML reads 2026-11-26
        return value.isoformat()
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    expected = _type_names(hint)[0]
    raise ConfigError(f"{key}={value!r}: expected {expected}, got {type(value).__name__}")


def _type_names(hint: Any) -> list[str]:
    """An annotated type in the words of YAML; a ``Literal`` by its choices."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return [str(choice) for choice in args]
    if origin is tuple:
        return [f"list of {_type_names(args[0])[0]}"]
    if dataclasses.is_dataclass(hint):
        return ["mapping"]
    name = (origin or hint).__name__
    return [{"NoneType": "null", "dict": "mapping"}.get(name, name)]


def config_to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain YAML values."""
    return _plain(config)


def _plain(value: Any) -> Any:
    if isinstance(value, Named):
        if value.name == MIXTURE:
            return value.options["losses"]
        return {"name": value.name, **value.options}
    if isinstance(value, MixedData):  # what it does not say is as in its section
        return {k: _plain(v) for k, v in vars(value).items() if v is not None}
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def config_to_yaml(config: Config, *, without: Collection[str] = (), header: str = "") -> str:
    """The resolved configuration as the text of a file, less the sections ``without``."""
    tree = {k: v for k, v in config_to_dict(config).items() if k not in without}
    text = "".join(f"# {line}\n" for line in header.splitlines())
    return text + yaml.dump(tree, Dumper=Dumper, sort_keys=False)


def changed_keys(config: Config, saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ from those a run was saved with: ``{"a.b": (old, new)}``.

    A key that the version which saved it did not have counts as its default.
    """
    now, before = flat_tree(config_to_dict(config)), flat_tree(_with_defaults(saved, Config()))
    found = {k: (before.get(k), now.get(k)) for k in (*before, *now)}
    # An empty mapping has no keys of its own to compare: those of the other are.
    return {k: both for k, both in found.items() if both[0] != both[1] and {} not in both}


def _with_defaults(saved: Mapping[str, Any], section: Any) -> dict[str, Any]:
    """``saved`` with the values that ``section`` has for keys it lacks, and so on below."""
    tree = dict(saved)
    for field in dataclasses.fields(section):
        default = getattr(section, field.name)
        if field.name not in tree:
            tree[field.name] = _plain(default)
        elif dataclasses.is_dataclass(default) and not isinstance(default, Named):
            tree[field.name] = _with_defaults(tree[field.name] or {}, default)
    return tree


def flat_tree(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            found |= flat_tree(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found

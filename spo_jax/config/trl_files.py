"""What somebody gave TRL: a YAML or JSON file, or a command line with its flags."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spo_jax.config.parsing import ConfigError, nearest, parse_value, read_file
from spo_jax.config.trl_fields import FIELDS, OWN, RENAMED, TRAINERS
from spo_jax.config.trl_losses import TYPES

_COUNTS = ("num_processes", "nproc_per_node", "num_gpus")
_LAUNCHER = (*_COUNTS, "config_file", "accelerate_config", "num_machines", "nnodes")


class Asked(NamedTuple):
    """Settings by TRL's names, the trainer and the devices where the command line tells them."""

    given: dict[str, Any]
    trainer: str | None = None
    devices: int | None = None
    notes: tuple[str, ...] = ()


def read_trl(path: str | Path) -> Asked:
    """Read YAML, JSON, or a text with one command line (``trl dpo ...``, ``... dpo.py ...``).

    Raises:
        ConfigError: no such file, no settings in it, or a command that is none of TRL's.
    """
    path = Path(path)
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        return Asked(_read_mapping(path))
    if not path.is_file():
        raise ConfigError(f"no file at {path}: give a YAML, JSON or text with a command line")
    try:
        commands = _commands(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a command line: {error}") from None
    calls = [call for call in map(_call, commands) if call]
    if len(calls) != 1:
        raise ConfigError(
            f"{path} has {len(calls)} commands of TRL: one is expected, such as `trl dpo --config "
            "x.yaml` or `accelerate launch dpo.py --beta 0.1`"
        )
    trainer, launcher, flags = calls[0]
    given = _read_flags(flags)
    moved = {k: given.pop(k) for k in _LAUNCHER if k in given}
    launched = _read_flags(launcher) | moved
    config = given.pop("config", None)
    if config is not None:
        file = Path(str(config))
        beside = path.parent / file
        given = _read_mapping(file if file.is_file() or not beside.is_file() else beside) | given
    counts = [v for k, v in launched.items() if k in _COUNTS and type(v) is int]
    notes = []
    rest = [k for k in launched if k not in _COUNTS]
    if rest:
        notes.append(f"of the launcher only the number of processes is read, not {', '.join(rest)}")
    return Asked(given, trainer, counts[0] if counts else None, tuple(notes))


def find_trainer(given: Mapping[str, Any]) -> str:
    """The only trainer that takes all of the settings.

    Raises:
        ConfigError: none does, or several do.
    """
    left = set(TRAINERS)
    for name in given:
        left &= set(OWN.get(name, TRAINERS))
    kinds = given.get("loss_type")
    for kind in kinds if isinstance(kinds, list) else [kinds] if kinds else []:
        left &= {trainer for trainer in left if kind in TYPES[trainer]} or left
    if len(left) == 1:
        return left.pop()
    several = ", ".join(t for t in TRAINERS if t in left)
    raise ConfigError(
        f"the settings do not say which trainer they are of ({several or 'none takes them all'}): "
        "give --trainer dpo, cpo, orpo or kto"
    )


def _read_mapping(path: Path) -> dict[str, Any]:
    return {RENAMED.get(name, name): value for name, value in read_file(path).items()}


def _commands(text: str) -> list[list[str]]:
    """The words of each command of a shell script, its comments and redirections left out."""
    lexer = shlex.shlex(text.replace("\r\n", "\n").replace("\\\n", " "), posix=True,
                        punctuation_chars="|;&\n")  # fmt: skip
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    found: list[list[str]] = [[]]
    skipping = False
    for word in lexer:
        if word and set(word) <= set("|;&\n"):
            skipping = skipping and "\n" not in word
            found.append([])
        elif skipping or word.startswith("#") or re.match(r"\d*[<>]", word):
            skipping = True
        else:
            found[-1].append(word)
    return [words for words in found if words]


def _call(words: list[str]) -> tuple[str | None, list[str], list[str]] | None:
    """Trainer, flags of the launcher and flags of the script; None for another command."""
    while words and re.fullmatch(r"\w+=.*", words[0], re.DOTALL):
        words = words[1:]
    names = [Path(word).name for word in words]
    if "trl" in names[:-1]:
        at = names.index("trl") + 1
        command = words[at]
        if command not in TRAINERS:
            raise ConfigError(
                f"trl {command}: its losses are not those of pairs, {', '.join(TRAINERS)} are read"
                f"{nearest(command, TRAINERS)}"
            )
        return command, words[:at], words[at + 1 :]
    scripts = [i for i, name in enumerate(names) if name.endswith(".py")]
    if scripts:
        at = scripts[0]
        parts = set(re.split(r"[^a-z]+", names[at].lower().removesuffix(".py")))
        found = [trainer for trainer in TRAINERS if trainer in parts]
        return (found[0] if len(found) == 1 else None), words[:at], words[at + 1 :]
    return (None, [], words) if words and words[0].startswith("--") else None


def _read_flags(words: list[str]) -> dict[str, Any]:
    """``--a 1 --b --no_c --d x y`` as ``{a: 1, b: True, c: False, d: [x, y]}``."""
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            continue
        name, equals, value = word[2:].partition("=")
        values = [value] if equals else []
        while rest and not equals and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        name = name.replace("-", "_")
        if "$" in "".join(values):
            raise ConfigError(f"--{name} {' '.join(values)}: a variable of the shell; write it out")
        if not values and name.startswith("no_") and name not in FIELDS:
            found[RENAMED.get(name[3:], name[3:])] = False
            continue
        read = [parse_value(v) for v in values] or [True]
        found[RENAMED.get(name, name)] = read[0] if len(read) == 1 else read
    return found

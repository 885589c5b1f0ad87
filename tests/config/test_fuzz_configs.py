"""Configurations of every kind of damage: accepted, or one line that names the key or the file."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_jax.cli import main
from spo_jax.config.parsing import read_tree
from spo_jax.config.schema import Config
from spo_jax.training import run

ROOT = Path(__file__).parents[2]
FUZZ = settings(derandomize=True, deadline=None, database=None)
BASES = [
    read_tree(path)
    for path in [
        ROOT / "configs/quickstart.yaml",
        *sorted((ROOT / "configs/solvers").glob("*.yaml")),
    ]
] + [
    read_tree(
        ROOT / "configs/pairs.yaml",
        {"model.path": "MODEL", "data.train": "a.jsonl", "sft_data.train": "a.jsonl"},
    )
]


class Accepted(BaseException):
    """Raised in place of training: the configuration was taken."""


def _accept(*_: Any) -> None:
    raise Accepted


def outcome(*words: str) -> str | None:
    """What ``spo-jax train`` says against a configuration, ``None`` where it would train."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(run, "check_sizes", _accept),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            status = main(["train", *words])
        except Accepted:
            return None
    assert status == 2
    assert out.getvalue() == ""
    (line,) = err.getvalue().splitlines()
    assert line.startswith("spo-jax: error: ")
    assert len(line) < 12_000
    line.encode("utf-8")  # it can be printed
    return line.removeprefix("spo-jax: error: ")


def write(path: Path, tree: Any) -> str:
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("base", BASES, ids=lambda tree: tree["output_dir"])
def test_configurations_are_taken_as_they_are(base, tmp_path):
    assert outcome(write(tmp_path / "c.yaml", base)) is None


# Damage

_NAMES = st.one_of(
    st.text("abcdefghijklmnopqrstuvwxyz_-.", min_size=1, max_size=10),
    st.sampled_from(
        ["", " ", "learning rate", "päth", "a\nb", "\u2028", "x" * 3000, "name", "base"]
    ),
)
_VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([10**30, -(10**30), 2**63]),
        st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.5, 1e-300, 1e300, 0.5]),
        st.sampled_from(["", " ", "null", "auto", "dpo", "sgd", "penalty", "1e-3", "nan", "a\nb",
                         "x" * 3000, "os:system", "os.path:join", "none:none", ":", "a:", "\x00",
                         "/", "builtin:arithmetic", "builtin:", "{{", "reference"]),
        st.text(max_size=6),
    ),
    lambda inside: st.one_of(
        st.lists(inside, max_size=3), st.dictionaries(_NAMES, inside, max_size=2),
        st.dictionaries(st.one_of(st.integers(0, 3), st.none(), st.booleans()), inside, max_size=2),
    ),
    max_leaves=4,
)  # fmt: skip


def paths(tree: dict[str, Any], above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key of a tree, as the keys on the way to it."""
    found = []
    for key, value in tree.items():
        found.append((*above, key))
        if isinstance(value, dict):
            found += paths(value, (*above, key))
    return found


def known_keys() -> list[tuple[str, str]]:
    """Every (section, key) there is."""
    found = []
    for item in dataclasses.fields(Config):
        inside = getattr(Config(), item.name)
        keys = dataclasses.fields(inside) if dataclasses.is_dataclass(inside) else ()
        found += [(item.name, entry.name) for entry in keys] or [("", item.name)]
    return found


@st.composite
def damaged(draw: st.DrawFn) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """A valid configuration with one to three keys spoiled, and which ones."""
    tree = copy.deepcopy(draw(st.sampled_from(BASES)))
    spoiled = []
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths(tree)))
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        how = draw(st.sampled_from(["value", "value", "value", "drop", "typo", "new"]))
        if how == "value":
            parent[path[-1]] = draw(_VALUES)
        elif how == "drop":
            del parent[path[-1]]
        elif how == "typo":
            name = str(path[-1])
            at = draw(st.integers(0, len(name)))
            path = (*path[:-1], name[:at] + draw(st.sampled_from("exyz_")) + name[at:])
            parent[path[-1]] = parent.pop(name, draw(_VALUES))
        else:
            path = (*path[:-1], draw(_NAMES))
            parent[path[-1]] = draw(_VALUES)
        spoiled.append(path)
        if not tree:
            break
    return tree, spoiled


SECTIONS = {item.name for item in dataclasses.fields(Config)}
KNOWN = {f"{section}.{key}" if section else key for section, key in known_keys()}


def names_a_cause(text: str, config: Path, spoiled: list[tuple[Any, ...]] = ()) -> bool:
    """Whether an error names the file, a spoiled key, or the key that misses a spoiled one."""
    keys = {str(key).split("\n")[0][:40] for path in spoiled for key in path} - {""}
    section = text.split()[0].partition(".")[0]
    named = section in SECTIONS or any(key in text for key in keys | KNOWN)
    return named or str(config) in text


@pytest.mark.slow
@settings(FUZZ, max_examples=200)
@given(damaged())
def test_a_spoiled_key_is_taken_or_named(tmp_path_factory, damage):
    tree, spoiled = damage
    config = _folder(tmp_path_factory) / "config.yaml"
    said = outcome(write(config, tree))
    assert said is None or names_a_cause(said, config, spoiled), said


@pytest.mark.slow
@settings(FUZZ, max_examples=60)
@given(
    st.sampled_from(sorted({".".join(map(str, path)) for base in BASES for path in paths(base)})),
    st.one_of(_NAMES, st.sampled_from(
        ["null", "-1", ".nan", "{", "[1, 2", "&a *a", "!!python/name:os.system", "{a: 1, a: 2}",
         "1e999", "2020-01-01", "2020-13-41", "yes", "0x10", "? a", "- b", "{1: 2}"])),
)  # fmt: skip
def test_a_key_on_the_command_line_is_taken_or_named(tmp_path_factory, key, value):
    config = write(_folder(tmp_path_factory) / "config.yaml", BASES[0])
    said = outcome(config, f"--{key}={value}")
    keys = key.split(".")
    assert said is None or names_a_cause(said, Path(config), [(*keys, value)])


@settings(FUZZ, max_examples=60)
@given(st.data())
def test_a_file_that_is_no_configuration_is_named(tmp_path_factory, data):
    config = _folder(tmp_path_factory) / "config.yaml"
    content = (ROOT / "configs/quickstart.yaml").read_bytes()
    at = data.draw(st.integers(0, len(content)))
    junk = data.draw(st.one_of(
        st.binary(min_size=1, max_size=6),
        st.sampled_from(
            [b"\t", b"\n\t", b"\x00", b"\xff\xfe", b"{", b"[", b"*missing", b"&a [*a]", b"'", b'"',
             b"!!binary x", b"!!python/object:os.system {}", b"%", b"---\n", b"...\n", b"<<: 1\n",
             b"\n? [1, 2]\n: 3\n", b"\nseed: 1\n", b"\n2: 3\n", b"\nnull: 3\n"]),
    ))  # fmt: skip
    config.write_bytes(content[:at] + junk + (content[at:] if data.draw(st.booleans()) else b""))
    said = outcome(str(config))
    # What is still YAML may be other keys: one of those is named then.
    assert said is None or names_a_cause(said, config) or "unknown key" in said


_FOLDERS: list[Path] = []


def _folder(factory: pytest.TempPathFactory) -> Path:
    if not _FOLDERS:
        _FOLDERS.append(factory.mktemp("fuzz"))
    return _FOLDERS[0]


def test_minus_infinity_turns_the_alarm_off(tmp_path):
    tree = {**BASES[0], "train": {**BASES[0]["train"], "alarm_log_ratio": -math.inf}}
    assert outcome(write(tmp_path / "c.yaml", tree)) is None


QUICKSTART = (ROOT / "configs/quickstart.yaml").read_text()


@pytest.mark.wide
@pytest.mark.parametrize(
    ("content", "says"),
    [
        # What fuzzing found, mended: each was a traceback, several lines, or taken without a word.
        (b"\xff" + QUICKSTART.encode(), "no text in UTF-8: see byte 0"),
        (b"\x00", "not valid YAML: "),
        (b"seed: [1, 2", "expected ',' or ']', but got '<stream end>' in line 1, column 12"),
        (b"[" * 20_000, "nested too deeply"),
        (b"seed: 2020-13-41", "not valid YAML: month must be in 1..12"),
        (b"seed: 1\nmodel: {}\nseed: 2", "the key 'seed' stands twice in line 3, column 1"),
        (b"model: &a {init: *a}", "an anchor (&) stands inside what it names"),
        (b"false", "must be a mapping of keys, got a bool"),
        (b"1: 2", "the key 1: expected a word"),
        (b"model: {no: 2}", "the key False: expected a word"),
        (b"? \nmodel: {}", "the key None: expected a word"),
        (b'"a\\nb": 2', r"the key 'a\nb': expected a word"),
    ],
)
def test_files_found_by_fuzzing(content, says, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_bytes(content)
    said = outcome(str(config))
    assert said is not None
    assert says in said
    assert str(config) in said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"seed: -1", "seed=-1: expected a whole number of 32 bits from 0"),
        (b"outer: {weight_decay: .nan}", "outer.weight_decay=nan: expected a finite number"),
        (b"outer: {max_grad_norm: -1}", "outer.max_grad_norm=-1.0: expected a number above 0"),
        (b"outer: {options: {b1: 2}}", "outer.options.b1=2: expected a number from 0 to below 1"),
        (b"outer: {options: {eps: -1}}", "outer.options.eps=-1: expected 0 or more"),
        (b"outer: {learning_rate: 1" + b"0" * 400 + b"}", "outer.learning_rate: expected a number"),
        (b"train: {steps: 1" + b"0" * 30 + b"}", "train.steps=1000"),
        (b"sft: {steps: null, epochs: .inf}", "sft.epochs=inf: expected a finite number"),
        (b"data: {completion_buckets: [36, 8]}", "completion_buckets=[36, 8]: expected ascending"),
        (b"data: {max_prompt_length: 0}", "data.max_prompt_length=0: expected a whole number from"),
        (b"train: {alarm_log_ratio: .nan}", "train.alarm_log_ratio=nan: expected a finite number"),
        (b"mesh: {fsdp: 0}", "mesh.fsdp=0: expected a whole number from 1, or -1"),
        (b"task: {samples: 0}", "task.samples=0: expected a whole number from 1"),
        (b"loss: {name: ':'}", "loss.name=':': ValueError: Empty module name"),
        (b"loss: {name: 'math:inf'}", "loss.name='math:inf': TypeError"),
        (b"loss: {name: dpo, beta: .inf}", "loss.beta=inf: expected a number"),
    ],
)
def test_keys_found_by_fuzzing(content, says, tmp_path):
    (tmp_path / "base.yaml").write_text(QUICKSTART)
    config = tmp_path / "config.yaml"
    config.write_bytes(b"base: base.yaml\n" + content)
    said = outcome(str(config))
    assert said is not None
    assert says in said

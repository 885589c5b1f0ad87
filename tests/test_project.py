"""The house itself: configurations, scripts, commands in the documents, imports, sizes."""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from spo_jax.cli import make_parser
from spo_jax.cli.train import read_overrides
from spo_jax.config.parsing import read_tree
from spo_jax.config.validation import load_config
from spo_jax.study import read_study

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spo_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("**/*.yaml"))
DOCUMENTS = (
    "README.md", "CONTRIBUTING.md", "tpu/README.md", "docs/plan.md", "docs/long_runs.md",
)  # fmt: skip
MAX_LINES = 400


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Configurations


def header_commands(path: Path) -> list[list[str]]:
    """The ``spo-jax`` commands in the comment a configuration starts with, as words."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    text = "\n".join(lines).replace("\\\n", " ")
    found = [shlex.split(line, comments=True) for line in text.splitlines() if "spo-jax " in line]
    return [words for words in found if words[:1] == ["spo-jax"]]


@pytest.mark.parametrize("path", CONFIGS, ids=shown)
def test_configuration_is_valid_with_the_commands_of_its_header(path):
    commands = header_commands(path)
    assert commands, f"{shown(path)} does not start with its command"
    study = "run" in read_tree(path)
    for program, command, config, *rest in commands:
        assert (program, config) == ("spo-jax", shown(path))
        assert command in (("study",) if study else ("train", "sft", "plan"))
        read = read_study if study else load_config
        _, overrides = make_parser().parse_known_args([command, config, *rest])
        read(path, read_overrides(overrides))


def test_there_are_configurations():
    assert ROOT / "configs" / "quickstart.yaml" in CONFIGS


# Scripts


def scripts() -> list[Path]:
    """Files in the folders for scripts that end in ``.sh`` or start with a shell's ``#!``."""
    files = (p for folder in (".ci", "tpu", "benchmarks") for p in (ROOT / folder).glob("**/*"))
    found = []
    for path in files:
        if not path.is_file() or "venv" in shown(path):
            continue
        with path.open("rb") as file:
            first = file.readline()
        if path.suffix == ".sh" or (first.startswith(b"#!") and b"sh" in first):
            found.append(path)
    return sorted(found)


@pytest.mark.parametrize("path", scripts(), ids=shown)
def test_script_is_valid_and_can_be_run(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert os.access(path, os.X_OK), f"chmod +x {shown(path)}"


def test_there_are_scripts():
    names = {shown(path) for path in scripts()}
    assert names >= {".ci/run", "tpu/create.sh", "tpu/launch.sh", "tpu/resume.sh"}


# Commands in the documents


def code(document: str) -> str:
    """What a document sets as code: fenced blocks and inline."""
    text = (ROOT / document).read_text()
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return "\n".join([*fenced, *inline])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_configurations_a_document_names_exist(document):
    named = set(re.findall(r"configs/[\w./-]+\.yaml", (ROOT / document).read_text()))
    missing = sorted(name for name in named if not (ROOT / name).is_file())
    assert not missing, f"{document} names {missing}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_a_document_names_exist(document):
    parser = make_parser()
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    named = set(re.findall(r"\bspo-jax ([a-z][a-z-]*)", code(document)))
    assert named <= set(subparsers.choices), f"{document} names {named - set(subparsers.choices)}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_extras_a_document_installs_exist(document):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = re.findall(r"pip install -e ['\"]?\.\[([\w,]+)\]", code(document))
    unknown = {extra for names in named for extra in names.split(",")} - set(extras)
    assert not unknown, f"{document} installs {unknown}"


def test_readme_says_how_to_install_and_to_test():
    commands = code("README.md")
    assert "pip install -e '.[test]'" in commands
    assert "pytest -n 2" in commands
    assert "spo-jax train configs/quickstart.yaml" in commands


def test_requirements_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    assert {re.match(r"[\w.-]+", name)[0].lower() for name in wanted} <= pinned


# One direction of dependency

LAYERS = (
    ("types", "constraints", "config", "atomic", "checksums", "distributed"),
    ("config_io", "run_folder"),
    ("changes",),
    (
        "losses", "logprobs", "solvers", "models", "data",
        "sharding", "optimizers", "checkpoints", "trackers", "tasks", "figures",
        "text_statistics", "batches", "stopping",
    ),
    ("terms",),
    ("objectives", "generate", "bandit"),
    ("evaluate", "prepare", "validation", "loop", "step", "dynamics"),
    ("answers", "make_pairs", "probe_set"),
    ("builtin",),
    ("probes",),
    ("stages",),
    ("assembly",),
    ("train", "evaluation", "export", "report", "outputs", "judging"),
    ("probing", "study", "plan"),
    ("cli",),
    ("__main__",),
)  # fmt: skip
"""A room imports from earlier lines only; ``__init__``, the public API, may see all of them."""

LAYER = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}


def room_of(module: str) -> str:
    """The room of ``spo_jax.room.part``; what is no file is an attribute of ``__init__``."""
    _, *parts = module.split(".")
    if not parts:
        return "__init__"
    name = parts[0]
    exists = (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()
    return name if exists else "__init__"


def room_of_file(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every ``module.name`` a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{shown(path)}:{node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "spo_jax"}


def packages(path: Path) -> set[str]:
    """The packages a file imports from."""
    return {name.split(".")[0] for name in imports(path)}


def files_of(room: str) -> list[Path]:
    return [path for path in MODULES if room_of_file(path) == room]


def test_every_room_has_its_layer():
    rooms = {room_of_file(path) for path in MODULES} - {"__init__"}
    assert rooms == set(LAYER), "enter the room into LAYERS"


@pytest.mark.parametrize("path", [p for p in MODULES if p != PACKAGE / "__init__.py"], ids=shown)
def test_imports_go_one_way(path):
    room = room_of_file(path)
    for name in own_imports(path):
        target = room_of(name)
        if target == "__init__":
            assert name == "spo_jax.__version__", f"{room} imports {name} from the public API"
        elif target != room:
            assert LAYER[target] < LAYER[room], f"{room} imports {name}"


@pytest.mark.parametrize(
    ("room", "sees"),
    [
        ("solvers", ("spo_jax.solvers",)),
        ("losses", ("spo_jax.losses", "spo_jax.types")),
        ("logprobs", ("spo_jax.types", "spo_jax.parallel.constraints")),
        ("models", ("spo_jax.models", "spo_jax.types", "spo_jax.parallel.constraints")),
        ("data", ("spo_jax.data", "spo_jax.types", "spo_jax.parallel.processes")),
        ("terms", ("spo_jax.losses", "spo_jax.objective.logprobs", "spo_jax.types")),
        (
            "objectives",
            (
                "spo_jax.objective.terms", "spo_jax.losses", "spo_jax.objective.logprobs", "spo_jax.types",
                "spo_jax.solvers.base",
            ),
        ),
    ],
)  # fmt: skip
def test_what_a_room_may_see(room, sees):
    for path in files_of(room):
        outside = {
            n for n in own_imports(path) if not f"{n}.".startswith(tuple(f"{s}." for s in sees))
        }
        assert not outside, f"{shown(path)} imports {outside}"


def test_losses_know_no_parameters():
    for path in files_of("losses"):
        assert "spo_jax.types.Params" not in imports(path), shown(path)


@pytest.mark.parametrize(
    "room", [r for layer in LAYERS[LAYER["losses"] : LAYER["evaluate"]] for r in layer]
)
def test_middle_rooms_know_no_configuration(room):
    """Hyper-parameters reach them as keywords; the assembly reads them off the ``Config``."""
    for path in files_of(room):
        outside = {n for n in own_imports(path) if room_of(n) in ("config", "config_io")}
        assert not outside, f"{shown(path)} imports {outside}"


def test_flax_stays_inside_models():
    outside = [shown(p) for p in MODULES if "flax" in packages(p) and room_of_file(p) != "models"]
    assert not outside


def test_torch_is_nowhere():
    assert not [shown(p) for p in MODULES if "torch" in packages(p)]


# Size and documentation


@pytest.mark.parametrize("path", MODULES, ids=shown)
def test_module_reads_in_one_sitting(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{shown(path)} has {lines} lines: split it"


def undocumented(nodes: list[ast.stmt], prefix: str = "") -> list[str]:
    """Public functions, classes and methods without a docstring."""
    found = []
    for node in nodes:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        if not isinstance(node, kinds) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            found.append(f"{prefix}{node.name}")
        if isinstance(node, ast.ClassDef):
            found += undocumented(node.body, f"{prefix}{node.name}.")
    return found


@pytest.mark.parametrize("path", MODULES, ids=shown)
def test_what_is_public_is_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{shown(path)} has no docstring"
    assert not undocumented(tree.body)

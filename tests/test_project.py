"""The house itself: configurations, scripts, commands in the documents, imports, sizes."""

from __future__ import annotations

import argparse
import ast
import functools
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

import spo_jax
from spo_jax.cli import make_parser
from spo_jax.cli.train import read_overrides
from spo_jax.config.parsing import read_tree
from spo_jax.config.validation import load_config
from spo_jax.study import read_study
from spo_jax.study.iterated import read_rounds

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spo_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("**/*.yaml"))
DOCUMENTS = (
    "README.md", "CONTRIBUTING.md", "tpu/README.md", "configs/paper/README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
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


@pytest.mark.wide
@pytest.mark.parametrize("path", CONFIGS, ids=shown)
def test_configuration_is_valid_with_the_commands_of_its_header(path):
    commands = header_commands(path)
    assert commands, f"{shown(path)} does not start with its command"
    tree, own = read_tree(path), 0
    kind = "rounds" if "rounds" in tree else "study" if "run" in tree else "run"
    for program, command, config, *rest in commands:
        assert program == "spo-jax"
        own += config == shown(path)
        if config == shown(path):  # another one's may stand before it: what it starts from
            assert command in ({"run": ("train", "sft", "plan")}.get(kind, (kind,)))
        read = {"study": read_study, "rounds": read_rounds}.get(command, load_config)
        _, overrides = make_parser().parse_known_args([command, config, *rest])
        read(ROOT / config, read_overrides(overrides))
    assert own, f"no command in the header of {shown(path)} runs it"


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
def test_python_files_a_document_names_exist(document):
    named = set(re.findall(r"[\w.*]+/[\w./*]*\.py\b", code(document)))
    missing = [name for name in named if not any([*(ROOT / p).glob(name)] for p in ("", "tests"))]
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


# The rooms: one direction of dependency

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
MAX_FLOORS, MAX_ARROWS = 8, 90


def fenced(title: str) -> list[str]:
    """The lines of the first block of code below a heading of CONTRIBUTING."""
    _, _, text = CONTRIBUTING.partition(f"## {title}\n")
    return re.search(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1].splitlines()


LAYERS = [line.split() for line in fenced("One direction")]
"""The rule of directions as CONTRIBUTING prints it: a room imports from earlier lines only."""

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


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Every ``module.name`` a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{shown(path)}:{node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def own_imports(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "spo_jax"}


def packages(path: Path) -> set[str]:
    """The packages a file imports from."""
    return {name.split(".")[0] for name in imports(path)}


def files_of(room: str) -> list[Path]:
    return [path for path in MODULES if room_of_file(path) == room]


def arrows() -> set[tuple[str, str]]:
    """Which room imports from which; the front door, which names all of them lazily, is none."""
    return {
        (room_of_file(path), room_of(name))
        for path in MODULES
        for name in own_imports(path)
        if room_of(name) not in ("__init__", room_of_file(path))
    }


def test_the_top_of_the_package_is_rooms():
    files = {path.name for path in PACKAGE.glob("*.py")}
    assert files == {"__init__.py", "__main__.py", "types.py"}


def test_every_room_has_its_layer_and_its_line_in_the_tree():
    rooms = {room_of_file(path) for path in MODULES} - {"__init__"}
    assert rooms == set(LAYER), "enter the room into CONTRIBUTING, One direction"
    tree = {line.split()[0].removesuffix("/").removesuffix(".py") for line in fenced("The house")}
    assert rooms - {"__main__"} <= tree, "enter the room into CONTRIBUTING, The house"


@pytest.mark.parametrize("path", [p for p in MODULES if p != PACKAGE / "__init__.py"], ids=shown)
def test_imports_go_one_way(path):
    room = room_of_file(path)
    for name in own_imports(path):
        target = room_of(name)
        if target == "__init__":
            assert name == "spo_jax.__version__", f"{room} imports {name} from the public API"
        elif target != room:
            assert LAYER[target] < LAYER[room], f"{room} imports {name}"


def test_floors_and_arrows_between_rooms():
    assert len(LAYERS) <= MAX_FLOORS
    found = arrows()

    def floor(room: str) -> int:  # ends: imports go one way
        return 1 + max((floor(target) for source, target in found if source == room), default=0)

    assert max(map(floor, LAYER)) <= MAX_FLOORS
    assert len(found) <= MAX_ARROWS


def test_no_file_name_twice():
    names = sorted(path.name for path in MODULES if path.name != "__init__.py")
    assert len(names) == len(set(names)), {name for name in names if names.count(name) > 1}


_ENDINGS = (
    "", "e", "s", "es", "ed", "d", "er", "ers", "or", "ors", "r", "ing", "ings", "ion", "ions",
    "ation", "ations", "ated", "ment", "ments", "y", "ies", "al", "able",
)  # fmt: skip


def differ_by_an_ending(a: str, b: str) -> bool:
    """``table`` and ``tables``, ``evaluate`` and ``evaluation``, ``probes`` and ``probe_set``."""
    words, others = a.split("_"), b.split("_")
    if len(words) > 1 and len(others) > 1 and words[1:] != others[1:]:
        return False
    a, b = words[0], others[0]
    same = next((i for i in range(min(len(a), len(b))) if a[i] != b[i]), min(len(a), len(b)))
    return same >= 3 and a[same:] in _ENDINGS and b[same:] in _ENDINGS


@pytest.mark.parametrize(
    ("a", "b"),
    [("evaluate", "evaluation"), ("probe_set", "probes"), ("probes", "probing"),
     ("search", "searching"), ("table", "tables"), ("generate", "generation"),
     ("train", "training")],
)  # fmt: skip
def test_the_pairs_that_once_differed_by_an_ending_are_known(a, b):
    assert differ_by_an_ending(a, b)


@pytest.mark.parametrize(
    "folder", sorted({p.parent for p in MODULES}), ids=lambda folder: shown(folder)
)
def test_no_two_names_in_a_room_differ_by_an_ending(folder):
    names = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    names |= {path.parent.name for path in folder.glob("*/__init__.py")}
    alike = [(a, b) for a in names for b in names if a < b and differ_by_an_ending(a, b)]
    assert not alike


def test_from_the_command_to_the_update_are_two_modules_at_most():
    """Between ``cli.train`` and ``training.update``, along imports."""
    seen, reached = 0, {"spo_jax.cli.train"}
    by_module = {module_of(path): path for path in MODULES}
    while "spo_jax.training.update" not in reached:
        seen += 1
        names = {name for module in reached for name in own_imports(by_module[module])}
        reached |= {m for name in names for m in (name, name.rpartition(".")[0]) if m in by_module}
        assert seen <= 3


@pytest.mark.parametrize(
    ("room", "sees"),
    [
        ("solvers", "solvers"),
        ("losses", "losses"),
        ("tasks", "tasks"),
        ("parallel", "parallel"),
        ("models", "models types parallel"),
        ("data", "data types parallel"),
        ("checkpoints", "checkpoints types parallel"),
        ("objective", "objective losses types parallel solvers.base"),
        ("config", "config losses solvers tasks"),
    ],
)
def test_what_a_room_may_see(room, sees):
    allowed = tuple(f"spo_jax.{name}." for name in sees.split())
    for path in files_of(room):
        outside = {n for n in own_imports(path) if not f"{n}.".startswith(allowed)}
        assert not outside, f"{shown(path)} imports {outside}"


def test_losses_know_no_parameters():
    for path in files_of("losses"):
        assert "Params" not in path.read_text(), shown(path)


def test_flax_stays_inside_models():
    outside = [shown(p) for p in MODULES if "flax" in packages(p) and room_of_file(p) != "models"]
    assert not outside


def test_torch_is_nowhere():
    assert not [shown(p) for p in MODULES if "torch" in packages(p)]


def test_tests_mirror_the_rooms():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    own = {path.name for path in (ROOT / "tests").iterdir() if (path / "__init__.py").is_file()}
    assert own == rooms | {"tpu"}


def test_readme_imports_the_front_door():
    names = re.findall(r"^\s*(?:from|import) (spo_jax[\w.]*)", code("README.md"), re.MULTILINE)
    assert names
    assert all(name.count(".") <= 1 for name in names), names


def test_type_checkers_see_the_front_door():
    """``__init__.pyi`` lists what ``__init__.py`` imports when it is first used, and is shipped."""
    seen = {}
    for node in ast.parse((PACKAGE / "__init__.pyi").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            # "X as X": that is what makes a name of a stub public.
            assert all(alias.asname == alias.name for alias in node.names), node.module
            seen |= {alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.AnnAssign):
            seen[node.target.id] = "spo_jax"
    assert seen == spo_jax._MODULE_OF | {"__version__": "spo_jax"}
    assert all(hasattr(spo_jax, name) for name in seen)
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {"py.typed", "*.pyi"} <= set(setup["package-data"]["spo_jax"])


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


# Numbers


def test_what_is_written_as_json_is_strict():
    """``to_json`` refuses NaN; ``json.dumps`` is left to what holds no computed number."""
    plain = {
        "checkpoints/atomic.py",  # to_json itself
        "checkpoints/frozen.py", "checkpoints/run_folder.py",  # integers, names
        "parallel/processes.py", "parallel/failures.py",  # read back by this program
        "parallel/lease.py", "parallel/copies.py",  # names and counts, read back too
        "models/peft.py", "policies/kept_format.py", "training/pinned.py",  # settings
        "models/saving.py", "models/tensor_files.py", "policies/loading.py",  # a given config.json
        "evaluation/judge.py", "sampling/make_pairs/journal.py", "sampling/outputs.py",  # hashes
        "data/written.py", "study/runner.py", "study/table.py",  # given; compared; allow_nan=False
    }  # fmt: skip
    used = {
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES
        if "json.dumps(" in path.read_text() or "json.dump(" in path.read_text()
    }
    assert used <= plain

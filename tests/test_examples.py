"""The examples run as they stand there, and import the front door."""

import ast
import importlib.util
import json
import re
import runpy
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from spo_jax.config.validation import checked_config
from spo_jax.losses import PairLogprobs, make_preference_loss
from spo_jax.objective import make_objective
from spo_jax.parallel.mesh import make_mesh
from spo_jax.solvers import make_penalty
from spo_jax.training.stage import make_stage
from spo_jax.training.update import init_state, make_train_step
from spo_jax.types import BilevelBatch
from tests.solvers.test_solvers import START, levels
from tests.tiny import Bigram, random_batch, tiny_logprobs, tiny_model, tiny_params

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOK = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(c["source"]) for c in NOTEBOOK["cells"] if c["cell_type"] == "code"]


def load(name):
    """An example as a module, without running it."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def numbers(line):
    return [float(x) for x in re.findall(r"[-+]?\d+\.\d+", line)]


def test_what_is_there():
    names = {path.name for path in EXAMPLES.iterdir() if path.name != "__pycache__"}
    tried = {"bandit.py", "first_steps.ipynb", "own_loss.py", "own_solver.py"}
    assert names == tried, "every example has a test here"
    assert len((EXAMPLES / "own_loss.py").read_text().splitlines()) < 60


@pytest.mark.parametrize("code", [*(p.read_text() for p in SCRIPTS), "\n".join(CELLS)])
def test_examples_import_the_front_door(code):
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module)
    own = [name for name in found if name.split(".")[0] == "spo_jax"]
    assert own
    assert all(name.count(".") <= 1 for name in own), own


def test_bandit(capsys):
    plain, spo = printed("bandit", capsys).split("DPO + SPO")
    start, *_, end = [numbers(line)[:3] for line in plain.splitlines() if "|" in line]
    assert start == [0.3, 0.3, 0.4]
    assert end == [0.0, 0.0, 1.0]  # all of it leaks to what no pair names
    held = numbers(spo.splitlines()[-1])
    assert held[0] > 0.5
    assert held[2] < 0.2


def test_own_solver(capsys):
    lines = printed("own_solver", capsys).splitlines()
    found = {line[:10].strip(): numbers(line) for line in lines[1:]}
    assert found["plain DPO"][0] < 0.01
    assert found["your own"][0] > 0.5
    assert found["your own"][3] < -0.5  # inside its region


def test_own_solver_is_a_hinge_of_some_width():
    make = load("own_solver").make_smooth_hinge
    chain = optax.sgd(0.1)
    gap = float(levels().inner(START, 0)[0])
    for tolerance, weight in ((gap, 15.0), (gap - 5.0, 30.0), (gap + 5.0, 0.0)):
        own = make(outer=chain, tolerance=tolerance)
        hinge = make_penalty(outer=chain, penalty="hinge", penalty_weight=30.0, tolerance=tolerance)
        after, (_, metrics) = own.update(own.init(START), 0, levels())
        assert float(metrics["penalty_weight"]) == pytest.approx(weight, abs=1e-3)
        if tolerance != gap:
            wanted, _ = hinge.update(hinge.init(START), 0, levels())
            jax.tree.map(np.testing.assert_allclose, after.params, wanted.params)
    with pytest.raises(ValueError, match="width=0"):
        make(outer=chain, width=0)


def test_own_solver_in_a_run(monkeypatch):
    """A stage of a configuration that names it takes an update of a model."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    config = checked_config(
        {
            "model": {"path": "policy"},
            "data": {"train": "pairs.jsonl"},
            "train": {"steps": 2},
            "solver": {"name": "own_solver:make_smooth_hinge", "tolerance": -0.025},
        }
    )
    loss = make_preference_loss("dpo", beta=0.1)
    model = tiny_model()
    stage = make_stage(config, "preference", model, loss, make_mesh(), steps=2)
    assert stage.tolerance == -0.025
    state = init_state(stage.solver, stage.objective, tiny_params(model), jax.random.PRNGKey(0))
    step = make_train_step(
        stage.objective, stage.solver, schedule=stage.schedule, tolerance=stage.tolerance
    )
    _, metrics = jax.jit(step)(state, BilevelBatch(preference=random_batch()))
    assert 0 <= float(metrics["penalty_weight"]) <= 30
    assert not metrics["skipped"]


def test_own_loss_by_hand():
    one = np.ones(2, np.float32)
    policy = PairLogprobs(np.float32([-9, -30]), np.float32([-12, -50]), one, one)
    reference = PairLogprobs(np.float32([-10, -10]), np.float32([-11, -11]), one, one)
    own = load("own_loss").squared_hinge_loss
    np.testing.assert_allclose(own(policy, reference, beta=0.1), [0.64, 0.0], atol=1e-6)
    objective = make_objective(tiny_logprobs(Bigram()), make_preference_loss(own, beta=0.1))
    assert objective.paired_inner_value


@pytest.mark.long
def test_own_loss(capsys):
    plain, spo = [numbers(line) for line in printed("own_loss", capsys).splitlines()]
    assert plain[0] < -3
    assert spo[0] > -0.5
    assert plain[1] < plain[0]
    assert spo[1] < spo[0]


def test_the_notebook_has_no_outputs():
    assert NOTEBOOK["nbformat"] == 4
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] == "markdown" or (
            not cell["outputs"],
            cell["execution_count"],
        ) == (
            True,
            None,
        )
        assert cell["id"]
    assert all(len(line) <= 110 for cell in CELLS for line in cell.splitlines())


def test_the_notebook_up_to_the_model(capsys):
    names = {}
    for cell in CELLS[:3]:
        exec(compile(cell, "first_steps.ipynb", "exec"), names)
    out = capsys.readouterr().out
    assert "··10+07=" in out
    assert out.count("scored: 22") == 2


@pytest.mark.long
def test_the_notebook(capsys):
    names = {}
    for cell in CELLS:
        exec(compile(cell, "first_steps.ipynb", "exec"), names)
    plain, spo = names["found"]["plain DPO"], names["found"]["DPO + SPO"]
    assert plain["chosen"] < 0 < spo["chosen"]
    assert plain["margin"] > 1
    assert spo["margin"] > 1
    assert "DPO + SPO: chosen +" in capsys.readouterr().out

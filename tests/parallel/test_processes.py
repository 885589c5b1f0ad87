"""Describing several processes, and deciding together where there is one alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.cli import main
from spo_jax.parallel import processes
from spo_jax.parallel.mesh import make_mesh
from spo_jax.parallel.processes import (
    ENVIRONMENT,
    DistributedError,
    Vote,
    by_first,
    everywhere,
    gathered,
    initialize,
)


@pytest.fixture(autouse=True)
def nobody_joins(monkeypatch):
    """No test here opens a port; what would have been asked of jax is kept."""
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: asked.append(given))
    monkeypatch.setattr(processes, "watch", lambda: asked.append("watch"))
    for variable in ENVIRONMENT.values():
        monkeypatch.delenv(variable, raising=False)
    yield asked
    jax.config.update("jax_enable_preemption_service", True)


def test_flags_environment_and_neither(nobody_joins, monkeypatch):
    initialize("host:1234", 4, 2)
    initialize()  # jax finds out by itself
    for name, value in zip(ENVIRONMENT.values(), ("other:99", "8", "7"), strict=True):
        monkeypatch.setenv(name, value)
    initialize()
    initialize(process_id=3)
    assert nobody_joins[::2] == [
        ("host:1234", 4, 2),
        (None, None, None),
        ("other:99", 8, 7),
        ("other:99", 8, 3),
    ]
    assert nobody_joins[1::2] == ["watch"] * 4  # for one that fails


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"num_processes": 4, "process_id": 1}, "without --coordinator: give all three"),
        ({"process_id": 1}, "without --coordinator, --num-processes"),
        ({"coordinator": "host"}, "coordinator 'host': expected HOST:PORT"),
        ({"coordinator": "host:http"}, "coordinator 'host:http'"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "process_id=2 of num_proc"),
    ],
)
def test_an_impossible_description_is_one_clear_error(given, part, nobody_joins, capsys):
    with pytest.raises(DistributedError, match=re.escape(part)):
        initialize(**given)
    flags = [x for k, v in given.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    assert main(["train", "configs/quickstart.yaml", *flags]) == 2
    assert part in capsys.readouterr().err
    assert nobody_joins == []


def test_a_variable_that_is_no_number(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "four")
    with pytest.raises(DistributedError, match="JAX_NUM_PROCESSES='four': expected a whole number"):
        initialize()


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (ValueError("it should be defined."), ["no cluster was found", "--coordinator"]),
        (RuntimeError("DEADLINE: no answer\nmore"), ["did not reach host:1: DEADLINE: no answer."]),
    ],
)
def test_what_jax_says_comes_with_the_mend(monkeypatch, error, parts):
    def fail(*given):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    given = ("host:1", 2, 1) if isinstance(error, RuntimeError) else ()
    with pytest.raises(DistributedError) as caught:
        initialize(*given)
    for part in parts:
        assert part in str(caught.value)
    assert getattr(caught.value, "exit_status", 2) == (75 if given else 2)


def test_one_process_decides_alone():
    """Values need not even be JSON then, and errors are what they are."""
    assert by_first(lambda: {1, 2}) == {1, 2}
    with pytest.raises(KeyError):
        by_first({}.popitem)
    assert int(Vote(make_mesh()).ask(15)) == 15
    np.testing.assert_array_equal(gathered([1, 2]), [1, 2])
    np.testing.assert_array_equal(everywhere(jnp.arange(3)), [0, 1, 2])

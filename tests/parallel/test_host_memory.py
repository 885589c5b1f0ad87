"""What a long compilation leaves behind goes back to the system."""

import ctypes
from types import SimpleNamespace

import jax.monitoring
import pytest

from spo_jax.parallel import host_memory
from spo_jax.parallel.host_memory import LONG_COMPILATION, free_behind_compiler

EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def listeners(monkeypatch):
    """Those that are entered, which JAX has no public way to take back."""
    found = []
    register = "register_event_duration_secs_listener"
    monkeypatch.setattr(jax.monitoring, register, found.append)
    free_behind_compiler.cache_clear()
    yield found
    free_behind_compiler.cache_clear()


def test_once_behind_each_long_compilation(listeners, monkeypatch):
    calls = []
    library = SimpleNamespace(malloc_trim=calls.append)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: library)
    free_behind_compiler()
    free_behind_compiler()
    (listener,) = listeners
    listener(EVENT, LONG_COMPILATION, fun_name="step")
    assert calls == [0]
    listener(EVENT, LONG_COMPILATION / 2)
    listener("/jax/core/compile/jaxpr_trace_duration", 60.0)
    assert calls == [0]


@pytest.mark.parametrize("library", [SimpleNamespace(), TypeError("no name")])
def test_nothing_with_another_library(listeners, monkeypatch, library):
    def load(name):
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr(host_memory.ctypes, "CDLL", load)
    free_behind_compiler()
    assert listeners == []


def test_jax_tells_of_compilations_by_that_name():
    seen = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: seen.append(event)
    )
    jax.jit(lambda x: x * 3.25 - 1.75)(2.0)
    assert EVENT in seen


def test_the_library_here_takes_it():
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        pytest.skip("this C library keeps nothing that could be asked back")
    assert trim(0) in (0, 1)

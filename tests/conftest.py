"""Eight simulated CPU devices and no network, before JAX or the hub client is imported.

On an accelerator, ``JAX_PLATFORMS=cuda,cpu pytest``: tests that need eight devices are skipped.
"""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.machine import CACHE, WITHOUT_TORCH, shared_cache, xla_flags

if os.environ.setdefault("JAX_PLATFORMS", "cpu") != "cpu":
    # Else float32 products are rounded to TF32 there, and tests expect float32.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several workers, one device
DEVICES = 8
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["XLA_FLAGS"] = f"{xla_flags(DEVICES)} {os.environ.get('XLA_FLAGS', '')}".strip()
if CACHE not in os.environ:  # the first process of a test run; its workers inherit it
    # It begins empty: nothing of another version, or of code that is no longer so, is read.
    os.environ[CACHE] = tempfile.mkdtemp(prefix="spo_jax_tests_")
    atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)
os.environ |= shared_cache()
# Traced programs are many small objects that live to the end: looking through them all for garbage
# again and again finds none.
gc.set_threshold(200_000, 20, 100)


def pytest_configure(config):
    """Commands that tests start see no PyTorch; the tests' own processes do, for parity."""
    starts_workers = getattr(config.option, "numprocesses", None)
    if hasattr(config, "workerinput") or not starts_workers:
        above = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([WITHOUT_TORCH, *([above] if above else [])])


def _with_what_is_there(item):
    """Run what follows; skip what is of a CPU alone, or needs eight devices where there are not."""
    import jax

    there, backend = jax.device_count(), jax.default_backend()
    if backend != "cpu" and item.get_closest_marker("on_cpu"):
        pytest.skip(f"is of a CPU, and this is on {backend}")
    if there < DEVICES and item.get_closest_marker("eight_devices"):
        pytest.skip(f"needs {DEVICES} devices, {there} there")
    try:
        return (yield)
    except ValueError as error:
        if there < DEVICES and f"does not fit {there} devices" in str(error):
            pytest.skip(str(error))
        raise


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    return (yield from _with_what_is_there(pyfuncitem))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    return (yield from _with_what_is_there(request.node))


# One after the other, or minutes long: begun last, they would leave the other workers idle.
LONGEST = (
    *("training/test_killed.py", "training/test_several_processes.py", "training/test_meshes.py"),
    *("training/test_solvers_on_models.py", "study/test_study.py", "training/test_run.py"),
    *("dynamics/test_probes.py", "data/test_fuzz_rows.py", "plan/test_stage_plan.py"),
)


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(items):
    """Of a wide table all cases but the first are long; the longest files come first."""
    begun = set()
    for item in items:
        if item.get_closest_marker("wide") is None:
            continue
        table = item.nodeid.partition("[")[0]
        if table in begun:
            item.add_marker(pytest.mark.long)
        begun.add(table)

    def place(item):
        file = item.path.relative_to(Path(__file__).parent).as_posix()
        return LONGEST.index(file) if file in LONGEST else len(LONGEST)

    items.sort(key=place)


from jaxtyping import install_import_hook  # noqa: E402

# Public functions carry shape annotations: the tests check every call against them.
install_import_hook("spo_jax", "beartype.beartype")

"""The machine that tests run on: simulated devices, quick compiling, one cache of what it made."""

import importlib.metadata
import os
from pathlib import Path

WITHOUT_TORCH = str(Path(__file__).parent / "without_torch")
"""On ``PYTHONPATH``: hides PyTorch from a process."""

CACHE = "SPO_JAX_TEST_CACHE"
"""The variable with the folder of compiled programs that all processes of a test run share."""


def xla_flags(devices: int) -> str:
    """Tests compile far more than they run: the code generator's optimizer is off."""
    if os.environ.get("JAX_PLATFORMS", "cpu") != "cpu":
        return f"--xla_force_host_platform_device_count={devices} --xla_gpu_autotune_level=0"
    flags = [
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=0",
        # Two processes compile side by side: threads of one only stand in the other's way.
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # A fusion through MLIR takes twice as long to compile; later versions know no other way.
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)


def cache_variables(folder: str) -> dict[str, str]:
    """What a process needs to read what others have compiled, and to write what it does."""
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def shared_cache() -> dict[str, str]:
    """``cache_variables`` of this test run's own cache."""
    return cache_variables(os.environ[CACHE])

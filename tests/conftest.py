"""Eight simulated CPU devices and no network, before JAX or the hub client is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests compile far more than they run, so the code generator's optimizer is off.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()

from jaxtyping import install_import_hook  # noqa: E402

# Public functions carry shape annotations: the tests check every call against them.
install_import_hook("spo_jax", "beartype.beartype")

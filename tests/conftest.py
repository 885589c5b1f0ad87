"""Eight simulated CPU devices and no network, before JAX or the hub client is imported."""

import atexit
import os
import shutil
import tempfile

from tests.machine import CACHE, shared_cache, xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["XLA_FLAGS"] = f"{xla_flags(8)} {os.environ.get('XLA_FLAGS', '')}".strip()
if CACHE not in os.environ:  # the first process of a test run; its workers inherit it
    # It begins empty: nothing of another version, or of code that is no longer so, is read.
    os.environ[CACHE] = tempfile.mkdtemp(prefix="spo_jax_tests_")
    atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)
os.environ |= shared_cache()

from jaxtyping import install_import_hook

# Public functions carry shape annotations: the tests check every call against them.
install_import_hook("spo_jax", "beartype.beartype")

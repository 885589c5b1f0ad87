"""The user's cache folder, and the compiled programs that are kept in it from run to run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from contextlib import suppress
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from spo_jax.parallel.host_memory import free_behind_compiler
from spo_jax.parallel.processes import say
from spo_jax.parallel.stores import scheme_of

MOST_BYTES = 4 * 2**30
"""What compiled programs may take in the user's cache; the oldest go first."""


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/spo_jax``, or ``~/.cache/spo_jax``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "spo_jax"


def keep_compiled(where: bool | str = True) -> Path | None:
    """Have compiled programs kept, and read those kept before; the folder, if there is one.

    ``where`` is a folder or a URL of a bucket; or ``True``: as JAX was told
    (``JAX_COMPILATION_CACHE_DIR``, ``JAX_ENABLE_COMPILATION_CACHE``), else a folder of this machine
    in the user's cache. JAX's own key holds program, versions, flags and devices; the folder's name
    adds the processor, since a home folder may be shared by unlike ones. A folder that cannot be
    written is said, and none. What compiling leaves in memory is given back.
    """
    free_behind_compiler()
    if where is False:
        _use(None)
        return None
    if isinstance(where, str) and scheme_of(where) is not None:
        _use(where)  # JAX reads and writes it
        return None
    told = jax.config.jax_compilation_cache_dir
    if where is True and (told or not jax.config.jax_enable_compilation_cache):
        return Path(told) if told and scheme_of(told) is None else None
    folder = default_cache_dir() / "compiled" / _machine() if where is True else Path(where)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} may not be written")
        make_room(folder, MOST_BYTES)
    except OSError as error:
        say(
            f"WARNING compiled programs are not kept ({error}): every start compiles anew. Set "
            "compilation_cache to a folder, or to false"
        )
        return None
    _use(folder)
    return folder


def _use(folder: Path | str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder and str(folder))
    if folder is not None:
        jax.config.update("jax_enable_compilation_cache", True)
        # The small programs around a step are many, and together as slow to compile.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    # What was compiled before this has decided already whether there is a cache.
    compilation_cache.reset_cache()


def _machine() -> str:
    """The processor (of one kind: the same instructions) and the compiler's version."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        said = sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))})
    except OSError:
        said = [platform.processor()]
    said = hashlib.sha256("\n".join([platform.machine(), *said]).encode()).hexdigest()[:12]
    return f"jaxlib-{importlib.metadata.version('jaxlib')}-{platform.machine()}-{said}"


def make_room(folder: Path, most: int) -> None:
    """Take the oldest away until ``most`` bytes are left; another process may do the same."""
    found = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            stat = path.stat()
            found.append((stat.st_mtime, stat.st_size, path))
    too_much = sum(size for _, size, _ in found) - most
    for _, size, path in sorted(found):
        if too_much <= 0:
            return
        path.unlink(missing_ok=True)
        too_much -= size

"""Compiled programs kept in the user's cache: where, and that a second start reads them."""

import os
import stat

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from spo_jax.checkpoints import user_cache
from spo_jax.checkpoints.user_cache import default_cache_dir, keep_compiled
from tests.runs import environment, finish, start, write_config

SETTINGS = (
    *("jax_compilation_cache_dir", "jax_enable_compilation_cache"),
    *("jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes"),
)


@pytest.fixture(autouse=True)
def untold(monkeypatch, tmp_path):
    """JAX as it is where nobody told it of a cache; afterwards as it was."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compiled_anew(number):
    """Compile one program that no other test has; forget it again."""
    jax.jit(lambda x: jnp.sin(x) * number)(jnp.ones(3)).block_until_ready()
    jax.clear_caches()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_where_it_lies(monkeypatch, tmp_path):
    assert default_cache_dir() == tmp_path / "spo_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "spo_jax"


def test_programs_are_kept_in_a_folder_of_this_machine_and_read_again():
    compiled_anew(1.5)  # JAX has made up its mind: no cache
    folder = keep_compiled()
    assert folder.parent == default_cache_dir() / "compiled"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    compiled_anew(2.5)
    kept = names(folder)
    assert kept
    compiled_anew(2.5)
    assert names(folder) == kept
    compiled_anew(3.5)
    assert len(names(folder)) > len(kept)
    assert keep_compiled() == folder


def test_another_processor_has_another_folder(monkeypatch):
    folder = keep_compiled()
    monkeypatch.setattr(user_cache.platform, "machine", lambda: "another")
    jax.config.update("jax_compilation_cache_dir", None)
    assert keep_compiled() != folder


def test_what_jax_was_told_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "told"))
    assert keep_compiled() == tmp_path / "told"
    assert keep_compiled(str(tmp_path / "named")) == tmp_path / "named"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named")
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    assert keep_compiled() is None


def test_off_is_off(tmp_path):
    folder = keep_compiled()
    assert keep_compiled(False) is None
    compiled_anew(4.5)
    assert names(folder) == []


def test_a_folder_that_cannot_be_is_said(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert keep_compiled(str(tmp_path / "file" / "folder")) is None
    said = capsys.readouterr().err
    assert "compiled programs are not kept" in said
    assert "compilation_cache" in said
    compiled_anew(5.5)


def test_the_oldest_make_room(monkeypatch, tmp_path):
    for age, name in enumerate(["new", "old", "oldest"]):
        (tmp_path / name).write_bytes(b"0" * 100)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(user_cache, "MOST_BYTES", 250)
    keep_compiled(str(tmp_path))
    assert names(tmp_path) == ["new", "old"]


@pytest.mark.long
def test_a_second_start_compiles_nothing(tmp_path):
    config = write_config(tmp_path, train={"steps": 2, "eval_every": 2})
    lacking = {name: "" for name in environment() if name.startswith("JAX_") and "CACHE" in name}
    kept = []
    for name in ("first", "second"):
        log = tmp_path / f"{name}.log"
        variables = {**lacking, "XDG_CACHE_HOME": str(tmp_path)}
        variables = {k: v for k, v in variables.items() if "MIN" not in k}
        process = start(config, tmp_path / name, log=log, variables=variables, devices=1)
        assert finish([process], 300) == [0], log.read_text()
        (folder,) = (tmp_path / "spo_jax" / "compiled").iterdir()
        kept.append(names(folder))
    # Every program is kept: a new one would be another file.
    assert any("step" in name for name in kept[0])
    assert kept[1] == kept[0]

    off = start(
        config,
        tmp_path / "off",
        "--compilation-cache",
        "false",
        log=log,
        variables={**variables, "XDG_CACHE_HOME": str(tmp_path / "other")},
    )
    assert finish([off], 300) == [0], log.read_text()
    assert not (tmp_path / "other" / "spo_jax" / "compiled").exists()

"""Files that a command writes at its end: looked at when it begins."""

from __future__ import annotations

from pathlib import Path


def check_writable(flag: str, path: str | Path | None, *, makes_folder: bool = False) -> None:
    """Raise ``ConfigError`` for a file that could not be written after hours of work.

    ``None`` is no file. With ``makes_folder`` the command makes the folder it lies in.
    """
    from spo_jax.config.parsing import ConfigError
    from spo_jax.parallel.stores import check_local

    if path is None:
        return
    check_local(flag, path)
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: this is a folder; name a file in it")
    folder = path.absolute().parent
    above = next(x for x in (folder, *folder.parents) if x.exists())
    if not above.is_dir():
        raise ConfigError(f"{flag} {path}: {above} is a file, not a folder")
    if above != folder and not makes_folder:
        raise ConfigError(f"{flag} {path}: there is no such folder; make it first")

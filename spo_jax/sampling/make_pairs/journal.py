"""A file of JSON lines that is made block by block, and survives a stop at any moment."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from spo_jax.checkpoints.atomic import to_json

PARTIAL = ".partial"
"""Behind the name of a file that is not whole yet."""


def meta_path(out: Path) -> Path:
    """The description beside a file of pairs; no suffix of data, or a folder would load it."""
    return out.with_suffix(".meta.yaml")


def right_path(pairs: Path) -> Path:
    """The policy's own right answers, beside a file of pairs: SFT rows."""
    return pairs.with_name(f"{pairs.name.partition('.')[0]}.right.jsonl")


def check_free(out: Path, *, keep_right: bool) -> None:
    """Raise where ``out``, or the file of right answers, cannot be a new file."""
    if out.suffix != ".jsonl":
        raise ValueError(f"{out}: the pairs are JSON lines: give a name that ends in .jsonl")
    # With the partial one there too, the stop fell between the last steps of ``finish``.
    if out.with_name(out.name + PARTIAL).exists():
        return
    for file in (out, right_path(out)) if keep_right else (out,):
        if file.exists():
            raise FileExistsError(f"{file} exists: name another file, or remove this one")


class PairFile:
    """``out`` in the making: ``OUT.partial`` is a line of settings, then a line for each block.

    ``done`` of ``prompts`` are there already, in blocks with their ``counts``. Of the block
    under way there is a line for each sample of all its prompts: ``begun``. A line without its
    end, as a kill leaves it, is cut off.

    Raises:
        FileExistsError: ``out`` is there already.
        ValueError: the partial file was made with other settings, or is none.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], *, prompts: int):
        self._keep_right = settings.get("keep_right", False)
        check_free(out, keep_right=self._keep_right)
        self.out = out
        self.partial = out.with_name(out.name + PARTIAL)
        self.counts: list[dict[str, int]] = []
        self.begun: list[dict[str, Any]] = []
        self._seen: set[bytes] = set()
        out.parent.mkdir(parents=True, exist_ok=True)
        end = self._take_over(dict(settings)) if self.partial.exists() else 0
        if out.exists() and self.done < prompts:
            raise FileExistsError(f"{out} exists beside {self.partial}: remove one of them")
        self._file = self.partial.open("ab")
        os.truncate(self.partial, end)
        if end == 0:
            self._write({"settings": dict(settings)})

    @property
    def done(self) -> int:
        """Prompts of the blocks that are whole."""
        return sum(counts["prompts"] for counts in self.counts)

    def _take_over(self, settings: dict[str, Any]) -> int:
        """Bytes of the partial file that can be gone on from."""
        end = 0
        for line, here in _whole_lines(self.partial):
            if end == 0:
                self._check_settings(line, settings)
            elif line.get("block") != len(self.counts):
                break
            elif "sample" in line:
                # Begun anew by a machine with smaller blocks, the later samples count.
                self.begun = [*self.begun[: line["sample"]], line]
            else:
                self.counts.append(line["counts"])
                self.unseen(line["rows"])
                self.begun = []
            end = here
        return end

    def _check_settings(self, line: Mapping[str, Any], now: dict[str, Any]) -> None:
        before = line.get("settings")
        if not isinstance(before, dict):
            raise ValueError(f"{self.partial} is no unfinished file of pairs: move it away")
        # As JSON gives it back.
        now = json.loads(json.dumps(now))
        changed = [
            f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(
                f"{self.partial} was begun with other settings: {'; '.join(changed)}. Go on with "
                "those, or remove the file and begin anew"
            )

    def unseen(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The rows whose three texts no row had before; they count as seen from now on."""
        kept = []
        for row in rows:
            texts = json.dumps([row["prompt"], row["chosen"], row["rejected"]])
            key = hashlib.sha256(texts.encode()).digest()
            if key not in self._seen:
                self._seen.add(key)
                kept.append(row)
        return kept

    def append(
        self,
        rows: Sequence[Mapping[str, Any]],
        counts: Mapping[str, int],
        right: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """The next block, at once on the disk; ``right`` are its rows of ``right_path``."""
        line = {"block": len(self.counts), "counts": dict(counts), "rows": list(rows)}
        self._write({**line, "right": list(right)} if right else line)
        self.counts.append(dict(counts))

    def begin(self, sample: int, prompts: int, drawn: Sequence[Any]) -> None:
        """A sample of each of the ``prompts`` of the block under way, at once on the disk."""
        block = len(self.counts)
        self._write({"block": block, "sample": sample, "prompts": prompts, "drawn": list(drawn)})

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(to_json(line, str(self.partial)).encode() + b"\n")
        self._file.flush()

    def finish(self, description: Mapping[str, Any]) -> None:
        """Move the rows to ``out``, with ``description`` beside it; right answers, if kept, too."""
        self._file.close()
        # The pairs last: with them there, everything is.
        kept = [(right_path(self.out), "right")] if self._keep_right else []
        made = [(self._gathered(out, key), out) for out, key in (*kept, (self.out, "rows"))]
        for temporary, out in made:
            if out.exists() and not filecmp.cmp(temporary, out, shallow=False):
                for other, _ in made:
                    other.unlink()
                raise FileExistsError(f"{out} exists beside {self.partial}: remove one of them")
        text = yaml.safe_dump(dict(description), sort_keys=False, allow_unicode=True)
        meta_path(self.out).write_text(text)
        for temporary, out in made:
            temporary.replace(out)
        self.partial.unlink()

    def _gathered(self, out: Path, key: str) -> Path:
        """The rows of all blocks, in a temporary file beside ``out``."""
        temporary = out.with_name(f".{out.name}.tmp")
        with temporary.open("w") as file:
            for line, _ in _whole_lines(self.partial):
                file.writelines(to_json(row, str(out)) + "\n" for row in line.get(key, ()))
        return temporary

    def close(self) -> None:
        """Leave the partial file as it is."""
        self._file.close()

    def discard(self) -> None:
        """Remove the partial file."""
        self._file.close()
        self.partial.unlink()


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each object of a file of JSON lines, and where its line ends, up to the first torn one."""
    end = 0
    with path.open("rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError:
                return
            if not raw.endswith(b"\n") or not isinstance(line, dict):
                return
            end += len(raw)
            yield line, end

"""Safetensors files read and written piece by piece.

The format is a header (8 bytes of length, then JSON) before raw little-endian arrays.
It is handled here and not by the ``safetensors`` package for two things that matter with
large models: a memory-mapped slice of any float dtype, bfloat16 included, and writing a
file whose tensors are gathered from the devices one at a time.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from spo_jax.models.folders import keys_once, read_object

_FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in _FLOATS.items()}
_CHUNK = 2**18


class StoredTensor(NamedTuple):
    """Where a tensor lies on disk; ``array`` maps it without reading it."""

    file: Path
    dtype_code: str
    shape: tuple[int, ...]
    offset: int

    def array(self) -> np.ndarray:
        """Map the tensor into memory; only the slices that are touched are read."""
        if self.dtype_code not in _FLOATS:
            raise ValueError(
                f"{self.file}: a tensor has dtype {self.dtype_code}, expected one of "
                f"{', '.join(_FLOATS)}: export the model in a float dtype first"
            )
        if 0 in self.shape:
            return np.zeros(self.shape, _FLOATS[self.dtype_code])
        dtype = _FLOATS[self.dtype_code]
        return np.memmap(self.file, dtype, mode="r", offset=self.offset, shape=self.shape)


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """List the tensors of ``model.safetensors`` or of the shards its index names.

    The index and the files have to name the same tensors, each once.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        return _read_shards(folder, index, single)
    if single.is_file():
        return read_header(single)
    if list(folder.glob("pytorch_model*.bin")):
        raise FileNotFoundError(
            f"{folder} holds only pytorch_model.bin, which can run code when loaded: convert it "
            "where PyTorch is installed with transformers' AutoModelForCausalLM"
            ".from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise FileNotFoundError(
        f"{folder} holds neither model.safetensors nor model.safetensors.index.json: "
        "point to the folder of a model saved in safetensors format"
    )


def _read_shards(folder: Path, index: Path, single: Path) -> dict[str, StoredTensor]:
    mend = "download or export the model folder again"
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(f"{index}: expected a weight_map of tensors and their files: {mend}")
    files = sorted(set(names.values()))
    outside = [name for name in files if not name or name in (".", "..") or set(name) & {"/", "\\"}]
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}: expected files beside it: {mend}")
    if single.is_file() and files != [single.name]:
        raise ValueError(
            f"{folder} holds {single.name}, and {index.name} with other files "
            f"({', '.join(files[:3])}): two sets of weights; remove the one that is not the model"
        )
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{index} names shards that are not there: {', '.join(absent)}: "
            "download the model folder again"
        )
    found: dict[str, StoredTensor] = {}
    lines = []
    for file in files:
        here = read_header(folder / file)
        lines += [f"{name} in {found[name].file.name} and {file}" for name in here if name in found]
        found |= here
        lines += [f"{name} in {file}, not in the index" for name in here if name not in names]
        wanted = [name for name, place in names.items() if place == file]
        lines += [
            f"{name} not in {file}, where the index has it" for name in wanted if name not in here
        ]
    if lines:
        listed = "\n  ".join(lines[:20] + [f"and {len(lines) - 20} more"] * (len(lines) > 20))
        raise ValueError(f"{index} and the files do not agree: {mend}:\n  {listed}")
    return found


def read_header(file: Path) -> dict[str, StoredTensor]:
    """List the tensors of one file; a truncated or foreign file is an error."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise _broken(file, "it ends too early")
        try:
            header = json.loads(stream.read(length), object_pairs_hook=keys_once)
        except (ValueError, RecursionError) as error:
            raise _broken(file, str(error)) from None
    if not isinstance(header, dict):
        raise _broken(file, "its header is no JSON object")
    header.pop("__metadata__", None)
    start = 8 + length
    found = {name: _read_entry(file, name, entry, start) for name, entry in header.items()}
    # The arrays fill the rest of the file without a gap or an overlap.
    end = start
    for name, (tensor, stop) in sorted(
        found.items(), key=lambda item: (item[1][0].offset, item[1][1])
    ):
        if tensor.offset != end:
            raise _broken(file, f"{name} begins at byte {tensor.offset}, expected {end}")
        end = stop
    if end != size:
        raise _broken(file, f"it has {size} bytes, and its header describes {end}")
    return {name: tensor for name, (tensor, _) in found.items()}


def _read_entry(file: Path, name: str, entry: Any, start: int) -> tuple[StoredTensor, int]:
    """One entry of a header, and the place behind its last byte."""
    try:
        code, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = [*shape, first, last]
    except (KeyError, TypeError, ValueError):
        raise _broken(file, f"the entry of {name} is not dtype, shape and data_offsets") from None
    whole = all(type(size) is int and size >= 0 for size in sizes) and first <= last
    if not whole or not isinstance(code, str):
        raise _broken(file, f"the entry of {name} has numbers that cannot be")
    if code in _FLOATS and math.prod(shape) * _FLOATS[code].itemsize != last - first:
        raise _broken(file, f"{name} {tuple(shape)} of {code} does not fill {last - first} bytes")
    return StoredTensor(file, code, tuple(shape), start + first), start + last


def _broken(file: Path, why: str) -> ValueError:
    return ValueError(
        f"{file} is not a complete safetensors file ({why}): download or export it again"
    )


def check_values(
    name: str, source: np.ndarray, converted: np.ndarray, where: str, dtype_key: str
) -> None:
    """Raise ``ValueError`` where ``converted`` holds a NaN or an infinity.

    Its bits are looked at in pieces, at the speed they are read. ``source`` is the same before
    the conversion, and tells whether that made it so; ``dtype_key`` is what set the dtype.
    """
    if _all_finite(converted):
        return
    with np.errstate(invalid="ignore"):
        spoiled = ~np.isfinite(np.asarray(converted, np.float64))
        before = float(np.asarray(source)[spoiled][0])
    if np.isfinite(before):
        largest = float(ml_dtypes.finfo(converted.dtype).max)
        raise ValueError(
            f"{where}: {name} holds {before:.6g}, beyond the largest {converted.dtype} "
            f"({largest:.6g}): {dtype_key} does not do for this model; use bfloat16 or float32"
        )
    raise ValueError(
        f"{where}: {name} holds {before}: such a model has no finite loss; export the weights "
        "again, from before they were spoiled"
    )


def _all_finite(array: np.ndarray) -> bool:
    unsigned = f"u{array.dtype.itemsize}"
    bits = (array if array.flags.forc else np.ascontiguousarray(array)).view(unsigned)
    flat = bits.ravel(order="K")
    infinite = np.asarray(np.inf, array.dtype).view(unsigned)
    no_sign = np.asarray(np.iinfo(flat.dtype).max >> 1, flat.dtype)
    pieces = (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))
    return all((piece & no_sign).max() < infinite for piece in pieces)


def write_file(
    file: Path | None,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Any,
    tensors: Iterable[np.ndarray],
) -> None:
    """Write ``tensors``, which come in the order of ``shapes``, as they come.

    ``file=None`` draws them all and writes nothing: what a process does that only helps
    to gather.
    """
    dtype = np.dtype(dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + int(np.prod(shape)) * dtype.itemsize
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    if file is None:
        for _ in tensors:
            pass
        return
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            stream.write(np.ascontiguousarray(tensor, dtype).tobytes())

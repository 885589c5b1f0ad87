"""Safetensors files read and written piece by piece.

The format is a header (8 bytes of length, then JSON) before raw little-endian arrays.
It is handled here and not by the ``safetensors`` package for two things that matter with
large models: a memory-mapped slice of any float dtype, bfloat16 included, and writing a
file whose tensors are gathered from the devices one at a time.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in _FLOATS.items()}


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
    """List the tensors of ``model.safetensors`` or of the shards its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"]
        absent = sorted(n for n in set(names.values()) if not (folder / n).is_file())
        if absent:
            raise FileNotFoundError(
                f"{index} names shards that are not there: {', '.join(absent)}: "
                "download the model folder again"
            )
        found: dict[str, StoredTensor] = {}
        for name in sorted(set(names.values())):
            found |= read_header(folder / name)
        return found
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


def read_header(file: Path) -> dict[str, StoredTensor]:
    """List the tensors of one file; a truncated or foreign file is an error."""
    broken = ValueError(f"{file} is not a complete safetensors file: download or export it again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise broken
        (length,) = struct.unpack("<Q", prefix)
        if 8 + length > size:
            raise broken
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise broken from None
    header.pop("__metadata__", None)
    start = 8 + length
    if any(start + entry["data_offsets"][1] > size for entry in header.values()):
        raise broken
    return {
        name: StoredTensor(
            file, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }


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

"""Which mesh, rematerialization and micro-batch: the choosing, apart from any compiling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

REMAT = ("none", "dots", "elementwise", "dots_no_batch", "full")
"""From what keeps most to what keeps least, and computes most again."""


class Candidate(NamedTuple):
    """One way to run a stage."""

    data: int
    fsdp: int
    tensor: int
    remat: str
    accumulation: int
    attention: str

    @property
    def mesh(self) -> tuple[int, int, int]:
        """Sizes of the axes data, fsdp and tensor."""
        return self.data, self.fsdp, self.tensor

    def saves_at_least(self, other: Candidate) -> bool:
        """Whether it surely needs no more memory than ``other``, at the price of time."""
        return (
            (self.mesh, self.attention) == (other.mesh, other.attention)
            and REMAT.index(self.remat) >= REMAT.index(other.remat)
            and self.accumulation >= other.accumulation
        )

    def keys(self, section: str) -> str:
        """The configuration's keys, to paste; ``section`` is that of the stage's loop."""
        return (
            f"--mesh.data {self.data} --mesh.fsdp {self.fsdp} --mesh.tensor {self.tensor} "
            f"--model.remat {self.remat} --model.attention {self.attention} "
            f"--{section}.gradient_accumulation {self.accumulation}"
        )


class Tried(NamedTuple):
    """A candidate that was compiled: whether it fits, its bytes a device, seconds an update.

    ``needed`` and ``seconds`` are ``None`` where the compiler refused it without a figure.
    """

    candidate: Candidate
    fits: bool
    needed: int | None
    seconds: float | None


def make_candidates(
    *,
    devices: int,
    batch_sizes: Sequence[int],
    hidden_size: int,
    kv_heads: int,
    remat: Sequence[str],
    attention: Sequence[str],
    accumulation: int,
) -> list[Candidate]:
    """All that divides evenly: ``tensor`` the key/value heads, ``fsdp`` the width, rows the rest.

    ``batch_sizes`` are those of every part of a batch; ``accumulation`` is tried beside the
    powers of two. In the order of trying: without a tensor axis first, then the more cut the
    earlier.
    """
    found = []
    for data, fsdp, tensor in _meshes(devices):
        if kv_heads % tensor or hidden_size % fsdp:
            continue
        for micro in _micro_batches(batch_sizes, data * fsdp, accumulation):
            found += [Candidate(data, fsdp, tensor, r, micro, a) for a in attention for r in remat]
    return sorted(found, key=lambda c: (c.tensor, c.data, c.accumulation, REMAT.index(c.remat)))


def _meshes(devices: int) -> list[tuple[int, int, int]]:
    divisors = [d for d in range(1, devices + 1) if devices % d == 0]
    return [
        (devices // fsdp // tensor, fsdp, tensor)
        for tensor in divisors
        for fsdp in divisors
        if devices % (fsdp * tensor) == 0
    ]


def _micro_batches(batch_sizes: Sequence[int], shards: int, given: int) -> list[int]:
    powers = {2**i for i in range(max(batch_sizes).bit_length())}
    fits = (n for n in powers | {given} if all(size % (shards * n) == 0 for size in batch_sizes))
    return sorted(fits)


def prune(
    candidates: Sequence[Candidate], floor: Callable[[Candidate], int], usable: float
) -> tuple[list[Candidate], list[tuple[int, int, int]]]:
    """Candidates whose bytes known by arithmetic alone leave room, and the meshes left out."""
    kept = [c for c in candidates if floor(c) <= usable]
    left = {c.mesh for c in kept}
    return kept, sorted({c.mesh for c in candidates} - left)


def choose(candidates: Sequence[Candidate], tried: Sequence[Tried]) -> Candidate | None:
    """What to compile next, or ``None`` when nothing is left that could be better.

    Left out is what a refusal or a success has settled: on a mesh where something does not fit,
    what saves less; where something fits, what only saves more. Of the mesh with the fewest
    tries the middle of the rest comes next.
    """
    open_ = [c for c in candidates if not any(_settles(t, c) for t in tried)]
    if not open_:
        return None
    tries = {c.mesh: sum(t.candidate.mesh == c.mesh for t in tried) for c in open_}
    mesh = min(tries, key=tries.__getitem__)
    of_mesh = [c for c in open_ if c.mesh == mesh]
    return of_mesh[len(of_mesh) // 2]


def _settles(tried: Tried, candidate: Candidate) -> bool:
    if tried.candidate == candidate:
        return True
    if tried.fits:
        return candidate.saves_at_least(tried.candidate)
    return tried.candidate.saves_at_least(candidate)


def best(tried: Sequence[Tried]) -> Tried | None:
    """Of those that fit the fastest, of equally fast ones the smallest."""
    fitting = [t for t in tried if t.fits]
    return min(fitting, key=lambda t: (t.seconds or 0.0, t.needed or 0), default=None)

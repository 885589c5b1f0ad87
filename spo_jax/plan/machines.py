"""Machines that are not there: devices to compile for, and what their makers say of a chip."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """A chip in its maker's numbers; bytes, operations a second, bytes a second.

    ``flops`` is the peak of bfloat16 products. ``links`` counts all links of the chip, both
    directions; a TPU's lie along the ``axes`` of its torus. ``devices`` is how many JAX devices
    a chip is.
    """

    name: str
    hbm: float
    flops: float
    bandwidth: float
    links: float
    axes: int
    devices: int = 1

    @property
    def device_hbm(self) -> float:
        """Memory of one JAX device."""
        return self.hbm / self.devices

    @property
    def axis_bandwidth(self) -> float:
        """What a device sends a second along one axis: one direction of that axis's links."""
        return self.links / 2 / self.axes / self.devices


# Google: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "Key chip specifications": peak
# compute per chip (bf16), HBM capacity and bandwidth, bidirectional ICI bandwidth per chip (v4:
# six links of 50 GB/s each way, Jouppi et al., arXiv 2304.01433). The capacities are GiB: the
# compiler refuses programs beyond 15.75 GiB of a v5e's "16 GB".
# NVIDIA: data sheets of A100 (SXM4), H100 and H200 (SXM5): dense bf16, memory in 10^9 bytes,
# NVLink both directions; it has no axes.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 275e12, 1200e9, 600e9, axes=3),
        Chip("v5e", 16 * GIB, 197e12, 819e9, 400e9, axes=2),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 1200e9, axes=3),
        Chip("v6e", 32 * GIB, 918e12, 1638e9, 800e9, axes=2),
        Chip("tpu7x", 192 * GIB, 2307e12, 7380e9, 1200e9, axes=3, devices=2),
        Chip("a100-40", 40e9, 312e12, 1555e9, 600e9, axes=1),
        Chip("a100-80", 80e9, 312e12, 2039e9, 600e9, axes=1),
        Chip("h100", 80e9, 989e12, 3350e9, 900e9, axes=1),
        Chip("h200", 141e9, 989e12, 4800e9, 900e9, axes=1),
    )
}

# What JAX calls these devices (``device.device_kind``).
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}

EXAMPLES = "v5e:2x4, v5p:2x2x4, v6e:4x4, gpu:8 or cpu:8"


class Machine(NamedTuple):
    """Devices to compile for; ``chip`` is ``None`` where nobody said what they are.

    ``stand_in``: these devices only stand for others, so that what a compiler does with memory
    is another compiler's.
    """

    topology: str
    devices: tuple[Any, ...]
    kind: str
    chip: Chip | None
    stand_in: bool


def describe_machine(topology: str, *, chip: str | None = None) -> Machine:
    """The machine of a name: ``v5e:4x4`` and other TPU slices, ``gpu:8``, ``cpu:8``.

    To be called before JAX has looked for devices: TPUs are described by ``libtpu`` on the CPU,
    ``cpu:N`` are N simulated devices, and so is ``gpu:N`` where there are no N GPUs. ``chip``
    names an entry of ``CHIPS`` for what they stand for.

    Raises:
        ValueError: a name or chip that is not known, or too few devices.
        RuntimeError: a TPU's name without ``libtpu``.
    """
    found = re.fullmatch(r"(?P<kind>[\w]+):(?P<size>\d+(x\d+)*)", topology)
    if found is None:
        raise ValueError(f"--topology {topology}: expected KIND:SHAPE, such as {EXAMPLES}")
    if chip is not None and chip not in CHIPS:
        raise ValueError(f"--chip {chip} is unknown: choose one of {', '.join(CHIPS)}")
    kind, size = found["kind"], found["size"]
    if kind not in ("cpu", "gpu"):
        if chip is not None:
            raise ValueError(
                f"--chip {chip} would be ignored: --topology {topology} names its chips already"
            )
        return _tpu(topology)
    if not size.isdigit() or int(size) < 1:
        raise ValueError(f"--topology {topology}: expected a number of devices, {kind}:8 say")
    return _simulated(topology, kind, int(size), chip)


def _tpu(topology: str) -> Machine:
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(
            f"--topology {topology} needs the TPU compiler, which runs without a TPU: "
            "pip install 'spo-jax[plan]'"
        )
    prepare_for_tpu()
    import jax
    from jax.experimental import topologies

    # One JAX device for the two cores of a chip, as on the machines that Google rents out.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        described = topologies.get_topology_desc(topology, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--topology {topology} is no machine that the TPU compiler knows ({reason}). "
            f"Names are such as {EXAMPLES}"
        ) from None
    kind = described.devices[0].device_kind
    return Machine(topology, tuple(described.devices), kind, chip_of(kind), False)


def prepare_for_tpu() -> None:
    """Let ``libtpu`` compile without a TPU, and quietly; before JAX has looked for devices."""
    wanted = {
        "TPU_SKIP_MDS_QUERY": "1",  # asks no metadata server what this machine is
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # of this machine: unused, but asked for
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    _use_cpu()


def _use_cpu() -> None:
    import jax

    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")


def _simulated(topology: str, kind: str, count: int, chip: str | None) -> Machine:
    import jax

    named = None if chip is None else CHIPS[chip]
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Once JAX has looked for devices it has those it has: counted below.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    real = _gpus() if kind == "gpu" else ()
    if len(real) >= count:
        own = real[0].device_kind
        return Machine(topology, tuple(real[:count]), own, named or chip_of(own), False)
    if kind == "cpu":
        _use_cpu()
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"--topology {topology}: there are {len(devices)} simulated CPU devices, because JAX "
            "was started (or XLA_FLAGS set) before; ask for fewer, or in a new process"
        )
    return Machine(topology, tuple(devices[:count]), "simulated CPU", named, True)


def _gpus() -> Sequence[Any]:
    import jax

    try:
        return jax.devices("gpu")
    except RuntimeError:
        return ()


def chip_of(kind: str) -> Chip | None:
    """The chip that JAX calls ``kind``, if it is in the table."""
    return CHIPS.get(KINDS.get(kind, ""))

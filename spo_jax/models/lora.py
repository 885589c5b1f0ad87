"""Low-rank adapters: a small trained term beside the projections of a base that stays as it is.

``x W + (alpha / rank) (x A) B`` with ``A [in, rank]`` and ``B [rank, out]``: Hu et al., arXiv
2106.09685. ``B`` begins at 0, so an adapted model begins as its base.

The adapters of the projection ``q`` lie beside it in the tree of parameters, as ``q_lora: {a, b,
scale}``, stacked over the layers as its kernel is. What the tree holds is what the decoder
computes: without them it is the base. ``split`` takes the two apart, so that what trains sees
the adapters alone, and the base is an argument that nothing differentiates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from spo_jax.models.nf4 import dequantize, quantize_layers
from spo_jax.types import Params

LORA = "_lora"
"""Behind the name of a projection: its adapter."""

PROJECTIONS = {
    "q_proj": ("attention", "q"),
    "k_proj": ("attention", "k"),
    "v_proj": ("attention", "v"),
    "o_proj": ("attention", "o"),
    "gate_proj": ("mlp", "gate"),
    "up_proj": ("mlp", "up"),
    "down_proj": ("mlp", "down"),
}
"""Projections by the names they have in Hugging Face models -> their place in a layer."""

_TRAINED = ("a", "b")


@dataclass(frozen=True)
class Lora:
    """``targets`` are names of ``PROJECTIONS``, or patterns of them (``*_proj``).

    ``quantize`` is what the base is stored as: ``nf4``, or ``None`` for its own dtype. ``dropout``
    is the share of a term's inputs that an update leaves out.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    quantize: str | None = None
    dropout: float = 0.0

    @property
    def projections(self) -> tuple[str, ...]:
        """The projections that get an adapter, in the order of ``PROJECTIONS``.

        Raises:
            ValueError: a target that is none of them, by name.
        """
        for target in self.targets:
            if not any(fnmatchcase(name, target) for name in PROJECTIONS):
                raise ValueError(
                    f"lora.targets: {target!r} is no projection: choose of "
                    f"{', '.join(PROJECTIONS)}, or a pattern such as '*_proj' for all of them"
                )
        return tuple(n for n in PROJECTIONS if any(fnmatchcase(n, t) for t in self.targets))


def make_adapters(base: Params, lora: Lora, key: PRNGKeyArray) -> Params:
    """Adapters for ``base``, whose shapes do: ``A`` uniform in ``+- 1/sqrt(in)``, ``B`` zero.

    They are float32 whatever the base is.

    Raises:
        ValueError: a target that is no projection; a rank that is no low one.
    """
    found: dict[str, Any] = {}
    for name, own in zip(lora.projections, jax.random.split(key, len(PROJECTIONS)), strict=False):
        block, ours = PROJECTIONS[name]
        count, width, out = _shape(base, block, ours)
        if lora.rank > min(width, out):
            raise ValueError(
                f"lora.rank={lora.rank}: {name} is a matrix of {width} by {out}, whose rank is at "
                f"most {min(width, out)}: set it lower"
            )
        a = jax.random.uniform(own, (count, width, lora.rank), minval=-1.0, maxval=1.0)
        found.setdefault(block, {})[ours + LORA] = {
            "a": a * width**-0.5,
            "b": jnp.zeros((count, lora.rank, out)),
        }
    return {"layers": found}


def as_base(params: Params, lora: Lora) -> Params:
    """``params`` as the base of ``lora``: stored as it asks for, with the scales of its adapters.

    Where that is another form, buffers of ``params`` are given up.
    """
    if lora.quantize is not None and "experts" in params["layers"]:
        raise ValueError(
            f"lora.quantize={lora.quantize}: experts are not stored in four bits here. Set it to "
            "null for this model"
        )
    stored = params if lora.quantize is None else quantize_layers(params)
    return add_scales(stored, lora)


def add_scales(base: Params, lora: Lora) -> Params:
    """``base`` with what is fixed of its adapters: ``alpha / rank``, once a layer."""
    scales: dict[str, Any] = {}
    for name in lora.projections:
        block, ours = PROJECTIONS[name]
        count, _, _ = _shape(base, block, ours)
        scale = jnp.full((count,), lora.alpha / lora.rank, jnp.float32)
        scales.setdefault(block, {})[ours + LORA] = {"scale": scale}
    return join(base, {"layers": scales})


def with_dropout(params: Params, lora: Lora, key: PRNGKeyArray) -> Params:
    """``params`` whose terms leave inputs out, drawn by ``key``; each layer and term by its own."""

    def layers(tree: Params, key: PRNGKeyArray) -> Params:
        found = {}
        for number, (name, value) in enumerate(tree.items()):
            own = jax.random.fold_in(key, number)
            if name.endswith(LORA):
                count = value["scale"].shape[0]
                keys = jax.random.key_data(jax.random.split(own, count))
                value = {**value, "key": keys, "keep": jnp.full((count,), 1 - lora.dropout)}
            elif isinstance(value, Mapping):
                value = layers(value, own)
            found[name] = value
        return found

    return {**params, "layers": layers(params["layers"], key)}


def split(params: Params) -> tuple[Params, Params | None]:
    """``(what is trained, the base)``: the adapters where there are any, else all and ``None``."""
    trained = _part(params, lambda path: path[-2].endswith(LORA) and path[-1] in _TRAINED)
    if not trained:
        return params, None
    base = _part(params, lambda path: not (path[-2].endswith(LORA) and path[-1] in _TRAINED))
    return trained, base


def join(base: Params | None, trained: Params) -> Params:
    """The inverse of ``split``: what the functions of a ``Model`` take."""
    if base is None:
        return trained
    found = dict(base)
    for name, value in trained.items():
        inside = isinstance(value, Mapping) and name in base
        found[name] = join(base[name], value) if inside else value
    return found


def _shape(base: Params, block: str, ours: str) -> tuple[int, int, int]:
    """Layers, inputs and outputs of a projection, however it is stored."""
    stored = base["layers"].get(block, {}).get(ours)
    if stored is None:
        raise ValueError(
            f"lora.targets: this model has experts, and none {ours!r} of an {block!r}; experts get "
            "no adapters here. Name projections of attention: [q_proj, k_proj, v_proj, o_proj]"
        )
    if "kernel" in stored:
        return stored["kernel"].shape
    count, half, out = stored["codes"].shape
    return count, 2 * half, out


def merge(params: Params) -> Params:
    """Plain parameters of the same function: ``W + scale A B``, summed in float32.

    Kernels in four bits come out in the dtype of the embedding.
    """
    return _merged(params, params["embed"].dtype)


def _merged(params: Params, dtype: Any) -> Params:
    found = {}
    for name, value in params.items():
        if name.endswith(LORA):
            continue
        if isinstance(value, Mapping) and "codes" in value:
            rest = {k: v for k, v in value.items() if k not in ("codes", "scales")}
            value = {"kernel": dequantize(value), **rest}
        elif isinstance(value, Mapping):
            value = _merged(value, dtype)
        adapter = params.get(name + LORA)
        if adapter is not None:
            term = jnp.einsum("lir,lro->lio", adapter["a"], adapter["b"])
            term *= adapter["scale"][:, None, None]
            kernel = value["kernel"]
            value = {**value, "kernel": kernel.astype(term.dtype) + term}
        if isinstance(value, Mapping) and "kernel" in value:
            value = {**value, "kernel": value["kernel"].astype(dtype)}
        found[name] = value
    return found


def _part(tree: Params, wanted: Any, above: Sequence[str] = ("",)) -> Params:
    found = {}
    for name, value in tree.items():
        path = (*above, name)
        if isinstance(value, Mapping):
            inside = _part(value, wanted, path)
            if inside:
                found[name] = inside
        elif wanted(path):
            found[name] = value
    return found

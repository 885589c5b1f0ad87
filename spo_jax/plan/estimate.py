"""From counts to an estimate of time: the model's arithmetic, and a roofline with its terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from spo_jax.models import DecoderConfig, Model
from spo_jax.plan.compiled import Rows
from spo_jax.plan.machines import Chip
from spo_jax.types import Params

EFFICIENCY = {"compute": 0.5, "memory": 0.8, "interconnect": 0.8}
"""Shares of the peaks that are assumed to be reached: assumptions, fitted to nothing."""


class Estimate(NamedTuple):
    """Seconds of one update, by what limits it; an estimate, nothing was run.

    ``overlapped`` is the largest of the three, ``serial`` their sum: the truth lies between if
    the assumed efficiencies hold.
    """

    compute: float
    memory: float
    interconnect: float

    @property
    def overlapped(self) -> float:
        """Everything is hidden behind what takes longest."""
        return max(self)

    @property
    def serial(self) -> float:
        """Nothing is hidden."""
        return sum(self)


def roofline(
    *, flops: int, traffic: int, sent: int, chip: Chip, efficiency: dict[str, float] = EFFICIENCY
) -> Estimate:
    """Seconds for what one device computes, moves through its memory and sends over its links."""
    return Estimate(
        compute=flops / (chip.flops / chip.devices * efficiency["compute"]),
        memory=traffic / (chip.bandwidth / chip.devices * efficiency["memory"]),
        interconnect=sent / (chip.axis_bandwidth * efficiency["interconnect"]),
    )


def model_flops(
    model: Model,
    rows: Sequence[Rows],
    *,
    reference_rows: Sequence[Rows] = (),
    adapters: int | None = None,
) -> int:
    """Operations that an update needs at least: one forward and one backward pass of its rows.

    ``6 N T`` with the tokens that each part sees (layers: a prompt once; output head: completions
    only), and attention over the causal half, ``12 L H d`` for each pair of tokens that meet.
    ``reference_rows`` take a forward pass alone. Where only so many numbers of ``adapters`` are
    trained, the matrices of their base take ``4 N T``, nothing differentiates them. Recomputation,
    and further passes of a solver, are not in it.
    """
    forward = [_forward(model, part) for part in rows]
    matrices, attention = (sum(part[i] for part in forward) for i in range(2))
    alone = sum(sum(_forward(model, part)) for part in reference_rows)
    if adapters is None:
        return 3 * (matrices + attention) + alone
    beside = 6 * adapters * sum(part.tokens for part in rows)
    return 2 * matrices + 3 * attention + beside + alone


def _forward(model: Model, rows: Rows) -> tuple[int, int]:
    """Of one pass: the products with matrices, and those of attention."""
    config = model.config
    scored = rows.count * rows.branches * rows.completion
    head = 2 * config.hidden_size * config.vocab_size * scored
    pairs = sum(_pairs(rows.prompt + rows.completion, w) for w in _windows(config))
    attention = 4 * config.num_heads * config.head_dim * rows.count * rows.branches * pairs
    return 2 * _kernels(model) * rows.tokens + head, attention


def _kernels(model: Model) -> int:
    """Numbers in the layers' matrices that a token needs: of experts, those that it picks."""
    config, layers = model.config, model.abstract_params()["layers"]
    count = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(layers):
        if path[-1].key == "kernel":
            size = math.prod(leaf.shape)
            every = leaf.ndim < 4  # experts have an axis more
            count += size if every else size * config.experts_per_token // config.num_experts
    return count


def _windows(config: DecoderConfig) -> list[int | None]:
    if config.layer_windows is not None:
        return [int(w) for w in config.layer_windows]
    return [config.shared_window] * config.num_layers


def _pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key it may see, in a causal sequence."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def count_parameters(model: Model) -> int:
    """Numbers in the model's parameters."""
    return count_numbers(model.abstract_params())


def count_numbers(params: Params) -> int:
    """Numbers in ``params``, of which shapes do."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))

"""Configuration -> optax chain and schedule."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

NOT_DECAYED = re.compile(r"norm|scale|bias")
"""Paths of parameters without weight decay: normalization scales and biases."""


def make_schedule(
    *, learning_rate: float, schedule: str, steps: int, warmup_ratio: float, final_ratio: float
) -> optax.Schedule:
    """Linear warm-up over ``warmup_ratio * steps`` updates, then cosine, linear or constant.

    The first update already moves: warm-up goes from ``peak / (warm-up + 1)``.
    """
    warmup = round(warmup_ratio * steps)
    rest = max(steps - warmup, 1)
    end = learning_rate * final_ratio
    if schedule == "cosine":
        after = optax.cosine_decay_schedule(learning_rate, rest, alpha=final_ratio)
    elif schedule == "linear":
        after = optax.linear_schedule(learning_rate, end, rest)
    elif schedule == "constant":
        after = optax.constant_schedule(learning_rate)
    else:
        raise ValueError(f"schedule={schedule!r}: choose one of cosine, linear, constant")
    if not warmup:
        return after
    start = learning_rate / (warmup + 1)
    return optax.join_schedules(
        [optax.linear_schedule(start, learning_rate, warmup), after], [warmup]
    )


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: everything but norms and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not NOT_DECAYED.search(jax.tree_util.keystr(path)), params
    )


def _muon_dimensions(params: Any) -> Any:
    """Which leaves are matrices to orthogonalize: layer kernels, stacked or not.

    Embeddings, the output head, norms and biases go to Adam, as Muon's author advises.
    Axis 0 of a stacked kernel is the layer: every layer is a matrix of its own.
    """

    def dimensions(path, leaf):
        name = jax.tree_util.keystr(path)
        if leaf.ndim != 3 or NOT_DECAYED.search(name):
            return None
        return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _adamw(schedule, weight_decay, options):
    return optax.adamw(schedule, weight_decay=weight_decay, mask=decay_mask, **options)


def _lion(schedule, weight_decay, options):
    return optax.lion(schedule, weight_decay=weight_decay, mask=decay_mask, **options)


def _decayed(optimizer, schedule, weight_decay):
    """``optimizer``, then ``- lr * weight_decay * params``, as AdamW has it inside."""
    if not weight_decay:
        return optimizer
    rate = lambda count: -weight_decay * schedule(count)  # noqa: E731
    return optax.chain(optimizer, optax.add_decayed_weights(rate, mask=decay_mask))


# What optax itself offers differs: adafactor's decay is not scaled by the learning rate,
# muon's Adam part has no mask, and sgd has none.
def _adafactor(schedule, weight_decay, options):
    return _decayed(optax.adafactor(schedule, **options), schedule, weight_decay)


def _muon(schedule, weight_decay, options):
    optimizer = optax.contrib.muon(
        schedule, muon_weight_dimension_numbers=_muon_dimensions, **options
    )
    return _decayed(optimizer, schedule, weight_decay)


def _sgd(schedule, weight_decay, options):
    return _decayed(optax.sgd(schedule, **options), schedule, weight_decay)


_OPTIMIZERS = {
    "adamw": (_adamw, optax.adamw),
    "lion": (_lion, optax.lion),
    "adafactor": (_adafactor, optax.adafactor),
    "muon": (_muon, optax.contrib.muon),
    "sgd": (_sgd, optax.sgd),
}
_SET_HERE = {
    *("learning_rate", "weight_decay", "mask", "weight_decay_rate", "weight_decay_mask"),
    *("adam_weight_decay", "muon_weight_dimension_numbers", "consistent_rms"),
}


def optimizer_options(name: str) -> list[str]:
    """Numeric keywords of the optax optimizer that ``options`` may set."""
    parameters = inspect.signature(_OPTIMIZERS[name][1]).parameters
    return [k for k in parameters if k not in _SET_HERE and "dtype" not in k]


def make_optimizer(
    *,
    name: str,
    steps: int,
    learning_rate: float,
    schedule: str = "cosine",
    warmup_ratio: float = 0.1,
    final_ratio: float = 0.0,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    options: Mapping[str, Any] | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optax chain (clip by global norm, then the optimizer) and its schedule over ``steps``.

    Its state and arithmetic are float32, whatever the parameters are (``in_float32``).
    """
    rate = make_schedule(
        learning_rate=learning_rate,
        schedule=schedule,
        steps=steps,
        warmup_ratio=warmup_ratio,
        final_ratio=final_ratio,
    )
    optimizer = _OPTIMIZERS[name][0](rate, weight_decay, dict(options or {}))
    if max_grad_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)
    return in_float32(optimizer), rate


def in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """``optimizer`` on parameters and gradients as float32 (or wider); so are its state and steps.

    In the parameters' own 16 bits a second moment is none: ``b2 = 0.999`` is 1 in bfloat16, and
    in float16 the square of a gradient below 2e-4 and ``eps = 1e-8`` are 0.
    """

    def wide(tree):
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)

    def update(grads, state, params=None):
        return optimizer.update(wide(grads), state, None if params is None else wide(params))

    return optax.GradientTransformation(lambda params: optimizer.init(wide(params)), update)


def typical_steps(
    params: Any, *, name: str, learning_rate: float, options: Mapping[str, Any] | None = None
) -> Any | None:
    """About how far a weight moves in one update at ``learning_rate``: a number for each leaf.

    ``learning_rate`` itself for AdamW and Lion, whose directions have entries of about 1; of a
    matrix under Muon, ``sqrt(max(1, out / in) / max(in, out))`` times that; times the root mean
    square of the parameter (at least 1e-3) for Adafactor, unless it is told otherwise. ``None``
    for SGD: its steps are as long as the gradient.
    """
    if name == "sgd":
        return None
    scaled = name == "adafactor" and (options or {}).get("multiply_by_parameter_scale", True)

    def step(leaf, matrix):
        if scaled:
            square = jnp.mean(jnp.square(leaf.astype(jnp.float32)))
            return learning_rate * jnp.maximum(jnp.sqrt(square), 1e-3)
        if matrix is None:
            return jnp.asarray(learning_rate, jnp.float32)
        fan_in, fan_out = (leaf.shape[a] for a in (matrix.reduction_axis, matrix.output_axis))
        scale = max(1, fan_out / fan_in) / max(fan_in, fan_out)
        return jnp.asarray(learning_rate * scale**0.5, jnp.float32)

    structure: Any = jax.tree.structure(params)
    leaves = jax.tree.leaves(params)
    matrices = [None] * len(leaves)
    if name == "muon":
        matrices = structure.flatten_up_to(_muon_dimensions(params))
    return structure.unflatten(map(step, leaves, matrices))

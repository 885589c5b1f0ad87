"""Weights in four bits, normal float 4: Dettmers et al., arXiv 2305.14314 (QLoRA).

A kernel ``[in, out]`` is cut along ``in`` into blocks of 64. Each block has its largest absolute
value as a float32 scale, and every weight is the nearest of 16 values times that scale: 4.5 bits
a weight. These are the blocks that ``bitsandbytes`` makes of the transposed matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from spo_jax.types import Params

BLOCK = 64

VALUES = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip
"""Quantiles of a normal distribution, with an exact zero; the paper's appendix E."""


@jax.jit
def quantize(kernel: Float[Array, "*L D F"]) -> dict[str, Array]:
    """``codes`` (two a byte, of neighbours along ``in``) and the ``scales`` of the blocks."""
    *lead, width, out = kernel.shape
    blocks = kernel.astype(jnp.float32).reshape(*lead, width // BLOCK, BLOCK, out)
    scales = jnp.max(jnp.abs(blocks), axis=-2)
    parts = blocks / jnp.where(scales == 0, 1, scales)[..., None, :]
    middles = jnp.asarray((VALUES[1:] + VALUES[:-1]) / 2)
    codes = jnp.searchsorted(middles, parts).astype(jnp.uint8)
    pairs = codes.reshape(*lead, width // 2, 2, out)
    return {"codes": pairs[..., 0, :] | pairs[..., 1, :] << 4, "scales": scales}


def dequantize(stored: Mapping[str, Array]) -> Float[Array, "*L D F"]:
    """The float32 kernel that ``quantize`` stored."""
    codes, scales = stored["codes"], stored["scales"]
    *lead, half, out = codes.shape
    both = jnp.stack([codes & 15, codes >> 4], axis=-2)
    blocks = jnp.asarray(VALUES)[both.astype(jnp.int32)].reshape(*lead, -1, BLOCK, out)
    return (blocks * scales[..., None, :]).reshape(*lead, 2 * half, out)


def quantize_layers(params: Params) -> Params:
    """``params`` with the kernels of all layers in four bits; their own buffers are given up.

    Norms, biases, embedding and head stay as they are.

    Raises:
        ValueError: a kernel whose input does not divide into blocks, by name.
    """
    layers = {}
    for block, parts in params["layers"].items():
        layers[block] = dict(parts)
        for name, stored in parts.items():
            if not isinstance(stored, Mapping) or "kernel" not in stored:
                continue
            kernel = stored["kernel"]
            if kernel.shape[-2] % BLOCK:
                raise ValueError(
                    f"lora.quantize=nf4: {name} of {block} takes {kernel.shape[-2]} inputs, which "
                    f"are no blocks of {BLOCK}: set lora.quantize to null for this model"
                )
            rest = {k: v for k, v in stored.items() if k != "kernel"}
            layers[block][name] = quantize(kernel) | rest
            if isinstance(kernel, jax.Array) and not isinstance(kernel, jax.core.Tracer):
                kernel.delete()
    return {**params, "layers": layers}

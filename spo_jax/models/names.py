"""What our parameters are called in a stored model, and in which shape they lie there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax

from spo_jax.types import Params


class TensorName(NamedTuple):
    """The Hugging Face name of one of our parameters; ``{layer}`` stands for the layer index.

    ``transpose``: PyTorch keeps a linear layer as ``[out, in]``, we as ``[in, out]``.
    """

    template: str
    transpose: bool = False

    @property
    def stacked(self) -> bool:
        """Whether our parameter stacks this tensor over the layers."""
        return "{layer}" in self.template


def _linear(ours: str, theirs: str) -> dict[str, TensorName]:
    prefix = "model.layers.{layer}."
    return {
        f"layers/{ours}/kernel": TensorName(f"{prefix}{theirs}.weight", transpose=True),
        f"layers/{ours}/bias": TensorName(f"{prefix}{theirs}.bias"),
    }


LLAMA_NAMES: dict[str, TensorName] = {
    "embed": TensorName("model.embed_tokens.weight"),
    "head": TensorName("lm_head.weight", transpose=True),
    "final_norm/scale": TensorName("model.norm.weight"),
    "layers/attention_norm/scale": TensorName("model.layers.{layer}.input_layernorm.weight"),
    "layers/mlp_norm/scale": TensorName("model.layers.{layer}.post_attention_layernorm.weight"),
    "layers/attention/q_norm/scale": TensorName("model.layers.{layer}.self_attn.q_norm.weight"),
    "layers/attention/k_norm/scale": TensorName("model.layers.{layer}.self_attn.k_norm.weight"),
    **_linear("attention/q", "self_attn.q_proj"),
    **_linear("attention/k", "self_attn.k_proj"),
    **_linear("attention/v", "self_attn.v_proj"),
    **_linear("attention/o", "self_attn.o_proj"),
    **_linear("mlp/gate", "mlp.gate_proj"),
    **_linear("mlp/up", "mlp.up_proj"),
    **_linear("mlp/down", "mlp.down_proj"),
}
"""Our parameter paths -> tensor names; the Llama naming, which most families follow."""

OUT_NORM_NAMES: dict[str, TensorName] = {
    **LLAMA_NAMES,
    "layers/attention_out_norm/scale": TensorName(
        "model.layers.{layer}.post_attention_layernorm.weight"
    ),
    "layers/mlp_norm/scale": TensorName("model.layers.{layer}.pre_feedforward_layernorm.weight"),
    "layers/mlp_out_norm/scale": TensorName(
        "model.layers.{layer}.post_feedforward_layernorm.weight"
    ),
}
"""Where what comes out of attention and MLP is normed: the second norm is that of attention."""


class StoredAs(NamedTuple):
    """How one stored tensor maps to ours: parameter path, layer if stacked, stored shape."""

    path: str
    layer: int | None
    transpose: bool
    shape: tuple[int, ...]


def stored_tensors(params: Params, names: Mapping[str, TensorName]) -> dict[str, StoredAs]:
    """List the tensors a tree of parameters (or of their shapes) is stored as, by their name."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        ours = jax.tree_util.keystr(path, simple=True, separator="/")
        name = names[ours]
        shape = leaf.shape[1:] if name.stacked else leaf.shape
        shape = shape[::-1] if name.transpose else shape
        for layer in range(leaf.shape[0]) if name.stacked else (None,):
            theirs = name.template.format(layer=layer)
            found[theirs] = StoredAs(ours, layer, name.transpose, tuple(shape))
    return found

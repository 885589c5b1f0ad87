"""What our parameters are called in a stored model, and in which shape they lie there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from spo_jax.types import Params


class TensorName(NamedTuple):
    """The Hugging Face name of one of our parameters, with ``{layer}`` and ``{expert}`` in it.

    Parameters of one name lie in one tensor, in the order of the table, behind each other along
    its first axis.

    ``transpose``: PyTorch keeps a linear layer as ``[out, in]``, we as ``[in, out]``.
    """

    template: str
    transpose: bool = False

    @property
    def stacked(self) -> int:
        """Over how many axes our parameter stacks this tensor: layers, and experts."""
        return ("{layer}" in self.template) + ("{expert}" in self.template)


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


PHI3_NAMES: dict[str, TensorName] = {
    **LLAMA_NAMES,
    **_linear("attention/q", "self_attn.qkv_proj"),
    **_linear("attention/k", "self_attn.qkv_proj"),
    **_linear("attention/v", "self_attn.qkv_proj"),
    **_linear("mlp/gate", "mlp.gate_up_proj"),
    **_linear("mlp/up", "mlp.gate_up_proj"),
}
"""Projections of the same input in one tensor. Ours stay apart: heads are cut over devices."""


QWEN3_MOE_NAMES: dict[str, TensorName] = {
    **LLAMA_NAMES,
    **_linear("experts/router", "mlp.gate"),
    **_linear("experts/gate", "mlp.experts.{expert}.gate_proj"),
    **_linear("experts/up", "mlp.experts.{expert}.up_proj"),
    **_linear("experts/down", "mlp.experts.{expert}.down_proj"),
}
MIXTRAL_NAMES: dict[str, TensorName] = {
    **LLAMA_NAMES,
    **_linear("experts/router", "block_sparse_moe.gate"),
    **_linear("experts/gate", "block_sparse_moe.experts.{expert}.w1"),
    **_linear("experts/up", "block_sparse_moe.experts.{expert}.w3"),
    **_linear("experts/down", "block_sparse_moe.experts.{expert}.w2"),
}
"""As they lie in folders; ``transformers`` stacks experts while it reads them."""


class StoredAs(NamedTuple):
    """How one stored tensor maps to ours: its parts, where in them it lies, the stored shape.

    A part is the path of a parameter, and its length along the tensor's first axis. ``place`` are
    the indices of layer and expert, as far as the parameter stacks them.
    """

    parts: tuple[tuple[str, int], ...]
    place: tuple[int, ...]
    transpose: bool
    shape: tuple[int, ...]


def stored_tensors(params: Params, names: Mapping[str, TensorName]) -> dict[str, StoredAs]:
    """List the tensors a tree of parameters (or of their shapes) is stored as, by their name."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    order = {ours: place for place, ours in enumerate(names)}
    found: dict[str, StoredAs] = {}
    for ours in sorted(leaves, key=lambda ours: order[ours]):
        name, leaf = names[ours], leaves[ours]
        stacked, shape = leaf.shape[: name.stacked], leaf.shape[name.stacked :]
        length, *rest = shape[::-1] if name.transpose else shape
        for place in np.ndindex(stacked):
            theirs = name.template.format(**dict(zip(("layer", "expert"), place, strict=False)))
            before = found[theirs].parts if theirs in found else ()
            parts = (*before, (ours, length))
            whole = (sum(size for _, size in parts), *rest)
            found[theirs] = StoredAs(parts, place, name.transpose, whole)
    return found

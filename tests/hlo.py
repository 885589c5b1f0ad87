"""Reading compiled modules."""

import math
import re

_SHAPE = re.compile(r"\b(?:f64|f32|f16|bf16|s64|s32|u32|s16|s8|u8|pred)\[([\d,]+)\]")


def array_shapes(text: str) -> set[tuple[int, ...]]:
    """Shapes of all arrays named in a compiled module's text."""
    return {tuple(int(d) for d in m.split(",")) for m in _SHAPE.findall(text)}


def largest_array_elements(text: str) -> int:
    """Elements of the largest array in a compiled module."""
    return max(math.prod(shape) for shape in array_shapes(text))

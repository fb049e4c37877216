"""Adapters of peft's that are no sum of factors: LoHa, LoKr and (IA)^3. Names, scales and shapes. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from mergekit_lite.checkpoint.meta import Product, TensorMeta

KEY = re.compile(r"(?P<module>.+)\.(?P<part>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|ia3_l)")
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_FIRST = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
_SECOND = (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_w2_a", "lokr_w2_b", "lokr_t2"))
# By kind: the tensors that one module may have.
PARTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "LOHA": (_HADA, (*_HADA, "hada_t1", "hada_t2")),
    "LOKR": tuple((*one, *two) for one in _FIRST for two in _SECOND),
    "IA3": (("ia3_l",),),
}
Shape = tuple[int, ...]


def product(
    kind: str, module: str, found: Mapping[str, TensorMeta], number: Callable[[str, str, str], float]
) -> Product | None:
    """What the tensors `found` of a module, by part, do to its weight; None where some are missing or do not go
    together. `number(module, patterns, key)` is a number of the configuration, by a pattern where one is for it."""
    order = next((order for order in PARTS[kind] if set(order) == set(found)), None)
    if order is None:
        return None
    parts = {part: found[part] for part in order}
    if kind == "IA3":
        return Product(kind, parts, 1.0)
    factor = next((parts[part] for part in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if part in parts), None)
    # Where both halves of LoKr are whole only the configuration knows the rank, and it scales them all the same.
    rank = number(module, "rank_pattern", "r") if factor is None else factor.shape[0] if factor.shape else 0
    return Product(kind, parts, number(module, "alpha_pattern", "alpha") / rank if rank else 0.0)


def config_faults(kind: str, config: Mapping[str, Any], is_number: Callable[[Any], bool]) -> list[str]:
    """What is wrong with the numbers of a configuration of such an adapter."""
    if kind == "IA3":
        return []
    faults = [f"`{key}` is a number" for key in ("alpha", "r") if not is_number(config.get(key))]
    if not faults and config["r"] <= 0:
        faults.append("`r` is above 0")
    return faults


def fits(made: Product, weight: Shape) -> bool:
    """Whether what LoHa or LoKr make has as many rows and numbers as the weight, whose shape peft gives it."""
    shapes = {name: part.shape for name, part in made.parts.items()}
    if made.kind == "LOHA":
        one, two = (_pair(shapes, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
        shape = one if one == two else None
    else:
        left = shapes.get("lokr_w1") or _pair(shapes, "lokr_w1_a", "lokr_w1_b", "")
        right = shapes.get("lokr_w2") or _pair(shapes, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
        if left is None or right is None or len(left) != 2 or not 2 <= len(right) <= 4:
            return False
        # With a kernel of one axis peft's product has its axes in another order: only the numbers are as many.
        rows = weight[0] if len(right) == 3 and weight else left[0] * right[0]
        shape = (rows, math.prod(left) * math.prod(right) // max(1, rows))
    return shape is not None and len(weight) > 1 and shape[0] == weight[0] and math.prod(shape) == math.prod(weight)


def _pair(shapes: Mapping[str, Shape], a: str, b: str, core: str) -> Shape | None:
    """The shape of a product of two factors, or with a core of Tucker's form; None where they do not fit."""
    one, two, middle = shapes[a], shapes[b], shapes.get(core)
    if len(one) != 2 or len(two) != 2:
        return None
    if middle is None:
        return (one[0], two[1]) if one[1] == two[0] else None
    if len(middle) != 4 or middle[:2] != (one[0], two[0]):
        return None
    return (one[1], two[1], *middle[2:])


def scales(made: Product, weight: Shape, transposed: bool) -> int | None:
    """The axis of the weight along which (IA)^3 scales; None where its vector does not fit. `transposed` is for weights
    that are stored as in x out."""
    shape = made.parts["ia3_l"].shape
    if len(weight) != 2 or len(shape) != 2 or 1 not in shape:
        return None
    axis = 0 if shape[1] == 1 and shape[0] != 1 else 1  # of a weight that is stored as out x in
    if shape == (1, 1):
        axis = 0 if weight[1 if transposed else 0] == 1 else 1
    axis = 1 - axis if transposed else axis
    return axis if weight[axis] == math.prod(shape) else None

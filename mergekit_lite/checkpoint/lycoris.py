"""Adapters that are no product of two factors: LoHa, LoKr and (IA)^3 of peft's, and FLoRA. Names, scales and shapes.
No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from mergekit_lite.checkpoint.meta import Product, TensorMeta
from mergekit_lite.checkpoint.patterns import is_number, simple

_PEFT = r"(?P<module>.+)\.(?P<part>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|ia3_l)"
_FLORA = r"(?P<module>.+)\.flora_layer\.(?P<part>param_(?:G|\d))"
_MOST_AXES = 8
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_FIRST = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
_SECOND = (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_w2_a", "lokr_w2_b", "lokr_t2"))
# By kind of peft's: the tensors that one module may have.
PARTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "LOHA": (_HADA, (*_HADA, "hada_t1", "hada_t2")),
    "LOKR": tuple((*one, *two) for one in _FIRST for two in _SECOND),
    "IA3": (("ia3_l",),),
}
# FLoRA has a core and a factor for each axis.
_ORDERS = {**PARTS, "FLORA": tuple(("param_G", *(f"param_{i}" for i in range(n))) for n in range(2, _MOST_AXES + 1))}
KINDS = ("LORA", *_ORDERS)
Shape = tuple[int, ...]


def key(kind: str) -> re.Pattern[str]:
    """What the name of a tensor of such an adapter is, with its `module` and its `part`."""
    return re.compile(_FLORA if kind == "FLORA" else _PEFT)


def product(
    config: Mapping[str, Any],
    module: str,
    found: Mapping[str, TensorMeta],
    number: Callable[[str, str, str], float],
) -> Product | None:
    """What the tensors `found` of a module, by part, do to its weight; None where some are missing or do not go
    together. `number(module, patterns, key)` is a number of the configuration, by a pattern where one is for it."""
    kind = config["peft_type"]
    order = next((order for order in _ORDERS[kind] if set(order) == set(found)), None)
    if order is None:
        return None
    parts = {part: found[part] for part in order}
    if kind == "IA3":
        return Product(kind, parts, 1.0, _feedforward(config, module))
    if kind == "FLORA":
        return Product(kind, parts, float(config["scale"]))
    factor = next((parts[part] for part in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if part in parts), None)
    # Where both halves of LoKr are whole only the configuration knows the rank, and it scales them all the same.
    rank = number(module, "rank_pattern", "r") if factor is None else factor.shape[0] if factor.shape else 0
    return Product(kind, parts, number(module, "alpha_pattern", "alpha") / rank if rank else 0.0)


def _feedforward(config: Mapping[str, Any], module: str) -> bool | None:
    """Whether (IA)^3 scales the inputs of a module, as the configuration says; None where it does not say."""
    named = config.get("feedforward_modules")
    if isinstance(named, str):
        return re.fullmatch(named, module) is not None if simple(named) else None
    return module.endswith(tuple(n for n in named if isinstance(n, str))) if isinstance(named, list) else None


def config_faults(kind: str, config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the numbers of a configuration of such an adapter."""
    if kind == "IA3":
        return []
    if kind == "FLORA":
        return [] if is_number(config.get("scale")) else ["`scale` is a number"]
    faults = [f"`{key}` is a number" for key in ("alpha", "r") if not is_number(config.get(key))]
    if not faults and config["r"] <= 0:
        faults.append("`r` is above 0")
    return faults


def fits(made: Product, weight: Shape) -> bool:
    """Whether what LoHa or LoKr make has as many rows and numbers as the weight, whose shape peft gives it; of FLoRA
    whether it has the weight's shape, its own axes being in x out x kernel."""
    shapes = {name: part.shape for name, part in made.parts.items()}
    if made.kind == "FLORA":
        core, *factors = shapes.values()
        if any(len(factor) != 2 for factor in factors) or core != tuple(factor[1] for factor in factors):
            return False
        first, second, *others = (factor[0] for factor in factors)
        return weight == (second, first, *others)
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
    of linear layers that are stored as in x out."""
    shape = made.parts["ia3_l"].shape
    if len(weight) > 2:
        return _of_kernel(made, shape, weight)
    if len(weight) != 2 or len(shape) != 2 or 1 not in shape:
        return None
    axis = 0 if shape[1] == 1 and shape[0] != 1 else 1  # of a weight that is stored as out x in
    if shape == (1, 1):
        axis = 0 if weight[1 if transposed else 0] == 1 else 1
    axis = 1 - axis if transposed else axis
    return axis if weight[axis] == math.prod(shape) else None


def _of_kernel(made: Product, vector: Shape, weight: Shape) -> int | None:
    """The axis for a convolution. Its vector lies along the second axis whatever it scales, so that where the lengths
    leave it open the configuration decides."""
    if len(vector) != len(weight) or math.prod(vector) != vector[1]:
        return None
    rows, columns = weight[0] == vector[1], groups(vector[1], weight) is not None
    if rows and columns:
        return None if made.feedforward is None else int(made.feedforward)
    axis = 0 if rows else 1 if columns else None
    return None if axis is None or made.feedforward not in (None, axis == 1) else axis


def groups(count: int, weight: Shape) -> int | None:
    """How many groups a convolution with `count` channels for input has; None where its weight cannot be of such."""
    found, rest = divmod(count, max(1, weight[1]))
    return found if found and not rest and weight[0] % found == 0 else None

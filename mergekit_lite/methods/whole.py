"""Methods on whole tensors in memory: the plain form that the streaming engine is held against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.measure import Measure
from mergekit_lite.methods.random import derive_key
from mergekit_lite.methods.spec import Block, Call, Method, Slot, keywords

GRAIN = 65_536


def apply(
    method: Method,
    tensors: Sequence[Tensor],
    params: dict[str, Any],
    *,
    key: int = 0,
    compute: torch.dtype | None = None,
    grain: int = GRAIN,
) -> Tensor:
    """`method` on `tensors` of one shape, a base last where it has one; unnamed settings take their defaults.

    Gives a tensor of the same shape in the dtype `compute` (float32 unless it says float64). Composites are carried out
    part by part, without a base around them; `key` seeds the randomness, `grain` is the number of elements that
    statistics are summed over at a time. Raises TypeError for settings that do not exist and for
    methods that work on names.
    """
    call = method(*(Slot(i) for i in range(len(tensors))), **params)
    return evaluate(call, [tensors], key=key, compute=compute, grain=grain)[0]


def evaluate(
    call: Call | Slot,
    models: Sequence[Sequence[Tensor]],
    *,
    key: int = 0,
    compute: torch.dtype | None = None,
    grain: int = GRAIN,
) -> list[Tensor]:
    """A tree of calls on several tensors at once: `models` holds, for each tensor, the inputs that slots stand for.

    Statistics of pooled methods run over all of them. The result has one tensor for each, in the dtype `compute`.
    """
    if isinstance(call, Slot):
        return [inputs[call.index].to(compute or torch.float32) for inputs in models]
    method, params = call.method, dict(call.params)
    options: dict[str, Any] = {"compute": compute, "grain": grain}
    if method.composite:
        return evaluate(method.fn(*call.inputs, **keywords(params)), models, key=key, **options)
    picked = method.pick(params, len(call.inputs)) if method.pick else None
    if picked is not None:
        return evaluate(call.inputs[picked], models, key=derive_key(key, picked), **options)
    below = [evaluate(c, models, key=derive_key(key, i), **options) for i, c in enumerate(call.inputs)]
    tensors = [list(xs) for xs in zip(*below, strict=True)]
    reach = method.reach_of(params)
    if reach == "structure":
        raise TypeError(f"`{method.name}` works on names, not on numbers")
    stats: list[Any] = [None] * len(tensors)
    if reach == "pooled":
        stats = _measured(method, params, tensors, grain)
    elif reach == "measured":
        stats = [_measured(method, params, [xs], grain)[0] for xs in tensors]
    return [
        _kernel(method, params, xs, stat, derive_key(key, "tensor", i))
        for i, (xs, stat) in enumerate(zip(tensors, stats, strict=True))
    ]


def _measured(method: Method, params: dict[str, Any], tensors: Sequence[Sequence[Tensor]], grain: int) -> list[Any]:
    """The statistic of every tensor, gathered grain by grain as the streaming engine does."""
    if method.measure is None:
        raise TypeError(f"method `{method.name}` is measured but names no measure")
    measure: Measure = method.measure(params, len(tensors[0]), [xs[0].numel() for xs in tensors])
    while True:
        parts = [measure.part(i) for i in range(len(tensors))]
        for part, xs in zip(parts, tensors, strict=True):
            flat = [x.reshape(-1) for x in xs]
            for start in range(0, flat[0].numel(), grain):
                if part is None or part.add([x[start : start + grain] for x in flat], start):
                    break
        if not measure.close(parts):
            return [measure.result(i) for i in range(len(tensors))]


def _kernel(method: Method, params: dict[str, Any], xs: Sequence[Tensor], stat: Any, key: int) -> Tensor:
    shape = method.shape([tuple(x.shape) for x in xs]) if method.shape else tuple(xs[0].shape)
    arguments = keywords(params)
    if stat is not None:
        arguments["stat"] = stat
    if method.positioned:
        arguments["block"] = Block(0, key)
    if method.reports:
        arguments["report"] = lambda done, total: None
    reach = method.reach_of(params)
    if reach == "row":
        length = 1 if not shape else shape[-1] if method.row_axis == "last" else math.prod(shape[1:] or shape)
        xs = [x.reshape(-1, max(1, length)) for x in xs]
    elif reach != "matrix":
        xs = [x.reshape(-1) for x in xs]
    result: Tensor = method.fn(xs, **arguments)
    return result.reshape(shape)

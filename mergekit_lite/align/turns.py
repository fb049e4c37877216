"""Many networks matched one at a time: to the first, or to the mean of the others until none moves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergekit_lite.align.apply import Order
from mergekit_lite.align.cost import Tensors
from mergekit_lite.align.parts import Part
from mergekit_lite.lazy import Tensor


def star(part: Part) -> tuple[list[dict[str, Order]], int, bool]:
    """Every model matched to the first."""
    found, settled = part.identity(), True
    for i in range(1, len(part.models)):
        found[i], ended = part.matched(part.models[0], i, None, part.settings.seed)
        settled = settled and ended
    return found, 1, settled


def merge_many(part: Part, start: list[dict[str, Order]] | None = None) -> tuple[list[dict[str, Order]], int, bool]:
    """Every model in turn matched to the mean of the others, until none moves."""
    count = len(part.models)
    found = part.identity() if start is None else list(start)
    if count == 1:
        return found, 0, True
    for turn in range(part.settings.max_sweeps):
        moved = False
        for i in map(int, np.random.default_rng([part.settings.seed, turn]).permutation(count)):
            part.settings.check()
            others = [part.permuted(j, found[j]) for j in range(count) if j != i]
            warm = None if turn == 0 and start is None else found[i]
            now, _ = part.matched(mean(others), i, warm, part.settings.seed + turn)
            moved = moved or any((now[name] != p).any() for name, p in found[i].items())
            found[i] = now
        if not moved:
            return found, turn + 1, True
    return found, part.settings.max_sweeps, False


def mean(models: Sequence[Tensors]) -> Tensors:
    """The mean of models, tensor by tensor."""

    def of(name: str) -> Tensor:
        total = models[0](name).clone()
        for model in models[1:]:
            total += model(name)
        return total / len(models)

    return of

"""Statistics of quantities that are worked out from the inputs, and statistics that need another one first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.gram import exact_sum, total
from mergekit_lite.methods.measure import Part

# From a tensor's number, the inputs' blocks and the flat index of their first element: blocks to look at instead.
View = Callable[[int, Sequence[Tensor], int], Sequence[Tensor]]
# A measure takes in only the parts that it has made, which `Measure` cannot say.
AnyMeasure = Any


class _SumPart:
    def __init__(self, tensor: int, count: int, view: View):
        self.sums = [0.0] * count
        self._tensor = tensor
        self._view = view

    def add(self, xs: Sequence[Tensor], start: int) -> bool:
        for i, block in enumerate(self._view(self._tensor, xs, start)):
            self.sums[i] += total(block.to(torch.float64))
        return False


class Sums:
    """A `Measure`: the sums of the `count` blocks that `view` makes of the inputs', in double precision and over all
    tensors that share it."""

    def __init__(self, count: int, view: View):
        self._sums = (0.0,) * count
        self._view = view

    def part(self, tensor: int) -> _SumPart:
        return _SumPart(tensor, len(self._sums), self._view)

    def close(self, parts: Sequence[_SumPart | None]) -> bool:
        self._sums = tuple(exact_sum([p.sums[i] for p in parts if p is not None]) for i in range(len(self._sums)))
        return False

    def result(self, tensor: int) -> tuple[float, ...]:
        return self._sums


class _DerivedPart:
    def __init__(self, tensor: int, view: View, parts: Sequence[Part | None]):
        self.parts = list(parts)
        self._tensor = tensor
        self._view = view
        self._active = [i for i, part in enumerate(parts) if part is not None]

    def add(self, xs: Sequence[Tensor], start: int) -> bool:
        blocks = self._view(self._tensor, xs, start)
        for i in list(self._active):
            part = self.parts[i]
            if part is not None and part.add([blocks[i]], start):
                self._active.remove(i)
        return not self._active


class Derived:
    """A `Measure` made of several, each of which looks at one of the blocks that `view` makes of the inputs'. The
    result is a tuple of theirs."""

    def __init__(self, measures: Sequence[AnyMeasure], view: View):
        self._measures = list(measures)
        self._going = [True] * len(measures)
        self._view = view

    def part(self, tensor: int) -> _DerivedPart | None:
        parts = [m.part(tensor) if going else None for m, going in zip(self._measures, self._going, strict=True)]
        return _DerivedPart(tensor, self._view, parts) if any(part is not None for part in parts) else None

    def close(self, parts: Sequence[_DerivedPart | None]) -> bool:
        for i, measure in enumerate(self._measures):
            if self._going[i]:
                self._going[i] = measure.close([None if part is None else part.parts[i] for part in parts])
        return any(self._going)

    def result(self, tensor: int) -> tuple[Any, ...]:
        return tuple(measure.result(tensor) for measure in self._measures)


class Staged:
    """A `Measure` in stages: `after` makes the measure of the next one from the last one, or gives None at the end. The
    result is a tuple of all stages' results."""

    def __init__(self, first: AnyMeasure, after: Callable[[Sequence[AnyMeasure]], AnyMeasure | None]):
        self._stages: list[AnyMeasure] = [first]
        self._after = after

    def part(self, tensor: int) -> Part | None:
        part: Part | None = self._stages[-1].part(tensor)
        return part

    def close(self, parts: Sequence[Part | None]) -> bool:
        if self._stages[-1].close(parts):
            return True
        following = self._after(self._stages)
        if following is None:
            return False
        self._stages.append(following)
        return True

    def result(self, tensor: int) -> tuple[Any, ...]:
        return tuple(stage.result(tensor) for stage in self._stages)

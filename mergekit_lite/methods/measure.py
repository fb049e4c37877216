"""What a streamed statistic looks like to the engine. The statistics themselves stand beside the methods that use them.

A measure goes through one or more rounds. In each round every tensor gets a `Part`, fed with the tensor's blocks in
order; the engine may feed different tensors on different threads. `close` takes in the parts of a round in the order of
the tensors, so that what comes out does not depend on who computed what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mergekit_lite.lazy import Tensor


class Part(Protocol):
    def add(self, xs: Sequence[Tensor], start: int) -> bool:
        """Take in one grain: a 1-D block per input, whose first element has flat index `start`.

        Grains have the same size in every run, whatever the block size or the number of threads, so that a
        floating-point sum formed per grain and added up in order is always the same. True: this tensor needs no more
        grains in this round.
        """
        ...


class Measure(Protocol):
    def part(self, tensor: int) -> Part | None:
        """The accumulator of tensor number `tensor` for the coming round; None where the tensor can be left out."""
        ...

    def close(self, parts: Sequence[Part | None]) -> bool:
        """Take in a round's parts, one per tensor in order. True: another round is needed."""
        ...

    def result(self, tensor: int) -> Any:
        """The statistic for tensor number `tensor`: numbers, strings, None and tuples of them, fit for a journal."""
        ...

"""Sums of small models without torch, whose import takes longer than to merge them: NumPy adds and multiplies.

Methods that are `plain` get blocks of `Numbers` instead of tensors; their code is the same. NumPy rounds a sum, a
difference and a product as torch does, for the standard leaves no choice. It leaves one for which NaN comes out, and
so a tensor with a number that is not finite, at the beginning or at the end, is computed by torch after all.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.lazy import torch
from mergekit_lite.plan.model import Node, OutTensor, Plan, Unit
from mergekit_lite.run.copy import ByteSource
from mergekit_lite.run.evaluate import Blocks
from mergekit_lite.run.nonfinite import reaches
from mergekit_lite.run.sink import Sink
from mergekit_lite.run.threads import keep_freed_blocks
from mergekit_lite.run.transplant import Shared

# Numbers, summed over the blocks of all nodes and targets, above which torch has caught up: NumPy takes some 0.3 ns
# more for each, torch has an import of more than a second.
MOST = 1 << 32
BLOCK = 1 << 17  # elements at most: smaller ones ask for Python's lock more often
STORED = ("BF16", "F32")


class Numbers:
    """A block of float32 numbers that knows the operations of a tensor which plain methods use."""

    __slots__ = ("values",)

    def __init__(self, values: NDArray[np.float32]):
        self.values = values

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __mul__(self, factor: float) -> Numbers:
        return Numbers(self.values * np.float32(factor))

    def __sub__(self, other: Numbers) -> Numbers:
        return Numbers(self.values - other.values)

    def add_(self, other: Numbers | float) -> Numbers:
        self.values += other.values if isinstance(other, Numbers) else np.float32(other)
        return self

    def clone(self) -> Numbers:
        return Numbers(self.values.copy())

    def new_zeros(self, shape: tuple[int, ...]) -> Numbers:
        return Numbers(np.zeros(shape, dtype=np.float32))

    def numel(self) -> int:
        return self.values.size

    def reshape(self, *shape: int) -> Numbers:
        return Numbers(self.values.reshape(shape))


class _NotFinite(Exception):
    """A number is NaN or infinite, so that torch has to do this tensor."""


class _Loader:
    """Stored numbers as `Numbers`. For one thread."""

    def __init__(self, source: ByteSource):
        self.source = source
        self._raw = np.empty(0, dtype=np.uint16)
        self.shared = Shared()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def load(self, meta: TensorMeta, start: int, stop: int) -> Any:
        """Elements [start, stop) of a tensor, flat, in memory of their own. Raises _NotFinite."""
        bits = np.empty(stop - start, dtype=np.uint32)
        if meta.dtype == "F32":
            self.source.read_bytes(meta, 4 * start, 4 * stop, bits.data.cast("B"))
            _check_finite(bits)
        else:
            if len(self._raw) < stop - start:
                self._raw = np.empty(stop - start, dtype=np.uint16)
            raw = self._raw[: stop - start]
            self.source.read_bytes(meta, 2 * start, 2 * stop, raw.data.cast("B"))
            _check_finite(raw)
            np.copyto(bits, raw)
            bits <<= 16
        return Numbers(bits.view(np.float32))


class PlainSums:
    """Computes units of a plan whose methods are all plain."""

    def __init__(self, blocks: Blocks, torch_instead: Callable[[], Any]):
        self._blocks = blocks
        self._torch_instead = torch_instead

    def unit(
        self, unit: Unit, sink: Sink, found: dict[str, dict[str, int]], report: Callable[[Node, int, int], None]
    ) -> None:
        """Compute the unit's part of every target and write it. Counts go to `found`."""
        try:
            with np.errstate(all="ignore"):
                roots = [tensor.node for _, tensor in unit.targets]
                for start, results in self._blocks.last(roots, unit.start, unit.stop, {}):
                    for (output, tensor), result in zip(unit.targets, results, strict=True):
                        _write(sink, output, tensor, start, result)
        except _NotFinite:
            self._torch_instead().unit(unit, sink, found, report)


def without_torch(plan: Plan, units: Sequence[Unit]) -> bool:
    """Whether the units can be computed without torch, and are sooner done so."""
    if "torch" in sys.modules or plan.recipe.compute != "float32" or plan.pools or plan.alignments:
        return False
    total = 0
    for unit in units:
        if not unit.targets[0][1].copied:
            total += (unit.stop - unit.start) * (len(unit.nodes) + len(unit.targets))
            if not all(tensor.dtype in STORED for _, tensor in unit.targets) or not all(map(_is_plain, unit.nodes)):
                return False
    return total <= MOST


def _is_plain(node: Node) -> bool:
    if node.load is not None:
        return node.load.dtype in STORED and node.load.packed is None
    return node.method is not None and node.method.plain


@contextmanager
def plain_sums(
    plan: Plan, source: ByteSource, block: int, strict: bool, stopped: Callable[[], None]
) -> Iterator[PlainSums]:
    """What computes units of `plan`, for which `without_torch` is true."""
    lock = threading.Lock()
    with ExitStack() as stack:

        @functools.cache
        def computer() -> Any:
            from mergekit_lite.run.compute import computing

            return stack.enter_context(computing(plan, source, block, strict, stopped))

        def torch_instead() -> Any:
            with lock:
                return computer()

        keep_freed_blocks()
        yield PlainSums(Blocks(functools.partial(_Loader, source), min(block, BLOCK), stopped), torch_instead)


def _check_finite(bits: NDArray[Any]) -> None:
    """Raise _NotFinite where one of the numbers (bfloat16 as uint16, float32 as uint32) is NaN or infinite."""
    if reaches(bits, 0x7F80 << 8 * (bits.itemsize - 2)):
        raise _NotFinite


def _write(sink: Sink, output: int, tensor: OutTensor, start: int, result: Any) -> None:
    """Store a block in the tensor's dtype, rounded to nearest, ties to even. Raises _NotFinite."""
    bits = result.values.view(np.uint32)
    if tensor.dtype == "BF16":
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        bits = rounded.astype(np.uint16)
    _check_finite(bits)
    sink.write_bytes(output, tensor, start * bits.itemsize, bits.data.cast("B"))

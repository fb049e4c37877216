"""What numbers a checkpoint holds: non-finite ones, zeros, range, mean and spread of every tensor, in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lite.checkpoint.dtype import TORCH_DTYPES
from mergekit_lite.checkpoint.meta import Checkpoint, TensorMeta
from mergekit_lite.checkpoint.source import Source
from mergekit_lite.report.stream import BLOCK, Advance, Found, blocks, each, has_numbers, opened


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts over `count` numbers; the range, mean and squares of the finite ones, in float64. The real and the
    imaginary part of a complex number are two numbers. `squares` is the sum of the squared distances from the mean."""

    count: int = 0
    nan: int = 0
    positive_infinity: int = 0
    negative_infinity: int = 0
    zeros: int = 0
    min: float = math.inf
    max: float = -math.inf
    mean: float = 0.0
    squares: float = 0.0

    @property
    def nonfinite(self) -> int:
        return self.nan + self.positive_infinity + self.negative_infinity

    @property
    def finite(self) -> int:
        return self.count - self.nonfinite

    @property
    def std(self) -> float:
        """The standard deviation of the finite numbers as a whole population (divided by n)."""
        return math.sqrt(self.squares / self.finite) if self.finite else 0.0

    def __add__(self, other: Stats) -> Stats:
        """The statistics of both sets of numbers together, by Chan's formula."""
        finite = self.finite + other.finite
        part = other.finite / finite if finite else 0.0
        apart = other.mean - self.mean
        return Stats(
            self.count + other.count,
            self.nan + other.nan,
            self.positive_infinity + other.positive_infinity,
            self.negative_infinity + other.negative_infinity,
            self.zeros + other.zeros,
            min(self.min, other.min),
            max(self.max, other.max),
            self.mean + apart * part,
            self.squares + other.squares + apart * apart * (self.finite * part),
        )

    def as_json(self) -> dict[str, object]:
        """`min`, `max`, `mean` and `std` are None where no number is finite, or where they exceed float64."""

        def known(number: float) -> float | None:
            return number if self.finite and math.isfinite(number) else None

        return {
            "count": self.count,
            "nan": self.nan,
            "positive_infinity": self.positive_infinity,
            "negative_infinity": self.negative_infinity,
            "zeros": self.zeros,
            "min": known(self.min),
            "max": known(self.max),
            "mean": known(self.mean),
            "std": known(self.std),
        }


def stats_of(values: Tensor) -> Stats:
    """The statistics of one block of real numbers of any dtype, 1-D."""
    x = values.to(torch.float64)
    count, nan, positive, negative = x.numel(), 0, 0, 0
    # One pass tells where all is well: with a NaN or an infinity anywhere the sum of squares is not finite.
    if not math.isfinite(float(x.dot(x))):
        nan = int(torch.isnan(x).sum())
        positive, negative = int(torch.isposinf(x).sum()), int(torch.isneginf(x).sum())
        x = x[torch.isfinite(x)]
    if not x.numel():
        return Stats(count, nan, positive, negative)
    zeros = x.numel() - int(torch.count_nonzero(x))
    low, high = torch.aminmax(x)
    mean = x.mean()
    apart = x - mean
    return Stats(count, nan, positive, negative, zeros, float(low), float(high), float(mean), float(apart.dot(apart)))


def measure(reader: Source, meta: TensorMeta, advance: Advance, block: int = BLOCK) -> Stats | None:
    """The statistics of a stored tensor, read block by block; None where its dtype holds no numbers for torch."""
    if not has_numbers(meta.dtype):
        advance(meta.nbytes)
        return None
    total = Stats()
    for values in blocks(reader, meta, block):
        total = total + stats_of(values)
        advance(values.nbytes)
    return total


def nonfinite(reader: Source, meta: TensorMeta, advance: Advance, block: int = BLOCK) -> int:
    """How many NaNs and infinities a stored tensor holds; 0 where its dtype has none or torch lacks that dtype."""
    if not has_numbers(meta.dtype):
        advance(meta.nbytes)
        return 0
    dtype = TORCH_DTYPES[meta.dtype]
    if not (dtype.is_floating_point or dtype.is_complex):
        advance(meta.nbytes)
        return 0
    found = 0
    for values in blocks(reader, meta, block):
        # torch has no isfinite for the dtypes of one byte.
        wide = values.to(torch.float32) if values.element_size() == 1 else values
        found += wide.numel() - int(torch.isfinite(wide).sum())
        advance(values.nbytes)
    return found


def over(
    checkpoint: Checkpoint,
    look: Callable[[Source, TensorMeta, Advance], Found],
    threads: int,
    advance: Advance = lambda nbytes: None,
) -> Iterator[tuple[TensorMeta, Found]]:
    """`look` at every tensor of a checkpoint, in its order. Raises InputError where a file cannot be read."""
    metas = list(checkpoint.tensors.values())
    with opened(checkpoint.shards, threads) as reader:
        yield from zip(metas, each(reader, lambda meta: look(reader, meta, advance), metas, threads), strict=True)


def total(found: Iterable[tuple[TensorMeta, Stats | None]]) -> Stats:
    """The statistics of all floating tensors together. Integers and booleans are left out: they are no weights."""
    return sum((stats for meta, stats in found if stats is not None and is_floating(meta.dtype)), Stats())


def is_floating(dtype: str) -> bool:
    """True for a safetensors dtype whose elements are weights: a floating or complex one, sub-byte ones included."""
    return dtype.startswith(("F", "BF", "C"))

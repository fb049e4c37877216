"""How well a checkpoint's weights bear rounding to few bits: EQ-Net's statistics (ICCV 2023, arXiv 2308.07650).

Two passes over every tensor of two or more axes: the first finds ranges and the mean, the second the moments about it
and the errors. Memory is a block for each thread and two numbers for each row of a tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_lite.checkpoint.dtype import TORCH_DTYPES
from mergekit_lite.checkpoint.meta import MERGEABLE, Checkpoint, TensorMeta
from mergekit_lite.checkpoint.source import Source
from mergekit_lite.errors import InputError
from mergekit_lite.report.stream import BLOCK, Advance, check_numbers, each, opened

BITS = (2, 4, 8)
GRANULARITIES = ("tensor", "channel")  # a channel is a row along the first axis
RANGES = ("symmetric", "asymmetric")
FLAGGED = 4  # bits at which a merged tensor is held against its parents
Way = tuple[int, str, str]
WAYS: tuple[Way, ...] = tuple(itertools.product(BITS, GRANULARITIES, RANGES))


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of one tensor, or of several together: `squares` is the sum of the squared distances from each one's
    mean, `lost` what fake quantisation loses, as a sum of squares, by bits, granularity and range. The third and fourth
    standardised moments are those of a tensor whose numbers differ, else None."""

    count: int
    squares: float
    lost: Mapping[Way, float]
    skewness: float | None = None
    kurtosis: float | None = None

    def error(self, way: Way) -> float | None:
        """mse / var; None where all numbers are one."""
        return self.lost[way] / self.squares if self.squares > 0 else None

    def as_json(self) -> dict[str, object]:
        errors = {str(bits): {g: {r: self.error((bits, g, r)) for r in RANGES} for g in GRANULARITIES} for bits in BITS}
        return {"count": self.count, "skewness": self.skewness, "kurtosis": self.kurtosis, "error": errors}


def together(shapes: Iterable[Shape]) -> Shape:
    """All of them: the mean error, weighted by variance and size. No moments."""
    shapes = list(shapes)
    lost = {way: math.fsum(shape.lost[way] for shape in shapes) for way in WAYS}
    return Shape(sum(shape.count for shape in shapes), math.fsum(shape.squares for shape in shapes), lost)


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor: its numbers, None where there is a NaN or infinity among them, and those of the same tensor of each
    parent that has it, by the parent's location."""

    meta: TensorMeta
    shape: Shape | None
    parents: Mapping[str, Shape]

    def worst(self, way: Way) -> float | None:
        """The largest error of a parent, None where none is known."""
        errors = [error for shape in self.parents.values() if (error := shape.error(way)) is not None]
        return max(errors, default=None)

    @property
    def worse(self) -> tuple[Way, ...]:
        """The ways of rounding to `FLAGGED` bits that lose more than they do of any parent."""
        if self.shape is None:
            return ()
        pairs = [(way, self.shape.error(way), self.worst(way)) for way in WAYS if way[0] == FLAGGED]
        return tuple(way for way, own, worst in pairs if own is not None and worst is not None and own > worst)

    def as_json(self) -> dict[str, object]:
        made: dict[str, object] = {"name": self.meta.name, **(self.shape.as_json() if self.shape is not None else {})}
        if self.parents:
            made["parents"] = {name: shape.as_json()["error"] for name, shape in self.parents.items()}
            made["worse"] = [{"bits": bits, "granularity": g, "range": r} for bits, g, r in self.worse]
        return made


def fake_quantise(x: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    """`x` rounded to integers of `bits` bits and back, half to even. `low` and `high` are the least and the largest
    number of x, or of each row as (rows, 1); where they are one, x is not changed.

    Symmetric codes go from -(2^(bits-1) - 1) to that, with the scale max |x| / (2^(bits-1) - 1); the others from 0 to
    2^bits - 1, with the scale (high - low) / (2^bits - 1) and a whole number for zero.
    """
    if symmetric:
        most = 2 ** (bits - 1) - 1
        scale = torch.maximum(low.abs(), high.abs()) / most
        made = torch.round(x / scale).clamp_(-most, most).mul_(scale)
    else:
        most = 2**bits - 1
        scale = (high - low) / most
        zero = torch.round(-low / scale)
        made = torch.round(x / scale).add_(zero).clamp_(0, most).sub_(zero).mul_(scale)
    return torch.where(scale > 0, made, x)


def measure(reader: Source, meta: TensorMeta, advance: Advance, block: int = BLOCK) -> Shape | None:
    """The figures of a stored tensor of two or more axes; None where it holds a NaN or infinity. In float64."""
    rows = meta.shape[0]
    low, high = torch.full((rows, 1), math.inf).double(), torch.full((rows, 1), -math.inf).double()
    total = 0.0
    for first, last, values in _pieces(reader, meta, block):
        low[first:last] = torch.minimum(low[first:last], values.amin(dim=1, keepdim=True))
        high[first:last] = torch.maximum(high[first:last], values.amax(dim=1, keepdim=True))
        total += float(values.sum())
        advance(meta.nbytes * values.numel() // meta.numel)
    # A NaN goes through minima, maxima and sums.
    if not (bool(low.isfinite().all()) and bool(high.isfinite().all())):
        return None
    mean = total / meta.numel
    lows, highs = {"channel": low, "tensor": low.min()}, {"channel": high, "tensor": high.max()}
    moments = [0.0, 0.0, 0.0]  # the second, third and fourth
    lost = dict.fromkeys(WAYS, 0.0)
    for first, last, values in _pieces(reader, meta, block):
        apart = values - mean
        squares = apart * apart
        for i, power in enumerate((squares, squares * apart, squares * squares)):
            moments[i] += float(power.sum())
        for way in WAYS:
            bits, granularity, kind = way
            ends = (lows[granularity], highs[granularity])
            if granularity == "channel":
                ends = (low[first:last], high[first:last])
            left = (fake_quantise(values, *ends, bits, kind == "symmetric") - values).view(-1)
            lost[way] += float(left.dot(left))
    second, third, fourth = (moment / meta.numel for moment in moments)
    known = second > 0
    return Shape(
        meta.numel,
        second * meta.numel,
        lost,
        third / second**1.5 if known else None,
        fourth / second**2 if known else None,
    )


def _pieces(reader: Source, meta: TensorMeta, block: int) -> Iterator[tuple[int, int, Tensor]]:
    """The tensor in float64, in pieces of about `block` elements: first row, last row + 1, and these rows or, where a
    row is longer than a piece, a part of one. The same pieces in every run."""
    width = meta.numel // meta.shape[0]
    stored = torch.empty(max(1, block // width) * width if width <= block else block, dtype=TORCH_DTYPES[meta.dtype])
    step = len(stored) if width <= block else width
    for start in range(0, meta.numel, step):
        stop = min(start + step, meta.numel)
        first, last = start // width, stop // width
        for at in range(start, stop, len(stored)):
            end = min(at + len(stored), stop)
            values = reader.read(meta, at, end, stored[: end - at]).to(torch.float64)
            yield first, last, values.view(last - first, -1)


def is_measured(meta: TensorMeta) -> bool:
    """Whether a tensor has rows of numbers that could be rounded: vectors stay as they are wherever weights are."""
    return meta.dtype in MERGEABLE and len(meta.shape) > 1 and meta.numel > 0


def quantisability(
    model: Checkpoint,
    parents: Sequence[Checkpoint] = (),
    *,
    threads: int = 1,
    advance: Advance = lambda nbytes: None,
    block: int = BLOCK,
) -> list[Weight]:
    """The figures of every tensor of `model` with two or more axes, and of the same tensors of `parents`, those of its
    name and shape, in the order of `model`. `advance` hears of the bytes of all of them as they are first read. Raises
    InputError where a file cannot be read, where numbers are codes, or where a parent has nothing to compare."""
    for checkpoint in (model, *parents):
        check_numbers(checkpoint)
    metas = [meta for meta in model.tensors.values() if is_measured(meta)]
    jobs: list[tuple[str, TensorMeta, TensorMeta]] = []  # parent, the model's tensor, the one to look at
    for parent in parents:
        alike = [(meta, parent.tensors[meta.name]) for meta in metas if meta.name in parent.tensors]
        alike = [(meta, other) for meta, other in alike if other.shape == meta.shape and is_measured(other)]
        if not alike:
            hint = "name the models that went into the merge; `merge inspect --tensors` shows names and shapes"
            raise InputError(f"`{parent.location}` has no weight of `{model.location}`, by name and shape", hint=hint)
        jobs += [(parent.location, meta, other) for meta, other in alike]
    work = [*metas, *(other for _, _, other in jobs)]
    shards = {shard.path: shard for checkpoint in (model, *parents) for shard in checkpoint.shards}
    again = sum(sorted(meta.nbytes for meta in work)[-threads:])
    with opened(shards.values(), threads, again) as reader:
        shapes = list(each(reader, lambda meta: measure(reader, meta, advance, block), work, threads))
    found: dict[str, dict[str, Shape]] = {}
    for (location, meta, _), shape in zip(jobs, shapes[len(metas) :], strict=True):
        if shape is not None:
            found.setdefault(meta.name, {})[location] = shape
    return [Weight(m, shape, found.get(m.name, {})) for m, shape in zip(metas, shapes[: len(metas)], strict=True)]

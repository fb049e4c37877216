"""How far each layer of a model has moved from another, relative to its size: a screen for straggler layers that needs
neither data nor a score (In search of the successful interpolation, arXiv 2410.16476, finds them by sharpness)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergekit_lite.checkpoint.meta import Checkpoint, TensorMeta
from mergekit_lite.checkpoint.source import Source
from mergekit_lite.family.home import by_home
from mergekit_lite.report.stream import BLOCK, Advance, blocks, each, opened
from mergekit_lite.report.task_vectors import compared


@dataclass(frozen=True, slots=True)
class Moved:
    """A layer, or a module outside of the layers: its `tensors`, whether any of them is more than a vector, and
    ||model - base|| / ||base|| over all of them: infinite where the base is 0 and the model is not, NaN where a number
    is not finite."""

    tensors: tuple[str, ...]
    matrices: bool
    ratio: float


def screen(
    base: Checkpoint, model: Checkpoint, *, threads: int, advance: Advance, block: int = BLOCK
) -> dict[str, Moved]:
    """Every layer that both have. Both are read once, block by block. Raises InputError where they have no tensor of
    one name and shape in common."""
    family, names, _ = compared(base, [model])
    with opened([*base.shards, *model.shards], threads) as reader:

        def one(name: str) -> tuple[float, float]:
            return _squares(reader, base.tensors[name], model.tensors[name], advance, block)

        found = dict(zip(names, each(reader, one, names, threads), strict=True))
    return {
        home: Moved(
            tuple(members),
            any(len(base.tensors[name].shape) > 1 for name in members),
            _ratio([found[name] for name in members]),
        )
        for home, members in by_home(family, names).items()
    }


def _squares(reader: Source, base: TensorMeta, model: TensorMeta, advance: Advance, block: int) -> tuple[float, float]:
    """||model - base||^2 and ||base||^2."""
    moved, own = [], []
    for start, end in zip(blocks(reader, base, block), blocks(reader, model, block), strict=True):
        before = start.to(torch.float64)
        delta = end.to(torch.float64).sub_(before)
        moved.append(float(delta.dot(delta)))
        own.append(float(before.dot(before)))
        advance(start.nbytes)
    return _sum(moved), _sum(own)


def _ratio(squares: Sequence[tuple[float, float]]) -> float:
    moved, own = (_sum([pair[i] for pair in squares]) for i in range(2))
    if not (math.isfinite(moved) and math.isfinite(own)):
        return math.nan
    return math.sqrt(moved) / math.sqrt(own) if own else math.inf if moved else 0.0


def _sum(values: Sequence[float]) -> float:
    """Exact, and no error where a value is infinite of either kind."""
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan

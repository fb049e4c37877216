"""How far the singular directions of two checkpoints' matrices agree: what matching units is to change."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mergekit_lite.align.diagnose import Likeness, likeness
from mergekit_lite.checkpoint.dtype import TORCH_DTYPES
from mergekit_lite.checkpoint.meta import MERGEABLE, Checkpoint, TensorMeta
from mergekit_lite.checkpoint.source import Source
from mergekit_lite.report.stream import Advance, each, opened


def directions(
    a: Checkpoint, b: Checkpoint, *, threads: int = 1, advance: Advance = lambda nbytes: None
) -> Iterator[tuple[str, Likeness]]:
    """The figures of every matrix that both have in one shape, in the order of `a`. Each thread holds one pair of
    tensors and their singular vectors: seconds to minutes for the largest matrices of a language model. A matrix with
    NaN or infinite numbers has none. `advance` hears of the bytes of `a`. Raises InputError where a file cannot be
    read."""
    pairs = [(meta, b.tensors[name]) for name, meta in a.tensors.items() if name in b.tensors]
    pairs = [pair for pair in pairs if _comparable(*pair)]
    with opened([*a.shards, *b.shards], threads) as reader:

        def one(pair: tuple[TensorMeta, TensorMeta]) -> tuple[str, Likeness] | None:
            left, right = (_whole(reader, meta) for meta in pair)
            advance(pair[0].nbytes)
            sound = bool(torch.isfinite(left).all()) and bool(torch.isfinite(right).all())
            return (pair[0].name, likeness(left, right)) if sound else None

        yield from (found for found in each(reader, one, pairs, threads) if found is not None)


def _comparable(a: TensorMeta, b: TensorMeta) -> bool:
    numbers = a.dtype in MERGEABLE and b.dtype in MERGEABLE
    return numbers and a.shape == b.shape and len(a.shape) > 1 and a.numel > 0


def _whole(reader: Source, meta: TensorMeta) -> Tensor:
    stored = torch.empty(meta.numel, dtype=TORCH_DTYPES[meta.dtype])
    wide = torch.float64 if meta.dtype == "F64" else torch.float32
    return reader.read(meta, 0, meta.numel, stored).view(meta.shape).to(wide)

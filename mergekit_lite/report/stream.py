"""Weights in blocks: bounded memory whatever the size of a tensor, several tensors at once in threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from mergekit_lite.checkpoint.dtype import TORCH_DTYPES
from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.run.threads import one_thread_per_operation

BLOCK = 1 << 15  # elements: 256 kB in float64, so that a block and what is made of it stay in the cache
RAW_BLOCK = 1 << 20  # bytes, of dtypes that torch does not know
Advance = Callable[[int], None]  # is told of every few bytes read, from any thread

Item = TypeVar("Item")
Found = TypeVar("Found")


def has_numbers(dtype: str) -> bool:
    """False for the sub-byte dtypes, and for those that this version of torch lacks: they are bytes and no more."""
    return dtype in TORCH_DTYPES


def blocks(reader: Reader, meta: TensorMeta, block: int = BLOCK) -> Iterator[Tensor]:
    """The tensor's elements in order, 1-D, at most `block` at once: in its dtype, or as uint8 where it has no numbers.

    A complex number comes as two real ones. The memory is used again for the next block.
    """
    if has_numbers(meta.dtype):
        buffer = torch.empty(min(block, meta.numel), dtype=TORCH_DTYPES[meta.dtype])
        for start in range(0, meta.numel, block):
            values = reader.read(meta, start, min(start + block, meta.numel), buffer[: meta.numel - start])
            yield torch.view_as_real(values).view(-1) if values.is_complex() else values
    else:
        raw = torch.empty(min(RAW_BLOCK, meta.nbytes), dtype=torch.uint8)
        for start in range(0, meta.nbytes, RAW_BLOCK):
            stop = min(start + RAW_BLOCK, meta.nbytes)
            part = raw[: stop - start]
            reader.read_bytes(meta, start, stop, part.numpy().data)
            yield part


def each(work: Callable[[Item], Found], items: Sequence[Item], threads: int) -> Iterator[Found]:
    """`work` of every item, in the order of the items. An error, or an end of the iteration, stops what has not begun.

    torch's own threads are off meanwhile, since they would add up in another order on another machine.
    """
    with one_thread_per_operation():
        pool = ThreadPoolExecutor(threads)
        try:
            yield from pool.map(work, items)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

"""Weights in blocks: bounded memory whatever the size of a tensor, several tensors at once in threads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mergekit_lite.checkpoint.dtype import TORCH_DTYPES
from mergekit_lite.checkpoint.meta import Checkpoint, ShardFile, TensorMeta
from mergekit_lite.checkpoint.quantized import refused
from mergekit_lite.checkpoint.source import Source
from mergekit_lite.errors import InputError
from mergekit_lite.run.inputs import source_of
from mergekit_lite.run.threads import one_thread_per_operation

BLOCK = 1 << 15  # elements: 256 kB in float64, so that a block and what is made of it stay in the cache
RAW_BLOCK = 1 << 20  # bytes, of dtypes that torch does not know
Advance = Callable[[int], None]  # is told of every few bytes read, from any thread

Item = TypeVar("Item")
Found = TypeVar("Found")


def has_numbers(dtype: str) -> bool:
    """False for the sub-byte dtypes, and for those that this version of torch lacks: they are bytes and no more."""
    return dtype in TORCH_DTYPES


def blocks(reader: Source, meta: TensorMeta, block: int = BLOCK) -> Iterator[Tensor]:
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


def check_numbers(checkpoint: Checkpoint) -> None:
    """Raises InputError where the checkpoint's weights are codes of a method of quantisation that is not read here."""
    for config in (checkpoint.config, *checkpoint.configs.values()):
        codes = refused(config, checkpoint.folder)
        if codes is not None:
            raise InputError(f"`{checkpoint.location}` {codes.says}", hint=codes.hint)


def opened(shards: Iterable[ShardFile], threads: int, again: int = 0) -> Source:
    """What reads these files, on the disk or on the Hub, in order and from one or two places at once. Those on the Hub
    are fetched once where no more than `again` bytes are at work that are come back to."""
    return source_of(shards, threads, 2, again, Path(tempfile.gettempdir()))


def each(reader: Source, work: Callable[[Item], Found], items: Sequence[Item], threads: int) -> Iterator[Found]:
    """`work`, which reads from `reader`, of every item, in the order of the items. An error, or an end of the
    iteration, stops what has not begun, and what waits for the Hub.

    torch's own threads are off meanwhile, since they would add up in another order on another machine.
    """
    with one_thread_per_operation():
        pool = ThreadPoolExecutor(threads)
        try:
            yield from pool.map(work, items)
        except BaseException:
            reader.abort()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

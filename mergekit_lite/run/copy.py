"""Tensors that are taken over byte for byte. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from mergekit_lite.checkpoint.meta import DTYPE_BITS, TensorMeta
from mergekit_lite.plan.model import Unit
from mergekit_lite.plan.order import COPY_BLOCK
from mergekit_lite.run.nonfinite import nonfinite, note, note_output
from mergekit_lite.run.sink import Sink


class ByteSource(Protocol):
    """Where stored tensors come from."""

    def read_bytes(self, meta: TensorMeta, start: int, stop: int, buffer: memoryview) -> None:
        """Stored bytes [start, stop) of a tensor into `buffer`."""
        ...


def copy(
    unit: Unit,
    source: ByteSource,
    sink: Sink,
    stopped: Callable[[], None],
    found: dict[str, dict[str, int]],
    strict: bool,
) -> None:
    """Copy the unit's part of every target. Numbers that are not finite are counted in `found`, or refused by `strict`;
    `stopped` is asked between blocks."""
    seen: set[TensorMeta] = set()  # two saves of one tensor count its numbers once
    for output, tensor in unit.targets:
        meta = tensor.node.load
        assert meta is not None
        first = meta not in seen
        seen.add(meta)
        bits = DTYPE_BITS[meta.dtype]
        at, end = unit.start * bits // 8, unit.stop * bits // 8
        buffer = memoryview(bytearray(min(COPY_BLOCK, end - at)))
        while at < end:
            stopped()
            part = buffer[: min(len(buffer), end - at)]
            source.read_bytes(meta, at, at + len(part), part)
            count = nonfinite(meta.dtype, part)
            if first:
                note(meta, count, found["nonfinite"], strict)
            note_output(tensor.name, count, found["output_nonfinite"], strict=False)
            sink.write_bytes(output, tensor, at, part)
            at += len(part)

"""Tensors that are computed: what a thread does for one unit of work."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_lite.checkpoint.dtype import TORCH_DTYPES
from mergekit_lite.checkpoint.meta import BIT, TensorMeta
from mergekit_lite.methods.fp8 import BLOCK, quantized
from mergekit_lite.methods.gram import exact_sum
from mergekit_lite.plan.model import Node, OutTensor, Plan, Unit
from mergekit_lite.run.bits import pack_bits
from mergekit_lite.run.copy import ByteSource
from mergekit_lite.run.device import DeviceLoader, find_device, lane
from mergekit_lite.run.evaluate import Blocks, subset
from mergekit_lite.run.nonfinite import nonfinite, note, note_output, reaches
from mergekit_lite.run.pools import Watchers, measure_pools
from mergekit_lite.run.program import Loader, Loads, Stats
from mergekit_lite.run.sink import Sink
from mergekit_lite.run.threads import keep_freed_blocks, one_thread_per_operation
from mergekit_lite.run.transplant import Shared

if TYPE_CHECKING:
    from mergekit_lite.run.alignment import Solved

# The largest number of float8_e4m3fn, its bits, and the largest number that is rounded to it.
E4M3_MAX, E4M3_MAX_BITS, E4M3_REACH = 448.0, 0x7E, 464.0


@dataclass
class Computer:
    """Computes units of a plan, with the statistics over all tensors once `measure` has gathered them."""

    blocks: Blocks
    strict: bool
    stats: Stats

    def measure(
        self, plan: Plan, known: Mapping[str, Sequence[Any]], threads: Executor, watchers: Watchers
    ) -> dict[str, Solved]:
        """Gather the statistics that several tensors share, and give what was found for the plan's alignments. `known`
        holds those of an earlier run."""
        self.stats, solved = measure_pools(plan, known, self.blocks, threads, watchers)
        return solved

    def unit(
        self, unit: Unit, sink: Sink, found: dict[str, dict[str, Any]], report: Callable[[Node, int, int], None]
    ) -> None:
        """Compute the unit's part of every target and write it. Counts go to `found`; `report` is told of the steps of
        long iterations."""

        def watch(meta: TensorMeta, values: Tensor) -> None:
            # One sum tells in a single pass that all is well; it is wrong only towards looking closer.
            if not math.isfinite(values.sum().item()):
                note(meta, int(torch.count_nonzero(~torch.isfinite(values))), found["nonfinite"], self.strict)

        roots = [tensor.node for _, tensor in unit.targets]
        blocks = replace(self.blocks, watch=watch, report=report)
        stats = subset(self.stats, unit.nodes)
        squares: dict[tuple[int, str], tuple[list[float], list[float]]] = {}
        with blocks.lane():
            blocks.measure(roots, stats)
            for start, values in blocks.last(roots, unit.start, unit.stop, stats):
                for (output, tensor), value in zip(unit.targets, values, strict=True):
                    figures = tensor.node.method.figures if tensor.node.method is not None else 0
                    if figures:
                        told = value[-figures:].tolist()
                        found["figures"].setdefault(str(output), {})[tensor.name] = told
                        value = value[:-figures]
                    if tensor.scales is not None:
                        parts = squares.setdefault((output, tensor.name), ([], []))
                        value = self._quantized(sink, output, tensor, start, value, found, parts)
                        sink.write(output, tensor, start, value)
                        continue
                    sink.write(output, tensor, start, _store(tensor, value, found, self.strict))

        for (number, name), parts in squares.items():
            # Summed exactly, since there are as many parts in a block as it has room for.
            found["squares"].setdefault(str(number), {})[name] = [[exact_sum(part) for part in parts]]

    def _quantized(
        self,
        sink: Sink,
        output: int,
        tensor: OutTensor,
        start: int,
        value: Tensor,
        found: dict[str, dict[str, Any]],
        parts: tuple[list[float], list[float]],
    ) -> Tensor:
        """The codes of whole bands of rows; their scales are written. What there is to count goes to `found`, squared
        norms to `parts`."""
        assert tensor.scales is not None
        width = tensor.shape[1]
        made = quantized(value.view(-1, width))
        codes = made.codes.cpu()
        count = nonfinite(tensor.dtype, codes.view(torch.uint8).reshape(-1).numpy().data)
        note_output(tensor.name, count, found["output_nonfinite"], self.strict)
        _add(tensor, made.overflow, found)
        squares, left = parts
        squares += made.squares
        left += made.left
        sink.write(output, tensor.scales, start // width // BLOCK * tensor.scales.shape[1], made.scales.cpu().view(-1))
        return codes.reshape(-1)


@contextmanager
def computing(
    plan: Plan, source: ByteSource, block: int, strict: bool, stopped: Callable[[], None], device: str = "cpu"
) -> Iterator[Computer]:
    """A computer for `plan`, with torch and the allocator set for many threads as long as it is in use. Raises
    UsageError where there is no such device."""
    compute = torch.float64 if plan.recipe.compute == "float64" else torch.float32
    place = find_device(device)
    shared = Shared()
    loader: Callable[[], Loads] = functools.partial(Loader, source, compute, shared)
    if place.type != "cpu":
        loader = functools.partial(DeviceLoader, source, compute, place, shared)
    keep_freed_blocks()
    with one_thread_per_operation():
        yield Computer(Blocks(loader, block, stopped, lane(place)), strict, {})


def _store(tensor: OutTensor, value: Tensor, found: dict[str, dict[str, int]], strict: bool) -> Tensor:
    """The block in the tensor's dtype, on the CPU. What is not finite in it, and what was beyond the dtype's range, is
    counted in `found`. Raises StoppedError where `strict` and a number is not finite."""
    if tensor.dtype == BIT:
        return pack_bits(value)
    stored = value.to(TORCH_DTYPES[tensor.dtype]).cpu().contiguous()
    if tensor.dtype == "F8_E4M3":
        return _store_saturated(tensor, value, stored, found, strict)
    # A sum looks once at every number, bits are looked at twice: of half the size they are quicker all the same.
    if tensor.dtype in ("F32", "F64") and math.isfinite(stored.sum().item()):
        return stored
    count = nonfinite(tensor.dtype, stored.view(torch.uint8).numpy().data)
    if count:
        note_output(tensor.name, count, found["output_nonfinite"], strict)
        wide = stored.float() if stored.element_size() == 1 else stored  # torch has no isfinite for one byte
        _add(tensor, int(torch.count_nonzero(torch.isfinite(value.cpu()) & ~torch.isfinite(wide))), found)
    return stored


def _store_saturated(
    tensor: OutTensor, value: Tensor, stored: Tensor, found: dict[str, dict[str, int]], strict: bool
) -> Tensor:
    """As `_store`, for float8_e4m3fn, which has no infinity: what is beyond its range becomes its largest number. Some
    versions of torch make it NaN."""
    bits = stored.view(torch.uint8)
    if not bits.numel() or not reaches(bits.numpy(), E4M3_MAX_BITS):
        return stored
    stored = value.clamp(-E4M3_MAX, E4M3_MAX).to(stored.dtype).cpu()
    note_output(
        tensor.name, nonfinite(tensor.dtype, stored.view(torch.uint8).numpy().data), found["output_nonfinite"], strict
    )
    _add(tensor, int(torch.count_nonzero(value.abs() > E4M3_REACH)), found)
    return stored


def _add(tensor: OutTensor, overflow: int, found: dict[str, dict[str, int]]) -> None:
    if overflow:
        found["overflow"][tensor.name] = found["overflow"].get(tensor.name, 0) + overflow

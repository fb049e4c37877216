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
from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.plan.model import Node, OutTensor, Plan, Unit
from mergekit_lite.run.copy import ByteSource
from mergekit_lite.run.device import DeviceLoader, find_device, lane
from mergekit_lite.run.evaluate import Blocks, subset
from mergekit_lite.run.nonfinite import note
from mergekit_lite.run.pools import Watchers, measure_pools
from mergekit_lite.run.program import Loader, Loads, Stats
from mergekit_lite.run.sink import Sink
from mergekit_lite.run.threads import keep_freed_blocks, one_thread_per_operation

if TYPE_CHECKING:
    from mergekit_lite.run.alignment import Solved

# Dtypes whose range float32 numbers may leave on the last rounding.
NARROW = frozenset({"F16", "F8_E4M3", "F8_E5M2"})


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
        self, unit: Unit, sink: Sink, found: dict[str, dict[str, int]], report: Callable[[Node, int, int], None]
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
        with blocks.lane():
            blocks.measure(roots, stats)
            for start, values in blocks.last(roots, unit.start, unit.stop, stats):
                for (output, tensor), value in zip(unit.targets, values, strict=True):
                    stored = value.to(TORCH_DTYPES[tensor.dtype])
                    if tensor.dtype in NARROW:
                        _count_overflow(tensor, value, stored, found["overflow"])
                    sink.write(output, tensor, start, stored.cpu())


@contextmanager
def computing(
    plan: Plan, source: ByteSource, block: int, strict: bool, stopped: Callable[[], None], device: str = "cpu"
) -> Iterator[Computer]:
    """A computer for `plan`, with torch and the allocator set for many threads as long as it is in use. Raises
    UsageError where there is no such device."""
    compute = torch.float64 if plan.recipe.compute == "float64" else torch.float32
    place = find_device(device)
    loader: Callable[[], Loads] = functools.partial(Loader, source, compute)
    if place.type != "cpu":
        loader = functools.partial(DeviceLoader, source, compute, place)
    keep_freed_blocks()
    with one_thread_per_operation():
        yield Computer(Blocks(loader, block, stopped, lane(place)), strict, {})


def _count_overflow(tensor: OutTensor, value: Tensor, stored: Tensor, found: dict[str, int]) -> None:
    if math.isfinite(stored.float().sum().item()):
        return
    count = int(torch.count_nonzero(torch.isfinite(value) & ~torch.isfinite(stored.float())))
    if count:
        found[tensor.name] = found.get(tensor.name, 0) + count

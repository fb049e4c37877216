"""What a mask store holds: its tasks, what it saves, and which entries how many tasks use."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mergekit_lite.checkpoint.coded import FRAME
from mergekit_lite.checkpoint.masks import tasks_of, with_masks
from mergekit_lite.checkpoint.meta import Checkpoint, TensorMeta

if TYPE_CHECKING:
    from mergekit_lite.run.bits import Masks

CHUNK = FRAME  # entries of every mask at once: tasks that are coded together are decoded once


@dataclass(frozen=True, slots=True)
class StoreLook:
    """`nbytes` of all weights of the store as it lies there, `apart` what as many whole models take. `compressed` tells
    that its masks are coded; `coded` is what the store would take if each tensor's masks were coded by their entropy,
    task by task. `density` is the share of entries that each task uses, `census` the shares that no task uses
    (catastrophic), one task alone (selfish) and several (shared). Both, and `coded`, are None where no mask has been
    read."""

    tasks: tuple[str, ...]
    nbytes: int
    apart: int
    density: Mapping[str, float] | None = None
    census: tuple[float, float, float] | None = None
    coded: int | None = None
    compressed: bool = False

    def as_json(self) -> dict[str, object]:
        made: dict[str, object] = {"tasks": list(self.tasks), "bytes": self.nbytes, "bytes_apart": self.apart}
        made["compress"] = "zstd" if self.compressed else None
        if self.density is not None and self.census is not None:
            names = ("catastrophic", "selfish", "shared")
            made |= {"density": dict(self.density), "census": dict(zip(names, self.census, strict=True))}
            made["bytes_entropy_coded"] = self.coded
        return made


def look_at_store(checkpoint: Checkpoint, masks: bool = False) -> StoreLook | None:
    """What `checkpoint` is as a mask store, None where it is none. With `masks` all of them are read, once."""
    if checkpoint.folder is None or os.path.isfile(os.path.expanduser(checkpoint.location)):
        return None
    tasks = tasks_of(checkpoint)
    if not tasks:
        return None
    opened = [with_masks(checkpoint, task) for task in tasks]
    base = sum(meta.nbytes for meta in checkpoint.tensors.values())
    kept = [task.masks for task in opened if task.masks is not None]
    vector = sum(meta.nbytes for meta in kept[0].multi.values())
    # Tasks that are coded together share their bytes.
    stored = {(p.file, p.start): p.nbytes for task in kept for meta in task.used.values() for p in meta.parts}
    compressed = any(meta.coded is not None for task in kept for meta in task.used.values())
    seen = StoreLook(tuple(tasks), base + vector + sum(stored.values()), base * len(tasks), compressed=compressed)
    if not masks:
        return seen
    ones = dict.fromkeys(tasks, 0)
    counts = np.zeros(3, dtype=np.int64)
    coded = 0.0
    from mergekit_lite.report.stream import opened as reading
    from mergekit_lite.run.bits import Masks

    with reading([shard for task in opened for shard in task.shards], 1) as reader:
        loader = Masks(reader)
        for name, meta in kept[0].multi.items():
            found, uses = _count(loader, [task.used[name] for task in kept], meta.numel)
            counts += uses
            for task, number in zip(tasks, found, strict=True):
                ones[task] += number
                coded += meta.numel * _entropy(number / max(1, meta.numel)) / 8
    total = max(1, sum(meta.numel for meta in kept[0].multi.values()))
    nothing, one, several = (int(number) / total for number in counts)
    density = {task: number / total for task, number in ones.items()}
    told = base + vector + math.ceil(coded)
    return replace(seen, density=density, census=(nothing, one, several), coded=told)


def _count(loader: Masks, masks: Sequence[TensorMeta], numel: int) -> tuple[list[int], np.ndarray]:
    """How many entries of a tensor each task uses; and how many no task uses, one alone, several."""
    ones = [0] * len(masks)
    uses = np.zeros(3, dtype=np.int64)
    for start in range(0, numel, CHUNK):
        stop = min(numel, start + CHUNK)
        count = np.zeros(stop - start, dtype=np.int32)
        for number, mask in enumerate(masks):
            bits = loader.load(mask, start, stop).numpy()
            ones[number] += int(np.count_nonzero(bits))
            count += bits
        uses += np.bincount(np.minimum(count, 2), minlength=3)
    return ones, uses


def _entropy(share: float) -> float:
    """Bits that one of many independent entries takes, of which `share` are 1."""
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)

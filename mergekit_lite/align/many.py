"""Three and more networks: permutations that bring all of them into one order, that of the first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Literal

from mergekit_lite.align.apply import Order, composed, inverse
from mergekit_lite.align.assign import Assign, assignment
from mergekit_lite.align.cost import Tensors
from mergekit_lite.align.cycle import cycle
from mergekit_lite.align.match import CostName, nothing, silent
from mergekit_lite.align.parts import Part, Settings, kept, parts_of
from mergekit_lite.align.trees import Shapes
from mergekit_lite.align.turns import merge_many, star
from mergekit_lite.family.spaces import Space
from mergekit_lite.lazy import Tensor, torch

Way = Literal["merge_many", "star", "cycle"]


@dataclass(frozen=True)
class ManySolution:
    """What was found for each model; the first one's stay as they are. `agreement` is the sum of <A, B> over all pairs
    of permuted models, before and after; `rounds` is the largest number that any part took, and `settled` whether all
    ended because nothing moved any more."""

    permutations: list[dict[str, Order]]
    agreement: tuple[float, float]
    rounds: int
    settled: bool


def match_many(
    spaces: Sequence[Space],
    models: Sequence[Tensors],
    *,
    shapes: Shapes,
    kinds: Collection[str],
    way: Way = "merge_many",
    cost: CostName = "dot",
    max_sweeps: int = 100,
    seed: int = 0,
    threads: Executor | None = None,
    check: Callable[[], None] = nothing,
    report: Callable[[str, int, int], None] = silent,
    assign: Assign = assignment,
) -> ManySolution:
    """Permutations for every model, so that all of them lie close together; see `match` for the settings.

    `star`: each is matched to the first. `merge_many`: each in turn to the mean of all others as they are by then, in
    seeded orders, until none moves (Git Re-Basin, arXiv 2209.04836). `cycle`: all at once, over relaxed permutations
    (C²M³, arXiv 2405.17897), see `cycle.py`. Every way maps each model into one common order, so that going from model
    to model around a circle leads back; in the answer this is the order of the first.

    Trees that are not coupled to others are solved one after the other, or at the same time on `threads`; the tensors
    of one of them are kept for all models. So are those of coupled trees where they fit into `KEPT` bytes; beyond that
    they are read whenever they are needed, one tensor of all models at a time.
    """
    if cost == "cosine":
        models = [_scaled(model) for model in models]
    settings = Settings(shapes, kinds, max_sweeps, seed, threads, check, assign)
    parts = parts_of(spaces, models, settings)
    found: list[dict[str, Order]] = [{} for _ in models]
    agreement, rounds, settled = [0.0, 0.0], 0, True
    if threads is not None and len(parts) > 1:
        alone = replace(settings, threads=None)
        jobs = [threads.submit(_solve, replace(part, settings=alone), way) for part in parts]
        answers = (job.result() for job in jobs)
    else:
        jobs = []
        answers = (_solve(part, way) for part in parts)
    try:
        for done, (part, (permutations, sums, taken, ended)) in enumerate(zip(parts, answers, strict=True), 1):
            for mine, more in zip(found, permutations, strict=True):
                mine.update(more)
            agreement = [agreement[0] + sums[0], agreement[1] + sums[1]]
            rounds, settled = max(rounds, taken), settled and ended
            report(part.trees[0].root.name, done, len(parts))
    finally:
        for job in jobs:
            job.cancel()
    back = inverse(spaces, found[0])
    every = [composed(spaces, permutations, back) for permutations in found]
    chosen = [{name: p for name, p in permutations.items() if name in found[0]} for permutations in every]
    return ManySolution(chosen, (agreement[0], agreement[1]), rounds, settled)


_Answer = tuple[list[dict[str, Order]], tuple[float, float], int, bool]


def _solve(part: Part, way: Way) -> _Answer:
    part = kept(part)
    before = part.agreement(part.identity())
    found, rounds, settled = {"star": star, "merge_many": merge_many, "cycle": cycle}[way](part)
    return found, (before, part.agreement(found)), rounds, settled


def _scaled(model: Tensors) -> Tensors:
    def of(name: str) -> Tensor:
        tensor = model(name)
        norm = torch.linalg.vector_norm(tensor)
        return tensor / norm if norm > 0 else tensor

    return of

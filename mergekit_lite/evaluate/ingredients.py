"""What a weighted sum of models is made of, streamed: the sum itself, and the inner products that its gradient needs.

Whatever the number of models, there is one block of one of them in memory for each thread, beside what the sum is put
into.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from mergekit_lite.checkpoint.dtype import TORCH_DTYPES
from mergekit_lite.checkpoint.meta import MERGEABLE
from mergekit_lite.errors import Mark, Problem, RecipeError
from mergekit_lite.methods.gram import exact_sum, inner
from mergekit_lite.plan.model import Node, OutTensor, Plan
from mergekit_lite.plan.order import BLOCK, walk
from mergekit_lite.plan.words import few
from mergekit_lite.recipe.model import Input, Recipe, Ref, Save, Step
from mergekit_lite.run.compute import Computer, computing
from mergekit_lite.run.copy import ByteSource
from mergekit_lite.run.evaluate import Blocks, subset
from mergekit_lite.run.pools import Watchers
from mergekit_lite.run.program import Program, Stats
from mergekit_lite.run.threads import one_thread_here

Weights = Mapping[str, Sequence[float]]  # of every input, in their order, by tensor


def plain(recipe: Recipe, step: Step) -> Recipe:
    """The recipe that saves `step` as it is, whatever becomes of it in the recipe's own save."""
    return replace(recipe, saves=(_save(Ref(step.name, step.mark), 0),), scores=())


def apart(recipe: Recipe, step: Step) -> Recipe:
    """The recipe that saves every input of `step`, and then its base, each by itself."""
    items = [*step.of, *((Input(step.base),) if step.base is not None else ())]
    saves = tuple(_save(item.ref, number) for number, item in enumerate(items))
    steps = {name: one for name, one in recipe.steps.items() if name != step.name}
    return replace(recipe, steps=steps, saves=saves, scores=())


def _save(ref: Ref, number: int) -> Save:
    return Save(ref, f"memory/{number}", None, 1 << 62, Mark("", 1, 1, "", 1))


class Ingredients:
    """The inputs of a step that is a weighted sum, and the base where it sums what differs from it.

    `merged` is the plan of `plain`, `plan` that of `apart`; tensors are read from `source`. The sum is formed
    as the merge forms it, element by element in the dtype of the recipe's arithmetic, so that the same weights give the
    same bits. Raises RecipeError where an input lacks a tensor of the merge, or has it in another shape.
    """

    def __init__(self, merged: Plan, plan: Plan, base: bool, source: ByteSource, threads: int):
        self.plan, self._source, self._threads = plan, source, threads
        self.dtype = torch.float64 if plan.recipe.compute == "float64" else torch.float32
        (output,) = merged.outputs
        tables = [{tensor.name: tensor.node for tensor in one.tensors} for one in plan.outputs]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._roots: dict[str, tuple[tuple[Node, ...], Node | None]] = {}
        self._others: list[OutTensor] = []
        for tensor in output.tensors:
            if not _summed(tensor):
                self._others.append(tensor)
                continue
            nodes = [table.get(tensor.name) for table in tables]
            lacking = [i for i, node in enumerate(nodes) if node is None or node.shape != tensor.shape]
            if lacking:
                refs = [save.step.name for save in plan.recipe.saves if save.step is not None]
                who = few(refs[i] for i in dict.fromkeys(lacking))
                message = f"`{tensor.name}` of the merge is not in {who}, or in another shape"
                hint = "weights are learned of tensors that all inputs have"
                raise RecipeError(Problem(message, None, hint))
            found = [node for node in nodes if node is not None]
            self.shapes[tensor.name] = tensor.shape
            self._roots[tensor.name] = (tuple(found[:-1]), found[-1]) if base else (tuple(found), None)
        self._stats: Stats = {}
        if plan.pools or plan.alignments:
            with self._computing() as computer, ThreadPoolExecutor(threads, "merge", one_thread_here) as pool:
                watchers = Watchers(lambda pool, node: None, lambda *told: None, lambda name, stats: None)
                computer.measure(plan, {}, pool, watchers)
                self._stats = computer.stats

    def empty(self) -> dict[str, Tensor]:
        """Memory for the sums, in the dtype of the arithmetic."""
        return {name: torch.empty(shape, dtype=self.dtype) for name, shape in self.shapes.items()}

    def others(self) -> dict[str, Tensor]:
        """The tensors of the merge that are no sums, such as whole numbers, in their own dtypes."""
        found = {}
        for tensor in self._others:
            value = torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype])
            if tensor.copied and tensor.node.load is not None and tensor.nbytes:
                flat = value.view(-1).view(torch.uint8).numpy().data
                self._source.read_bytes(tensor.node.load, 0, tensor.nbytes, flat)
            found[tensor.name] = value
        return found

    def mix(self, weights: Weights, into: Mapping[str, Tensor]) -> None:
        """Put the sums into the tensors of `into` by name, whatever their dtype and device."""

        def one(name: str, blocks: Blocks) -> None:
            place = into[name]
            flat = place.view(-1) if place.is_contiguous() else torch.empty(place.numel(), dtype=self.dtype)
            for start, stop, values, origin in self._blocks(name, blocks):
                total = None
                for weight, value in zip(weights[name], values, strict=True):
                    if weight == 0:
                        continue
                    term = value * weight
                    total = term if total is None else total.add_(term)
                if total is None:
                    total = torch.zeros(stop - start, dtype=self.dtype)
                # As `add` does it, which keeps the bits of a base that nothing is added to.
                flat[start:stop] = total if origin is None else origin - (-total).add_(0.0)
            if not place.is_contiguous():
                place.copy_(flat.view(place.shape))

        self._each([name for name in self._roots if name in into], one)

    def products(self, slopes: Mapping[str, Tensor]) -> dict[str, list[float]]:
        """<g, x_i> for every input i of every tensor whose gradient g is in `slopes`, x_i - base where there is a base.
        Sums are formed in double precision, in an order that is the same for any number of threads."""
        found: dict[str, list[float]] = {}

        def one(name: str, blocks: Blocks) -> None:
            slope = slopes[name].reshape(-1)
            parts: list[list[float]] = [[] for _ in self._roots[name][0]]
            for start, stop, values, _ in self._blocks(name, blocks):
                wide = slope[start:stop].to("cpu", torch.float64)
                for part, value in zip(parts, values, strict=True):
                    part.append(inner(wide, value.double()))
            found[name] = [exact_sum(part) for part in parts]

        self._each([name for name in self._roots if name in slopes], one)
        return {name: found[name] for name in slopes if name in found}

    def _blocks(self, name: str, blocks: Blocks) -> Iterator[tuple[int, int, Iterator[Tensor], Tensor | None]]:
        """The inputs of a tensor, a block of each after the other, and that of the base."""
        inputs, base = self._roots[name]
        roots = [*inputs, *((base,) if base is not None else ())]
        nodes = list(walk(roots))
        stats = subset(self._stats, nodes)
        blocks.measure(roots, stats)
        loader = blocks.loader()
        programs = [Program([root], loader, stats) for root in roots]
        for start, stop in blocks.spans(nodes, 0, math.prod(self.shapes[name])):
            origin = None if base is None else programs[-1].run(start, stop)[0]
            yield start, stop, _deltas(programs[: len(inputs)], start, stop, origin), origin

    def _each(self, names: Sequence[str], work: Callable[[str, Blocks], None]) -> None:
        if not names:
            return
        with self._computing() as computer, ThreadPoolExecutor(self._threads, "merge", one_thread_here) as pool:
            for _ in pool.map(lambda name: work(name, computer.blocks), names):
                pass

    def _computing(self) -> AbstractContextManager[Computer]:
        return computing(self.plan, self._source, BLOCK, False, lambda: None)


def _deltas(programs: Sequence[Program], start: int, stop: int, origin: Tensor | None) -> Iterator[Tensor]:
    for program in programs:
        (value,) = program.run(start, stop)
        yield value if origin is None else value - origin


def _summed(tensor: OutTensor) -> bool:
    """Whether a tensor of the merge is a sum of numbers."""
    return tensor.dtype in MERGEABLE

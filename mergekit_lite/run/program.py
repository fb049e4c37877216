"""The computation of one block as a list of operations, worked out once for all blocks of a tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mergekit_lite.checkpoint.meta import BIT, DTYPE_NAMES, TensorMeta
from mergekit_lite.errors import MergeError
from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.spec import Block, Method, keywords
from mergekit_lite.plan.model import Node
from mergekit_lite.plan.order import beside, row_length, walk
from mergekit_lite.plan.words import count
from mergekit_lite.run.bits import Masks
from mergekit_lite.run.copy import ByteSource
from mergekit_lite.run.gather import Gather, Remap
from mergekit_lite.run.mixture import Mixture
from mergekit_lite.run.transplant import Shared, Source, Transplant
from mergekit_lite.vocabulary.graft import Graft

if TYPE_CHECKING:
    from mergekit_lite.checkpoint.unpack import Unpacker

Stats = dict[int, Any]  # node id -> what its measure found for this tensor


class Loads(Protocol):
    """Loads blocks of stored tensors in the dtype of the arithmetic, to where the kernels run. For one thread; `shared`
    is what those of all threads hold together."""

    shared: Shared

    source: ByteSource

    @property
    def device(self) -> torch.device:
        """Where the kernels run."""
        ...

    def load(self, meta: TensorMeta, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor, flat, in memory of their own."""
        ...


def unpacker(source: ByteSource) -> Unpacker:
    """What works out the numbers of packed tensors. It needs torch from the start."""
    from mergekit_lite.checkpoint.unpack import Unpacker

    return Unpacker(source)


@dataclass(slots=True)
class Loader:
    """Stored numbers in the dtype of the arithmetic. Reads by way of one buffer, which stays in a core's cache. For one
    thread."""

    source: ByteSource
    compute: torch.dtype
    shared: Shared = field(default_factory=Shared)
    _raw: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    _views: dict[tuple[torch.dtype, int], tuple[Tensor, memoryview]] = field(default_factory=dict)
    _unpacker: Unpacker | None = None
    _masks: Masks | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def load(self, meta: TensorMeta, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor, flat, in memory of their own."""
        if meta.dtype == BIT:
            self._masks = self._masks or Masks(self.source)
            return self._masks.load(meta, start, stop).to(self.compute)
        if meta.packed is not None:
            self._unpacker = self._unpacker or unpacker(self.source)
            return self._unpacker.load(meta, start, stop).to(self.compute)
        dtype: torch.dtype = getattr(torch, DTYPE_NAMES[meta.dtype])
        size = dtype.itemsize
        if dtype == self.compute:
            own = torch.empty(stop - start, dtype=dtype)
            self.source.read_bytes(meta, start * size, stop * size, own.view(torch.uint8).numpy().data)
            return own
        view = self._views.get((dtype, stop - start))
        if view is None:
            view = self._views[dtype, stop - start] = self._view(dtype, (stop - start) * size)
        self.source.read_bytes(meta, start * size, stop * size, view[1])
        return view[0].to(self.compute)

    def _view(self, dtype: torch.dtype, nbytes: int) -> tuple[Tensor, memoryview]:
        if len(self._raw) < nbytes:
            self._raw = torch.empty(nbytes, dtype=torch.uint8)
            self._views.clear()
        part = self._raw[:nbytes]
        return part.view(dtype), part.numpy().data


@dataclass(slots=True)
class _Operation:
    """What makes one node's block: a load, or a method applied to the results at `inputs`. The results at `spent` are
    needed no more after it."""

    node: Node
    inputs: tuple[int, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = ()  # of the inputs, for a matrix method
    length: int = 0  # of a row, for a row method
    beside: tuple[_Beside, ...] = ()
    gather: Gather | Remap | Mixture | Transplant | None = None
    spent: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Beside:
    """A further input of a row method that has a shape of its own: `rows` of `width` elements come with those of the
    first input, what comes as `columns` or `whole` is kept for all blocks."""

    node: Node
    way: str
    program: Program
    width: int


class Program:
    """Computes the blocks of `roots`, which have one size unless a matrix method is among what leads to them.

    `watch` is told of every loaded block, `step` of the steps of long iterations. For one thread.
    """

    def __init__(
        self,
        roots: Sequence[Node],
        loader: Loads,
        stats: Stats,
        watch: Callable[[TensorMeta, Tensor], None] | None = None,
        step: Callable[[Node, int, int], None] | None = None,
    ):
        self._loader = loader
        self._watch = watch
        self._step = step
        self._stats = stats
        self._kept: dict[int, Tensor] = {}  # by node id, what all blocks need
        everything = list(walk(roots, through=False))
        aside = beside(everything)
        nodes = [node for node in everything if node.id not in aside or any(node is root for root in roots)]
        place = {node.id: i for i, node in enumerate(nodes)}
        self._first = True
        self.whole = any(node.reach == "matrix" for node in nodes)
        self._operations = [self._operation(node, place) for node in nodes]
        self._roots = [place[node.id] for node in roots]
        last = {i: at for at, operation in enumerate(self._operations) for i in operation.inputs}
        for i, at in last.items():
            if i not in self._roots:
                self._operations[at].spent.append(i)

    def run(self, start: int, stop: int) -> list[Tensor]:
        """Elements [start, stop) of every root, flat, in the dtype of the arithmetic. Where a matrix method is among
        the operations, [start, stop) is the whole tensor, and what has another size is whole too."""
        results: list[Any] = [None] * len(self._operations)
        for i, operation in enumerate(self._operations):
            node = operation.node
            if self.whole:
                start, stop = 0, node.numel
            if node.load is not None:
                result = self._loader.load(node.load, start, stop)
                if self._watch is not None:
                    self._watch(node.load, result)
            elif operation.gather is not None:
                result = operation.gather.block(start, stop)
            else:
                assert node.method is not None
                xs = [results[j] for j in operation.inputs]
                if operation.shapes:
                    xs = [x.view(shape) for x, shape in zip(xs, operation.shapes, strict=True)]
                elif operation.length:
                    xs = [x.view(-1, operation.length) for x in xs]
                    for further in operation.beside:
                        xs.append(self._further(further, start // operation.length, stop // operation.length))
                if node.method.positioned:
                    operation.arguments["block"] = Block(start, node.key)
                result = apply(node.method, xs, operation.arguments, stop - start)
                if not xs:
                    result = result.to(self._loader.device)  # what has no inputs cannot know where they lie
                del xs
            results[i] = result
            for j in operation.spent:
                results[j] = None
        return [results[i] for i in self._roots]

    def _operation(self, node: Node, place: dict[int, int]) -> _Operation:
        if node.method is None:
            return _Operation(node)
        if node.method.gathers:
            return _Operation(node, gather=self._gather(node))
        operation = _Operation(node, arguments=keywords(dict(node.params)))
        if node.id in self._stats:
            operation.arguments["stat"] = self._stats[node.id]
        if node.method.reports:
            operation.arguments["report"] = functools.partial(self._step or _nothing, node)
        inputs, reach = node.inputs, node.reach
        if reach == "matrix":
            operation.shapes = tuple(below.shape for below in inputs)
        elif reach == "row":
            operation.length = row_length(node)
            if node.method.beside is not None:
                ways = node.method.beside(dict(node.params))
                operation.beside = tuple(self._aside(node, n, way) for n, way in zip(inputs[1:], ways, strict=True))
                inputs = inputs[:1]
        operation.inputs = tuple(place[below.id] for below in inputs)
        return operation

    def _gather(self, node: Node) -> Gather | Remap | Mixture | Transplant:
        place = dict(node.params)
        if "members" in place:
            below = [Program([n], self._loader, self._stats, self._watch, self._step) for n in node.inputs]
            whole = [n.numel if p.whole else None for n, p in zip(node.inputs, below, strict=True)]
            return Mixture(self._stats[node.id], [_reading(p) for p in below], whole, self._loader.device)
        if "graft" in place:
            return self._transplant(node, place["graft"], place["k"])
        if "rows" in place:
            # What other models give is watched over where it is their own.
            watches = [self._watch if number == place["own"] else None for number in range(len(node.inputs))]
            programs = [
                Program([below], self._loader, self._stats, watch, self._step)
                for below, watch in zip(node.inputs, watches, strict=True)
            ]
            sizes = [below.numel if p.whole else None for below, p in zip(node.inputs, programs, strict=True)]
            return Remap(math.prod(node.shape[1:]), place["rows"], [_reading(program) for program in programs], sizes)
        taken = self._stats[node.id]
        chosen = node.inputs[taken.source]
        program = Program([chosen], self._loader, self._stats, self._watch, self._step)
        return Gather(
            chosen.shape, taken, lambda start, stop: program.run(start, stop)[0], program.whole, self._loader.device
        )

    def _transplant(self, node: Node, graft: Graft, terms: int) -> Transplant:
        mine, theirs = node.inputs
        # Rows of sums are read more than once, and those of the other model refused where they are not finite.
        own, other = (
            Source(below.load.name if below.load else below.step, self._reads(below), math.prod(below.shape[1:]))
            for below in (mine, theirs)
        )
        return Transplant(graft, terms, own, other, self._loader.shared, (theirs.id, graft))

    def _reads(self, node: Node) -> Callable[[int, int], Tensor]:
        """Reads elements of a tensor in any order; one that can be computed whole only is kept."""
        program = Program([node], self._loader, self._stats, None, self._step)
        if not program.whole:
            return _reading(program)

        def kept(start: int, stop: int) -> Tensor:
            if node.id not in self._kept:
                self._kept[node.id] = program.run(0, node.numel)[0]
            return self._kept[node.id][start:stop]

        return kept

    def _aside(self, node: Node, below: Node, way: str) -> _Beside:
        # What is kept is read for every part of a tensor again, and watched over by nobody but the first.
        watch = self._watch if way == "rows" else self._watch_first
        program = Program([below], self._loader, self._stats, watch, self._step)
        return _Beside(below, way, program, below.numel * row_length(node) // max(1, node.numel))

    def _further(self, further: _Beside, top: int, bottom: int) -> Tensor:
        """What a method gets beside the rows from `top` to `bottom`, as a matrix."""
        node, width = further.node, further.width
        if further.way == "rows":
            return further.program.run(top * width, bottom * width)[0].view(bottom - top, width)
        if node.id not in self._kept:
            self._first = top == 0
            self._kept[node.id] = further.program.run(0, node.numel)[0].view(node.shape[0], -1)
        kept = self._kept[node.id]
        return kept if further.way == "whole" else kept[:, top:bottom]

    def _watch_first(self, meta: TensorMeta, values: Tensor) -> None:
        if self._first and self._watch is not None:
            self._watch(meta, values)


def _reading(program: Program) -> Callable[[int, int], Tensor]:
    return lambda start, stop: program.run(start, stop)[0]


def _nothing(node: Node, done: int, total: int) -> None:
    """The steps of an iteration that nobody asks about."""


def apply(method: Method, xs: Sequence[Tensor], arguments: dict[str, Any], numel: int) -> Tensor:
    """What `method` makes of a block, flat. An outside method's faults are told as such, with its module; a result that
    is no tensor of `numel` numbers would leave a hole in the output and is a fault too. Raises MergeError."""
    try:
        result = method.fn(xs, **arguments)
    except Exception as fault:
        if isinstance(fault, MergeError) or method.module.startswith("mergekit_lite."):
            raise
        raise MergeError(f"method `{method.name}` failed: {fault!r}", hint=_blame(method)) from fault
    found = getattr(result, "numel", None)  # of a tensor or of a block that is summed without torch
    if found is None or found() != numel:
        given = count(found(), "number") if found is not None else f"a {type(result).__name__}"
        message = f"method `{method.name}` gave {given} for a block of {count(numel, 'number')}"
        raise MergeError(message, hint=_blame(method))
    flat: Tensor = result.reshape(-1)
    return flat


def _blame(method: Method) -> str:
    return f"this is a fault of `{method.module}`, which brings the method"

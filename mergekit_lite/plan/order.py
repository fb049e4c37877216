"""What is done in which order, and what it costs: units of work, bytes to read, memory at the peak."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergekit_lite.checkpoint.meta import DTYPE_BITS
from mergekit_lite.family.spaces import Space
from mergekit_lite.plan.model import Alignment, Node, Output, OutTensor, Unit

GRAIN = 1 << 16  # elements over which a statistic is summed at once; part of what defines the output's bytes
BLOCK = 1 << 18  # elements of one block unless the run says otherwise; changes time and memory, never a byte
SEGMENT = 1 << 22  # elements of one unit where a tensor can be cut: a unit is what a stopped run may have to redo
COPY_BLOCK = 1 << 20  # bytes that a passthrough tensor is copied in: what a core's own cache holds
THREAD = 3 << 22  # bytes of one thread's stack and of what its allocator keeps for later
SWEEPS = 6  # passes over models whose spaces depend on one another, as weight matching usually takes them
STATISTIC = 3 << 21  # bytes that a statistic gathers at most: keys near a threshold and their places


def walk(roots: Iterable[Node], through: bool = True) -> list[Node]:
    """Every node below `roots`, inputs before users, each once. With `through` False not what lies below a node that
    gathers rows, which reads its inputs in an order of its own."""
    found: list[Node] = []
    seen: set[int] = set()
    stack = list(roots)
    stack.reverse()
    while stack:
        node = stack[-1]
        waiting: list[Node] = []
        if node.id not in seen and (through or node.method is None or not node.method.gathers):
            for below in node.inputs:
                if below.id in seen:
                    continue
                if waiting or below.inputs:
                    waiting.append(below)
                else:
                    seen.add(below.id)
                    found.append(below)
        if waiting:
            waiting.reverse()
            stack += waiting
            continue
        stack.pop()
        if node.id not in seen:
            seen.add(node.id)
            found.append(node)
    return found


def grain_of(nodes: Iterable[Node]) -> int:
    """How many elements the nodes' blocks are made of: whole rows where a method needs them, the whole tensor where
    one needs that, a fixed number otherwise. The same in every run, since sums are formed grain by grain."""
    grain, whole = 1, 0
    for node in nodes:
        if node.reach == "matrix":
            whole = max(1, whole, node.numel)
        elif node.reach == "row" and node.method is not None:
            grain = math.lcm(grain, row_length(node))
    return whole or grain * max(1, GRAIN // grain)


def row_length(node: Node) -> int:
    """Elements of one row: the last axis, or all axes after the first, as the method says."""
    if not node.shape or node.method is None:
        return 1
    # A vector has no rows along its first axis: it is one row.
    length = node.shape[-1] if node.method.row_axis == "last" else math.prod(node.shape[1:] or node.shape)
    return max(1, length)


def beside(nodes: Iterable[Node]) -> dict[int, tuple[str, Node]]:
    """The nodes that are read beside the rows of another, by id: how (`rows`, `columns`, `whole`), and beside which."""
    found: dict[int, tuple[str, Node]] = {}
    for node in [n for n in nodes if n.reach == "row"]:
        if node.method is not None and node.method.beside is not None:
            ways = node.method.beside(dict(node.params))
            found.update({n.id: (way, node) for n, way in zip(node.inputs[1:], ways, strict=True)})
    return found


def make_units(outputs: Sequence[Output]) -> tuple[Unit, ...]:
    """The work in the order of the files. Tensors of one name and shape go together, so that saves that share results
    compute them once; large tensors are cut where no statistic ties them together."""
    together: dict[tuple[str, tuple[int, ...], bool], list[tuple[int, OutTensor]]] = {}
    for number, output in enumerate(outputs):
        for shard in output.shards:
            for tensor in shard.tensors:
                together.setdefault((tensor.name, tensor.shape, tensor.copied), []).append((number, tensor))
    units: list[Unit] = []
    for (name, shape, copied), targets in together.items():
        numel = math.prod(shape)
        nodes = tuple(walk(t.node for _, t in targets))
        whole = not copied and not {n.reach for n in nodes}.isdisjoint(("measured", "matrix"))
        grain = grain_of(nodes)
        step = numel if whole else max(grain, SEGMENT // grain * grain)
        cuts = [*range(0, numel, step), numel] if numel and step else [0, numel]
        for start, stop in itertools.pairwise(cuts):
            units.append(Unit(len(units), name, start, stop, tuple(targets), nodes))
    return tuple(units)


def among(nodes: Iterable[Node]) -> dict[int, int]:
    """The nodes of which a gathering node reads one, by id: how many there are to choose from."""
    found: dict[int, int] = {}
    for node in [n for n in nodes if n.reach == "row"]:
        if node.method is not None and node.method.gathers and len(node.inputs) > 1:
            found.update((below.id, len(node.inputs)) for below in walk(node.inputs))
    return found


def bytes_read(units: Sequence[Unit], pools: Mapping[str, Sequence[Node]], alignments: Mapping[str, Alignment]) -> int:
    """Bytes read in all passes; the number of passes of a measured node is what it usually is."""
    total = 0
    for unit in units:
        total += _pass_bytes(unit.nodes, unit.stop - unit.start)
        measured = [n for n in unit.nodes if n.reach == "measured"]
        if measured:
            total += rounds_of(measured) * _pass_bytes(walk(measured), unit.stop - unit.start)
    # Pools that look at the same inputs are fed together.
    pooled = [node for members in pools.values() for node in members]
    total += rounds_of(pooled) * _stored_bytes(pooled)
    for alignment in alignments.values():
        total += passes(alignment) * _stored_bytes(alignment.nodes)
    return total


def _stored_bytes(roots: Iterable[Node]) -> int:
    """Bytes of all stored tensors below `roots`, each once."""
    seen: set[int] = set()
    loads: dict[int, int] = {}
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node.load is not None:
            loads[node.id] = node.load.nbytes
        for below in node.inputs:
            if below.load is not None:
                loads[below.id] = below.load.nbytes
            elif below.id not in seen:
                seen.add(below.id)
                stack.append(below)
    return sum(loads.values())


def passes(alignment: Alignment) -> int:
    """How often the tensors of an alignment are usually read: once where no space depends on another, else in some
    sweeps."""
    if alignment.activations or alignment.use == "reorder":
        return 1
    axes: dict[str, set[str]] = {}
    for space in alignment.spaces:
        if space.kind in alignment.kinds and space.parent is None:
            for use in space.uses:
                axes.setdefault(use.tensor, set()).add(space.name)
    return 1 if all(len(names) == 1 for names in axes.values()) and alignment.use == "permute" else SWEEPS


def rounds_of(nodes: Iterable[Node]) -> int:
    """Passes that the statistics of these nodes usually take together."""
    return max((node.method.rounds for node in nodes if node.method is not None), default=0)


def input_bytes(units: Sequence[Unit]) -> int:
    """Bytes of all stored tensors that the units read, each once."""
    loads = {n.id: n.load for unit in units for n in unit.nodes if n.load is not None}
    return sum(meta.nbytes for meta in loads.values())


def _pass_bytes(nodes: Sequence[Node], numel: int) -> int:
    """Stored bytes that one pass over `numel` elements of a tensor reads."""
    loads = [node for node in nodes if node.load is not None]
    rows = [node for node in nodes if node.reach == "row"]
    if not rows:
        return sum([load_bytes(node, numel) for node in loads])
    aside = beside(rows)
    choice = among(rows)
    total = 0
    for node in loads:
        way, owner = aside.get(node.id, ("", node))
        share = numel if not way else node.numel * numel // max(1, owner.numel) if way == "rows" else node.numel
        total += load_bytes(node, share) // choice.get(node.id, 1)
    return total


def load_bytes(node: Node, numel: int) -> int:
    """Stored bytes of `numel` elements of a loaded tensor; 0 for other nodes."""
    return 0 if node.load is None else numel * DTYPE_BITS[node.load.dtype] // 8


def peak_bytes(
    units: Sequence[Unit],
    pools: Mapping[str, Sequence[Node]],
    alignments: Mapping[str, Alignment],
    threads: int,
    block: int,
    size: int,
) -> int:
    """Anonymous memory of the blocks at work: the costliest unit, once per thread, or the costliest space of an
    alignment. `block` is in elements, `size` the bytes of one element in the compute dtype."""
    worst = COPY_BLOCK
    kinds: dict[Any, Sequence[Node]] = {}
    for unit in units:
        reaches = [node.reach for node in unit.nodes]
        # Where nothing works on rows or matrices, all nodes have one shape: such units are alike but for a few things.
        alike = "row" not in reaches and "matrix" not in reaches
        kinds[(unit.nodes[-1].shape, *reaches) if alike else id(unit.nodes)] = unit.nodes
    for nodes in kinds.values():
        worst = max(worst, _block_bytes(nodes, block, size))
    for members in pools.values():
        # The members of a pool have one structure.
        for node in {node.shape: node for node in members}.values():
            worst = max(worst, _block_bytes(walk([node]), block, size))
    for alignment in alignments.values():
        worst = max(worst, _alignment_bytes(alignment, size))
    return (worst + THREAD) * threads


def _alignment_bytes(alignment: Alignment, size: int) -> int:
    """Memory of the costliest space: its tensors of two models, and what the solver of an assignment takes."""
    if alignment.use == "known":
        return 0
    from mergekit_lite.align.memory import matching_bytes

    shapes = {name: node.shape for table in alignment.models for name, node in table.items()}
    chosen = [space for space in alignment.spaces if space.kind in alignment.kinds]
    children: dict[str, list[Space]] = {}
    for space in chosen:
        if space.parent is not None:
            children.setdefault(space.parent, []).append(space)
    return max(matching_bytes(s, shapes, children=children.get(s.name, ()), number=size) for s in chosen)


def _block_bytes(nodes: Sequence[Node], block: int, size: int) -> int:
    grain = grain_of(nodes)
    aside = beside(nodes)
    choice = among(nodes)
    numel = max(map(math.prod, {n.shape for n in nodes if n.id not in aside}))
    elements = min(numel, max(grain, block // grain * grain))
    # Every node's block lives until the block is done; a stored block, and room for the temporaries of one kernel.
    there = sum(1 / choice.get(n.id, 1) for n in nodes)
    blocks = elements * size * (math.ceil(there) - len(aside) + 4)
    # What is read beside them is held for the whole tensor, with a part of it put in order for a kernel, unless it
    # comes in rows.
    for node in nodes:
        way, owner = aside.get(node.id, ("", node))
        if way:
            blocks += size * (2 * node.numel if way != "rows" else node.numel * elements // max(1, owner.numel))
    # A row method sorts: values, indices and a copy. A matrix method decomposes in float64: both sides, a copy and the
    # room that LAPACK asks for.
    reaches = {n.reach for n in nodes}
    sorting = elements * (48 if "matrix" in reaches else 24 if "row" in reaches else 0)
    counters = sum(STATISTIC for n in nodes if n.reach in ("measured", "pooled"))
    return blocks + sorting + counters

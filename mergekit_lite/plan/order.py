"""What is done in which order, and what it costs: units of work and bytes to read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from mergekit_lite.checkpoint.meta import STORED_BITS
from mergekit_lite.methods.pursuit import batch_size
from mergekit_lite.plan.model import Alignment, Node, Output, OutTensor, Unit
from mergekit_lite.vocabulary.graft import Graft

GRAIN = 1 << 16  # elements over which a statistic is summed at once; part of what defines the output's bytes
BLOCK = 1 << 18  # elements of one block unless the run says otherwise; changes time and memory, never a byte
SEGMENT = 1 << 22  # elements of one unit where a tensor can be cut: a unit is what a stopped run may have to redo
COPY_BLOCK = 1 << 20  # bytes that a passthrough tensor is copied in: what a core's own cache holds
SWEEPS = 6  # passes over models whose spaces depend on one another, as weight matching usually takes them


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
            grain = math.lcm(grain, row_length(node) * node.method.rows)
        elif node.method is not None:
            grain = math.lcm(grain, node.method.grain)
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
    """The work in the order of the files. Tensors of one name and shape go together, so that saves that share
    results compute them once, and what stands in one file for several outputs is there once; large tensors are cut
    where no statistic ties them together."""
    together: dict[tuple[str, tuple[int, ...], bool], list[tuple[int, OutTensor]]] = {}
    for number, output in enumerate(outputs):
        for shard in output.shards:
            for tensor in shard.tensors if shard.same is None else ():
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


def among(nodes: Iterable[Node]) -> dict[int, float]:
    """The nodes of which a gathering node reads one, by id: how many there are to choose from. Where it takes means,
    how many for each that it reads, on average; below 1 where it reads several parts of one for each of its own, or
    rows that are longer."""
    found: dict[int, float] = {}
    for node in [n for n in nodes if n.reach == "row"]:
        if node.method is not None and node.method.gathers and not node.method.combines:
            place = dict(node.params)
            choice = len(node.inputs) / place.get("members", 1.0)
            if "kept" in place:
                choice *= math.prod(node.shape[1:]) / math.prod(node.inputs[0].shape[1:])
            if choice != 1:
                found.update((below.id, choice) for below in walk(node.inputs))
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
        if alignment.layers:
            total += _expert_bytes(alignment)
        else:
            total += passes(alignment) * _stored_bytes(alignment.nodes)
    return total


def _expert_bytes(alignment: Alignment) -> int:
    """Bytes that the search for groups of experts reads: all, where the weights tell which are alike, and in any case
    each expert that joins another together with it, where units are matched."""
    params, table = dict(alignment.params), alignment.models[0]
    matched = params["align"] and params["mode"] == "merge"
    stored = _stored_bytes(table.values())
    total = 0
    for layer in alignment.layers:
        experts = _stored_bytes(table[name] for weight in layer.weights for name in weight.names if name in table)
        stored -= experts
        total += experts * (params["similarity"] == "weight")
        total += experts * 2 * (layer.count - layer.into) // layer.count if matched else 0
    return total + stored


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
    sweeps. Experts are read to find which are alike, where their weights tell, and to match their units, each with the
    dominant one of its group."""
    if alignment.activations or alignment.use in ("reorder", "slice"):
        return 1
    if alignment.layers:
        params = dict(alignment.params)
        return int(params["similarity"] == "weight") + 2 * int(params["align"]) or 1
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
    return sum(part.nbytes for meta in loads.values() for part in meta.parts)


def _pass_bytes(nodes: Sequence[Node], numel: int) -> int:
    """Stored bytes that one pass over `numel` elements of a tensor reads."""
    loads = [node for node in nodes if node.load is not None]
    rows = [node for node in nodes if node.reach == "row"]
    if not rows:
        return sum([load_bytes(node, numel) for node in loads])
    aside = beside(rows)
    choice = among(rows)
    total = 0
    for node in rows:
        if node.method is not None and node.method.combines:
            aside.update((below.id, ("rows", node)) for below in walk([node.inputs[1]]))
            total += _summed_bytes(node, numel)
    for node in loads:
        way, owner = aside.get(node.id, ("", node))
        share = numel if not way else node.numel * numel // max(1, owner.numel) if way == "rows" else node.numel
        total += int(load_bytes(node, share) / choice.get(node.id, 1))
    return total


def _summed_bytes(node: Node, numel: int) -> int:
    """Stored bytes of the rows that sums are made of, for `numel` elements of a tensor of another vocabulary: those of
    a batch are read together, each once."""
    mine, theirs = node.inputs
    settings = dict(node.params)
    graft: Graft = settings["graft"]
    terms: int = settings["k"]
    atoms, sums = len(graft.atoms), len(graft.sums)
    batch = batch_size(terms, math.prod(theirs.shape[1:]), atoms)
    rows = -(-sums // batch) * min(batch * terms, atoms)
    bits = STORED_BITS[mine.load.dtype] if mine.load is not None else 32
    return rows * math.prod(mine.shape[1:]) * bits // 8 * numel // max(1, node.numel)


def load_bytes(node: Node, numel: int) -> int:
    """Stored bytes of `numel` elements of a loaded tensor; 0 for other nodes."""
    load = node.load
    if load is None:
        return 0
    if load.packed is not None or load.coded is not None:
        return sum(part.nbytes for part in load.parts) * numel // max(1, load.numel)
    return numel * STORED_BITS[load.dtype] // 8

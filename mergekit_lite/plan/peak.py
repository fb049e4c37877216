"""How much memory the work of a plan takes at its peak, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_lite.checkpoint.coded import FRAME
from mergekit_lite.family.spaces import Space
from mergekit_lite.methods.factored import ROWS as PRODUCT_ROWS
from mergekit_lite.methods.pursuit import batch_size, pursuit_bytes
from mergekit_lite.plan.model import Alignment, Node, Unit
from mergekit_lite.plan.order import COPY_BLOCK, among, beside, grain_of, walk

THREAD = 3 << 22  # bytes of one thread's stack and of what its allocator keeps for later
STATISTIC = 3 << 21  # bytes that a statistic gathers at most: keys near a threshold and their places
# glibc keeps blocks that are freed, and not every next one fits in what is left between those in use. Larger ones, from
# `MAPPED` bytes on, it gives back.
KEPT, MAPPED = 1.5, 1 << 25
PIECES = 1 << 25  # bytes of the pieces of experts whose products tell how alike these are
EXPERTS = 1.1  # as KEPT, of all that matching two experts takes
SEARCH = 1.75  # the same for the search of an order of units, which holds tensors of many sizes in turn
KERNEL = 4  # blocks: a stored one, and the temporaries of one kernel
# The same of methods that take more: blocks of the compute dtype, and further ones for each input.
KERNELS: Mapping[str, tuple[float, float]] = {
    "importance": (6.0, 0.0),
    "padded": (8.0, 0.0),
    "pcb": (6.0, 0.0),
    "sce": (8.0, 5.0),
}
# What a matrix method takes beside its inputs and its result, in matrices of float64: of the tensor's shape once and
# for each input, and square ones with as many rows as the tensor has columns. Measured, and rounded up.
MATRIX: Mapping[str, tuple[float, float, float]] = {
    "ace": (7.0, 0.0, 7.0),
    "cart": (9.0, 1.0, 0.0),
    "core_space": (6.0, 4.0, 0.0),
    "decompose": (11.0, 0.0, 0.0),
    "from_shared": (6.0, 0.0, 0.0),
    "iso_c": (6.5, 0.0, 0.0),
    "iso_cts": (7.0, 2.0, 0.0),
    "merge_in_shared": (5.0, 5.0, 0.0),
    "regmean": (4.0, 1.0, 5.0),
    "shared_basis": (7.0, 1.0, 0.0),
    "star": (5.0, 1.0, 0.0),
    "svc": (7.0, 0.5, 0.0),
    "to_shared": (6.0, 0.0, 0.0),
    "lokr_parts": (8.0, 0.0, 0.0),
    "lokr_rank": (7.0, 0.0, 0.0),
    "part": (0.0, 0.0, 0.0),
    "random_gates": (4.0, 0.0, 0.0),
    "scaled_groups": (1.0, 0.0, 0.0),
    "state_gates": (4.0, 0.0, 0.0),
    "tsv_m": (3.0, 3.0, 0.0),
    "tucker": (7.0, 0.0, 0.0),
    "weighted_adapter": (6.0, 5.0, 0.0),
    "wudi": (6.0, 0.0, 4.0),
    "zeros": (0.0, 0.0, 0.0),
}
MATRIX_OTHER = (10.0, 4.0, 0.0)
# What a method on factors takes: numbers of float64 for each of theirs, and for each of the deltas' blocks, which are
# as many rows as the factors have columns together.
FACTORS: Mapping[str, tuple[float, float]] = {
    "combine_factors": (8.0, 0.0),
    "core_factors": (8.0, 0.0),
    "low_rank_of_factors": (6.0, 0.0),
    "merge_factors": (7.0, 3.5),
    "needed_of_factors": (5.0, 0.0),
}


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that one piece of work takes while a thread is at it, and a sentence that says what takes them."""

    nbytes: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class Peak:
    """The costliest work of a plan, for one thread at a time: a unit done in blocks, one that takes whole matrices, the
    statistics of whole models, and an order of units. Without a thread's own `THREAD` bytes. `shared` is held once for
    all threads: the rows of another vocabulary in which sums are found."""

    blocks: Need
    whole: Need
    pools: Need
    alignments: Need
    shared: int = 0

    @property
    def worst(self) -> Need:
        return max(self.blocks, self.whole, self.pools, self.alignments, key=lambda need: need.nbytes)


def peak_of(
    units: Sequence[Unit],
    pools: Mapping[str, Sequence[Node]],
    alignments: Mapping[str, Alignment],
    block: int,
    size: int,
) -> Peak:
    """The costliest work. `block` is in elements, `size` the bytes of one element in the compute dtype."""
    blocks, whole = Need(COPY_BLOCK), Need(0)
    kinds: dict[Any, Unit] = {}
    for unit in units:
        reaches = [node.reach for node in unit.nodes]
        # Where nothing works on rows or matrices, all nodes have one shape: such units are alike but for a few things.
        alike = "row" not in reaches and "matrix" not in reaches
        kinds.setdefault((unit.nodes[-1].shape, *reaches) if alike else id(unit.nodes), unit)
    for unit in kinds.values():
        nbytes = block_bytes(unit.nodes, block, size)
        if is_whole(unit.nodes):
            whole = _worse(whole, nbytes, unit.nodes, unit.name)
        else:
            blocks = _worse(blocks, nbytes, unit.nodes, unit.name)
    pooled = Need(0)
    for members in pools.values():
        # The members of a pool have one structure.
        for node in {node.shape: node for node in members}.values():
            nodes = walk([node])
            pooled = _worse(pooled, block_bytes(nodes, block, size), nodes, "its largest tensor")
    found = (_alignment(alignment, size) for alignment in alignments.values())
    alignment = max(found, key=lambda need: need.nbytes, default=Need(0))
    return Peak(blocks, whole, pooled, alignment, _shared(units, size))


def peak_bytes(peak: Peak, threads: int) -> int:
    """Anonymous memory of the blocks of `threads` threads at work, each at the costliest there is."""
    return (peak.worst.nbytes + THREAD) * threads + peak.shared


def _shared(units: Sequence[Unit], size: int) -> int:
    """Bytes of the rows in which sums are found. Two tensors' may be held at once, where threads go on to the next."""
    found: dict[tuple[int, str], int] = {}
    for node in {n.id: n for unit in units for n in unit.nodes if n.method and n.method.combines}.values():
        theirs, graft = node.inputs[1], dict(node.params)["graft"]
        found[theirs.id, graft.digest] = len(graft.atoms) * math.prod(theirs.shape[1:]) * size
    return sum(sorted(found.values())[-2:])


def summing_bytes(node: Node, size: int) -> int:
    """What a thread takes for a batch of rows that are sums of others: the search, and the rows themselves."""
    mine, theirs = node.inputs
    settings = dict(node.params)
    atoms: int = len(settings["graft"].atoms)
    terms: int = settings["k"]
    width, own = math.prod(theirs.shape[1:]), math.prod(mine.shape[1:])
    batch = batch_size(terms, width, atoms)
    rows = min(atoms, batch * terms) + batch + terms
    return math.ceil(KEPT * pursuit_bytes(terms, width, atoms, size)) + 2 * size * own * rows + 8 * own * terms


def is_whole(nodes: Iterable[Node]) -> bool:
    """Whether these need whole matrices, so that smaller blocks would not help."""
    return any(node.reach == "matrix" for node in nodes)


def _worse(worst: Need, nbytes: int, nodes: Sequence[Node], tensor: str) -> Need:
    if nbytes <= worst.nbytes:
        return worst
    whole = next((n for n in reversed(nodes) if n.reach == "matrix"), None)
    loads = sum(node.load is not None for node in nodes)
    models = f"{loads} models" if loads > 1 else "one model"
    name = tensor if " " in tensor else f"`{tensor}`"
    if whole is not None:
        return Need(nbytes, f"`{whole.step}` needs the whole of {name} of {models} at once")
    step = f"`{nodes[-1].step}` needs" if nodes[-1].step else "a copy needs"
    return Need(nbytes, f"{step} blocks of {name} of {models}")


def _alignment(alignment: Alignment, size: int) -> Need:
    """The costliest space: its tensors of two models, and what the solver of an assignment takes."""
    if not alignment.searched:
        return Need(0)
    if alignment.layers:
        return _experts(alignment, size)
    if alignment.use == "slice":
        # The tensor, put in the order of the spaces around, its magnitudes, and what the sum takes.
        name, node = max(alignment.models[0].items(), key=lambda item: item[1].numel)
        return Need(
            math.ceil(SEARCH * 4 * size * node.numel), f"`{alignment.name}` needs the whole of `{name}` at once"
        )
    from mergekit_lite.align.memory import matching_bytes

    shapes = {name: node.shape for table in alignment.models for name, node in table.items()}
    chosen = [space for space in alignment.spaces if space.kind in alignment.kinds]
    children: dict[str, list[Space]] = {}
    for space in chosen:
        if space.parent is not None:
            children.setdefault(space.parent, []).append(space)
    sizes = {s.name: matching_bytes(s, shapes, children=children.get(s.name, ()), number=size) for s in chosen}
    worst = max(sizes, key=lambda name: sizes[name])
    return Need(
        math.ceil(SEARCH * sizes[worst]),
        f"`{alignment.name}` needs the tensors of the space `{worst}` of two models at once",
    )


def _experts(alignment: Alignment, size: int) -> Need:
    """Two experts and what it takes to match their units: a copy of what has units as columns, products and the
    solver's costs; or pieces of all experts of a layer, whose products are added up."""
    from mergekit_lite.align.memory import pair_bytes

    worst = max(alignment.layers, key=lambda layer: pair_bytes(layer, size))
    params = dict(alignment.params)
    pieces = Need(PIECES if params["similarity"] == "weight" else 0, f"`{alignment.name}` needs pieces of all experts")
    if not params["align"] or params["mode"] == "prune":
        return pieces
    pair = math.ceil(SEARCH * pair_bytes(worst, size))
    # What the pieces took stays with the allocator.
    return Need(
        math.ceil(EXPERTS * (pair + pieces.nbytes)), f"`{alignment.name}` needs two experts of `{worst.router}` at once"
    )


def block_bytes(nodes: Sequence[Node], block: int, size: int) -> int:
    """What one thread needs for a block of the last of `nodes`, inputs before users."""
    grain = grain_of(nodes)
    aside = beside(nodes)
    choice = among(nodes)
    numel = max(map(math.prod, {n.shape for n in nodes if n.id not in aside}))
    elements = min(numel, max(grain, block // grain * grain))
    # Every node's block lives until the block is done; and there are the temporaries of one kernel.
    # Members of a mean come one after the other.
    mixes = any(n.method is not None and n.method.name == "mixed" for n in nodes)
    there = 3 if mixes and nodes[-1].pool else sum(1 / choice.get(n.id, 1) for n in nodes)
    kernels = max([_kernel(node) for node in nodes])
    blocks = math.ceil(elements * size * (math.ceil(there) - len(aside) + kernels))
    # What is read beside them is held for the whole tensor, with a part of it put in order for a kernel, unless it
    # comes in rows.
    for node in nodes:
        way, owner = aside.get(node.id, ("", node))
        if way:
            blocks += size * (2 * node.numel if way != "rows" else node.numel * elements // max(1, owner.numel))
    if is_whole(nodes):
        held = sum((2 if n.id in aside else 1) * n.numel for n in nodes)
        blocks = math.ceil(size * (held + kernels * numel))
    elif elements * size < MAPPED:
        blocks = math.ceil(KEPT * blocks)
    # A row method sorts: values, indices and a copy.
    sorting = 24 * elements if any(n.reach == "row" for n in nodes) else 0
    sums = sum(summing_bytes(n, size) for n in nodes if n.method is not None and n.method.combines)
    counters = sum(STATISTIC for n in nodes if n.reach in ("measured", "pooled"))
    coded = {n.load.file for n in nodes if n.load is not None and n.load.coded is not None}
    if coded:  # the latest frame of each file; one as it is read, and its bits
        counters += (len(coded) + 4) * FRAME
    return blocks + max([sorting, *(matrix_bytes(n) for n in nodes if n.reach == "matrix")]) + counters + sums


def _of_factors(node: Node, each: float, block: float) -> int:
    params = dict(node.params)
    rank = sum(a.shape[0] for a in node.inputs[::2])
    a, b = node.inputs[:2]
    columns = (b if params["turned"][0] else a).numel // max(1, a.shape[0])
    models: int = params["models"]
    return math.ceil(8 * (each * sum(n.numel for n in node.inputs) + block * models * rank * columns))


def _kernel(node: Node) -> float:
    once, each = KERNELS.get(node.method.name, (KERNEL, 0.0)) if node.method is not None else (KERNEL, 0.0)
    return once + each * len(node.inputs)


def matrix_bytes(node: Node) -> int:
    """What a decomposition takes in double precision, beside the node's inputs and its result."""
    assert node.method is not None
    if node.method.name in FACTORS:
        return _of_factors(node, *FACTORS[node.method.name])
    if node.method.name == "widen":
        # Some rows of the product, and both factors.
        rows, columns = node.shape[0], math.prod(node.shape[1:])
        return math.ceil(8 * (min(rows, PRODUCT_ROWS) * columns + 1.2 * sum(n.numel for n in node.inputs)))
    once, each, square = MATRIX.get(node.method.name, MATRIX_OTHER)
    if node.method.name == "tsv_m":  # keeps no more of each input than this share
        each *= dict(node.params)["rank_share"] or 1 / len(node.inputs)
    shape = max((n.shape for n in (node, *node.inputs)), key=math.prod)
    rows, columns = max(1, math.prod(shape[:1])), max(1, math.prod(shape[1:]))
    if min(rows, columns) == 1:
        square = 0.0  # vectors are averaged
    return math.ceil(8 * ((once + each * len(node.inputs)) * rows * columns + square * columns * columns))

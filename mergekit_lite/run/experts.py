"""Groups of experts found before the first output byte: which are alike, which unit of one is which of another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergekit_lite.align.apply import Order, is_identity
from mergekit_lite.align.assign import Assign, assignment, value
from mergekit_lite.align.auction import auction
from mergekit_lite.align.cost import add_products, empty, rows
from mergekit_lite.align.grouping import Floats, dominant_experts, frequencies, grouped, shares, similarity
from mergekit_lite.errors import InputError
from mergekit_lite.family.moe import ExpertLayer, Weight
from mergekit_lite.family.spaces import Use
from mergekit_lite.plan.model import Alignment, Node
from mergekit_lite.plan.order import walk
from mergekit_lite.run.evaluate import Blocks, subset
from mergekit_lite.run.mixture import Member, Mixed
from mergekit_lite.run.program import Loader, Program, Stats

PIECE = 1 << 20  # elements of all experts whose products are summed at once: the same in every run
Report = Callable[[str, int, int], None]


def solve_experts(
    alignment: Alignment, stats: Stats, blocks: Blocks, threads: Executor, report: Report
) -> tuple[tuple[dict[str, Order]], dict[str, Any]]:
    """For every router `NAME`, under `NAME.experts` the expert that each one's group is named after, and under
    `NAME.experts.E` the order of the hidden units of expert E where that is another than its own; and the share of use
    of every expert. Raises InputError where statistics or weights are not finite, and what reading raises.

    Each thread holds two experts at most, and all of them together no more than the largest layer has.
    """
    params = dict(alignment.params)
    looks = [_Look(alignment, layer, stats, blocks) for layer in alignment.layers]
    found: dict[str, Order] = {}
    used: dict[str, list[float]] = {}
    wanted: list[tuple[_Look, int, int]] = []
    similar = _each(threads, [partial(look.similarity, params["similarity"]) for look in looks])
    for look, alike in zip(looks, similar, strict=True):
        layer, use = look.layer, look.usage()
        labels = grouped(alike, dominant_experts(use, layer.into, layer.groups), layer.groups)
        found[f"{layer.router}.experts"] = labels
        used[layer.router] = use.tolist()
        wanted += [(look, int(label), e) for e, label in enumerate(labels) if label != e]
    if params["align"] and params["mode"] == "merge":
        device = blocks.loader().device
        assign = assignment if device.type == "cpu" else auction(str(device), check=blocks.stopped)
        gate = threading.Semaphore(max(1, max((layer.count for layer in alignment.layers), default=2) // 2))
        done = iter(range(1, len(wanted) + 1))
        lock = threading.Lock()

        def match(look: _Look, like: int, expert: int) -> Order:
            with gate:
                blocks.stopped()
                order = look.matched(like, expert, assign)
            with lock:
                report(look.layer.router, next(done), len(wanted))
            return order

        orders = _each(threads, [partial(match, *one) for one in wanted])
        for (look, _, expert), order in zip(wanted, orders, strict=True):
            if not is_identity(order):
                found[f"{look.layer.router}.experts.{expert}"] = order
    return (found,), {"usage": used, "moved": {}}


def _each(threads: Executor, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the tasks give, in their order. The first fault is raised as soon as it is there."""
    going = {threads.submit(task): n for n, task in enumerate(tasks)}
    results: list[Any] = [None] * len(tasks)
    for finished in as_completed(going):
        results[going[finished]] = finished.result()
    return results


class _Look:
    """Looks at the experts of one layer."""

    def __init__(self, alignment: Alignment, layer: ExpertLayer, stats: Stats, blocks: Blocks):
        self.layer, self._table, self._stats, self._blocks = layer, alignment.models[0], stats, blocks

    def usage(self) -> Floats:
        """Each expert's share of use; alike for all where no statistics tell."""
        name = f"{self.layer.router}.usage"
        if name not in self._table:
            return frequencies(np.ones(self.layer.count))
        found = self._exact(name)
        if not np.isfinite(found).all() or (found < 0).any():
            raise InputError(f"`{name}` of the statistics holds what is no count", hint="was the file damaged?")
        return frequencies(found)

    def similarity(self, kind: str) -> Floats:
        """How similar every two experts are."""
        self._blocks.stopped()
        if kind == "router-logits":
            name = f"{self.layer.router}.logits_gram"
            gram = self._exact(name)
        elif kind == "router-weight":
            name = self.layer.gates[0]
            with self._blocks.lane():
                gate = self._whole(name).view(self.layer.count, -1).double().cpu()
            gram = (gate @ gate.T).numpy()
        else:
            gram = self._products()
            name = "" if np.isfinite(gram).all() else self._broken(np.diagonal(gram))
        if not np.isfinite(gram).all():
            raise InputError(f"`{name}` holds NaN, infinite or extremely large values", hint="was the file damaged?")
        return similarity(gram)

    def _products(self) -> Floats:
        """Inner products of every two experts, in pieces of fixed size so that every run sums them alike."""
        count = self.layer.count
        total = torch.zeros(count, count, dtype=torch.float64)
        with self._blocks.lane():
            for weight in self.layer.weights:
                reads = [self._reading(weight, e) for e in range(count)]
                step = max(1, PIECE // count)
                for start in range(0, weight.numel, step):
                    self._blocks.stopped()
                    stop = min(weight.numel, start + step)
                    part = torch.stack([read(start, stop).double() for read in reads])
                    total += (part @ part.T).cpu()
        return total.numpy()

    def matched(self, like: int, expert: int, assign: Assign) -> Order:
        """The order of the hidden units of one expert that makes it most like another; its own where nothing is
        gained."""
        units = self.layer.units
        costs = empty(units)
        with self._blocks.lane():
            for weight in self.layer.weights:
                mine, theirs = (self._reading(weight, e)(0, weight.numel) for e in (like, expert))
                shape = (weight.rows, weight.width)
                for piece in range(weight.pieces):
                    use = Use("", 0 if weight.units == "rows" else 1, start=piece * units)
                    add_products(costs, rows(mine.view(shape), use, units), rows(theirs.view(shape), use, units), 1.0)
                del mine, theirs  # before the next ones are read
        if not np.isfinite(costs).all():
            norms = [self._norm(e) if e in (like, expert) else 0.0 for e in range(self.layer.count)]
            message = f"`{self._broken(np.array(norms))}` holds NaN, infinite or extremely large values"
            raise InputError(message, hint="units cannot be matched by such numbers")
        own = np.arange(units, dtype=np.int64)
        found = assign(costs)
        return found if value(costs, found) > value(costs, own) else own

    def _norm(self, expert: int) -> float:
        """The squared norm of all weights of an expert."""
        parts = (self._reading(weight, expert)(0, weight.numel) for weight in self.layer.weights)
        return sum(float(part.square().sum(dtype=torch.float64)) for part in parts)

    def _broken(self, norms: Floats) -> str:
        """A tensor that makes the squared norm of the first such expert not finite."""
        bad = np.flatnonzero(~np.isfinite(norms))
        expert = int(bad[0]) if len(bad) else 0
        for weight in self.layer.weights:
            if not bool(torch.isfinite(self._reading(weight, expert)(0, weight.numel).square().sum())):
                return weight.names[0 if weight.fused else expert]
        return self.layer.weights[0].names[0]

    def _reading(self, weight: Weight, expert: int) -> Callable[[int, int], Tensor]:
        """Gives the elements [start, stop) of one expert's matrix, flat."""
        node = self._table[weight.names[0 if weight.fused else expert]]
        lead = expert * weight.numel if weight.fused else 0
        if node.load is not None:
            program = self._program(node)
            return lambda start, stop: program.run(lead + start, lead + stop)[0]
        whole = self._whole(node)  # what is computed comes in blocks of its own
        return lambda start, stop: whole[lead + start : lead + stop]

    def _whole(self, name: str | Node) -> Tensor:
        node = self._table[name] if isinstance(name, str) else name
        return self._program(node).run(0, node.numel)[0]

    def _program(self, node: Node) -> Program:
        local = subset(self._stats, walk([node]))
        self._blocks.measure([node], local)
        return Program([node], self._blocks.loader(), local)

    def _exact(self, name: str) -> Floats:
        """A statistic in double precision, whatever the dtype of the arithmetic."""
        node = self._table[name]
        assert node.load is not None  # the plan has seen to it
        loader = Loader(self._blocks.loader().source, torch.float64)
        return loader.load(node.load, 0, node.numel).view(node.shape).numpy()


def members(
    alignment: Alignment, orders: Mapping[str, Order], figures: Mapping[str, Any], nodes: Iterable[Node]
) -> Stats:
    """How each of the `nodes` that take means is made of the experts' tensors."""
    params = dict(alignment.params)
    groups = [_groups(layer, orders[f"{layer.router}.experts"]) for layer in alignment.layers]
    found: Stats = {}
    for node in nodes:
        place = dict(node.params)
        layer = alignment.layers[place["layer"]]
        used = np.array(figures["usage"][layer.router])
        pruned = params["rows"] == "dominant" if place["weight"] < 0 else params["mode"] == "prune"
        mine = list(groups[place["layer"]].values())
        if params["router"] == "alias":
            labels = orders[f"{layer.router}.experts"]
            mine = [groups[place["layer"]][int(label)] for label in labels]
        if place["slot"] is not None:
            mine = [mine[place["slot"]]]
        even = params["weights"] == "uniform" and place["weight"] >= 0
        slots = []
        for group in mine:
            taken = group[:1] if pruned else group
            slots.append(
                tuple(
                    _member(layer, place["weight"], expert, share, orders)
                    for expert, share in zip(taken, shares(used, taken, even), strict=True)
                )
            )
        if place["weight"] < 0:
            found[node.id] = Mixed(1, max(1, node.numel // max(1, node.shape[0])), tuple(slots))
        else:
            weight = layer.weights[place["weight"]]
            found[node.id] = Mixed(weight.rows, weight.width, tuple(slots))
    return found


def _groups(layer: ExpertLayer, labels: Order) -> dict[int, list[int]]:
    """The experts of each group, the one that it is named after first, in the order of these."""
    found = {int(label): [int(label)] for label in sorted(set(labels.tolist()))}
    for expert, label in enumerate(labels.tolist()):
        if label != expert:
            found[label].append(expert)
    return found


def _member(layer: ExpertLayer, index: int, expert: int, share: float, orders: Mapping[str, Order]) -> Member:
    if index < 0:
        return Member(0, np.array([expert], dtype=np.int64), share)
    weight = layer.weights[index]
    order = orders.get(f"{layer.router}.experts.{expert}")
    taken = np.arange(weight.rows, dtype=np.int64)
    if order is not None and weight.units == "rows":
        taken = np.concatenate([order + piece * layer.units for piece in range(weight.pieces)])
    columns = order if weight.units == "columns" else None
    if weight.fused:
        return Member(0, taken + expert * weight.rows, share, columns)
    return Member(expert, taken, share, columns)


def expert_map(alignment: Alignment, orders: Mapping[str, Order]) -> dict[str, list[int]]:
    """For every layer that has changed, by its number, which of the stored experts each row of its router means."""
    found = {}
    for layer in alignment.layers:
        labels = orders[f"{layer.router}.experts"].tolist()
        places = {label: n for n, label in enumerate(sorted(set(labels)))}
        found[str(layer.layer)] = [places[label] for label in labels]
    return found


def groups_text(
    alignment: Alignment, orders: Mapping[str, Order], figures: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The groups of every router, the dominant expert first, and the share of use of every expert: plain data."""
    return {
        layer.router: {
            "groups": list(_groups(layer, orders[f"{layer.router}.experts"]).values()),
            "usage": figures["usage"][layer.router],
        }
        for layer in alignment.layers
    }


def sound(alignment: Alignment, data: Any) -> bool:
    """Whether this is something that `solve_experts` could have found: anything may lie in a cache."""
    try:
        (found,) = data["permutations"]
        used = data["figures"]["usage"]
        for layer in alignment.layers:
            labels = np.array(found[f"{layer.router}.experts"])
            shared = np.array(used[layer.router], dtype=np.float64)
            units = [np.array(found.get(f"{layer.router}.experts.{e}", range(layer.units))) for e in range(layer.count)]
            fit = (
                labels.shape == shared.shape == (layer.count,)
                and labels.dtype.kind == "i"
                and (labels >= 0).all()
                and (labels < layer.count).all()
                and (labels[labels] == labels).all()
                and len(set(labels.tolist())) == layer.into
                and np.isfinite(shared).all()
                and all((np.sort(order) == np.arange(layer.units)).all() for order in units)
            )
            if not fit:
                return False
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError):
        return False
    return True

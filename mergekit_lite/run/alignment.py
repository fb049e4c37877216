"""Orders of units found before the first output byte: whole models are looked at, space by space, and each permuted
tensor learns where its rows lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mergekit_lite.align.activations import match_activations
from mergekit_lite.align.apply import Move, Order, inverse, moves
from mergekit_lite.align.auction import auction
from mergekit_lite.align.file import read_file
from mergekit_lite.align.keep import cut, important
from mergekit_lite.align.many import match_many
from mergekit_lite.align.match import Solution, match, moved_share
from mergekit_lite.align.reorder import reorder
from mergekit_lite.plan.model import LEADING, Alignment, Node
from mergekit_lite.plan.order import walk
from mergekit_lite.run.evaluate import Blocks, subset
from mergekit_lite.run.gather import Taken
from mergekit_lite.run.program import Program, Stats

Report = Callable[[str, int, int], None]  # a space, and how many of how many are through


@dataclass(frozen=True, slots=True)
class Solved:
    """What was found: the permutations of every model that is permuted, by space, and figures about them."""

    permutations: tuple[Mapping[str, Order], ...]
    figures: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain data for a journal."""
        kept = [{name: p.tolist() for name, p in one.items()} for one in self.permutations]
        return {"permutations": kept, "figures": dict(self.figures)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Solved:
        """The opposite of `as_json`."""
        found = [{name: np.array(p, dtype=np.int64) for name, p in one.items()} for one in data["permutations"]]
        return cls(tuple(found), data["figures"])


def solve(alignment: Alignment, stats: Stats, blocks: Blocks, threads: Executor, report: Report) -> Solved:
    """Find the order of `alignment`. `stats` hold what its models need. Raises InputError where a file of permutations
    is not what it was when the plan was made, where a tensor holds NaN, and what reading raises."""
    params = dict(alignment.params)
    if alignment.layers:
        from mergekit_lite.run.experts import solve_experts

        return Solved(*solve_experts(alignment, stats, blocks, threads, report))
    if alignment.use == LEADING:
        return Solved(({},), {})
    if alignment.use == "known":
        return Solved(tuple(read_file(params["from"], alignment.spaces, alignment.digest)), {})
    spaces, shapes = alignment.spaces, shapes_of(alignment)
    common: dict[str, Any] = {"kinds": alignment.kinds, "check": blocks.stopped, "report": report}
    device = blocks.loader().device
    if device.type != "cpu" and alignment.use != "reorder":
        common["assign"] = auction(str(device), check=blocks.stopped)
    if alignment.activations:
        like, of = (_tensors(table, stats, blocks) for table in alignment.activations)
        found = match_activations(spaces, like, of, **common)
        return Solved((found.permutations,), _figures(found))
    models = [_tensors(table, stats, blocks) for table in alignment.models]
    if alignment.use == "slice":
        kept = dict(params["keep"])
        orders, shares = important(spaces, kept, models[0], shapes=shapes, check=blocks.stopped, report=report)
        return Solved((orders,), {"kept": shares})
    common |= {"shapes": shapes, "seed": params["seed"], "threads": threads}
    if alignment.use == "reorder":
        orders, smoothness = reorder(spaces, models[0], metric=params["order"], starts=params["starts"], **common)
        moved = moved_share(orders)
        return Solved((orders,), {"moved": moved, "spaces": {name: asdict(one) for name, one in smoothness.items()}})
    common |= {key: params[key] for key in ("cost", "max_sweeps")}
    if alignment.use == "merge_many":
        many = match_many(spaces, models, way=params["way"], **common)
        each = [{"moved": moved_share(orders)} for orders in many.permutations]
        figures = {"settled": many.settled, "rounds": many.rounds, "agreement": many.agreement, "models": each}
        return Solved(tuple(many.permutations), figures)
    found = match(spaces, *models, **common)
    return Solved((found.permutations,), _figures(found))


def _figures(found: Solution) -> dict[str, Any]:
    return {
        "settled": found.settled,
        "objective": [found.start, *found.objective],
        "distance_before": found.distance_before,
        "distance_after": found.distance_after,
        "moved": found.moved,
    }


def shapes_of(alignment: Alignment) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that are moved or looked at."""
    return {name: node.shape for table in alignment.models for name, node in table.items()}


def _tensors(table: Mapping[str, Node], stats: Stats, blocks: Blocks) -> Callable[[str], Tensor]:
    """Whole tensors of a model by name, each computed when it is asked for."""

    def tensor(name: str) -> Tensor:
        node = table[name]
        local = subset(stats, walk([node]))
        with blocks.lane():
            blocks.measure([node], local)
            whole = Program([node], blocks.loader(), local).run(0, node.numel)[0]
            return whole.view(node.shape).cpu()

    return tensor


def places(alignment: Alignment, solved: Solved, nodes: Iterable[Node]) -> Stats:
    """Where each of the `nodes` that this alignment permutes takes its rows from."""
    if alignment.layers:
        from mergekit_lite.run.experts import members

        return members(alignment, solved.permutations[0], solved.figures, nodes)
    shapes = shapes_of(alignment)
    known: dict[tuple[int, bool], dict[str, Move]] = {}
    found: Stats = {}
    for node in nodes:
        place = dict(node.params)
        key = (place["model"], place["invert"])
        if key not in known:
            permutations = solved.permutations[key[0]]
            permutations = inverse(alignment.spaces, permutations) if key[1] else permutations
            known[key] = moves(alignment.spaces, permutations, shapes)
        move = known[key].get(place["tensor"], Move(place["tensor"]))
        orders = cut(move, place["kept"], shapes[move.source]) if "kept" in place else move.orders
        found[node.id] = Taken(place["among"].index(move.source), orders)
    return found

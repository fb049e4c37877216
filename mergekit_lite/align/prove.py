"""Whether spaces are what they claim to be: permutations drawn at random must leave a network's outputs unchanged.

Proved are the layout and the names, so the weights are drawn anew: zero biases and equal gains would hide a mistake.
Each space is tried alone and all of them together, so that what must not move together shows. The other way round, the
same permutation along one tensor alone must change the outputs: a proof on a network that ignores its weights is none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mergekit_lite.align.apply import Order, group_order, is_identity, moves, permuted
from mergekit_lite.align.trace import arguments_of
from mergekit_lite.errors import InputError, Problem
from mergekit_lite.family.spaces import Space
from mergekit_lite.lazy import Tensor, torch

State = Mapping[str, Tensor]
Evaluate = Callable[[State], Sequence[Tensor]]
TOGETHER = "all together"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one space, or of all of them together.

    `change` is the largest change of an output, as a share of the spread of the outputs, when the space is permuted;
    `idle` are tensors whose permutation alone changes nothing.
    """

    space: str
    verdict: Literal["ok", "warn", "fail"]
    detail: str
    change: float = 0.0
    idle: tuple[str, ...] = ()


def prove(
    spaces: Sequence[Space],
    module: torch.nn.Module,
    inputs: Any,
    seed: int = 0,
    tolerance: float = 1e-9,
    none: Sequence[Space] = (),
) -> list[Finding]:
    """Prove spaces on a copy of `module` in eval mode, in float64 and with random weights.

    `inputs` is a tensor, a tuple of positional arguments, or a mapping of keyword arguments; every floating output
    counts. A network that computes parts in float32 needs a larger `tolerance`. Of tied tensors any name will do. What
    is found, `none` and errors are those of `prove_state`.
    """
    module = copy.deepcopy(module).double().eval()
    positional, keywords = arguments_of(torch.utils._pytree.tree_map(_double, inputs))
    first: dict[int, str] = {}
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    canonical = {name: first.setdefault(id(tensor), name) for name, tensor in named}
    kept = set(module.state_dict())
    state = {name: tensor.detach() for name, tensor in named if canonical[name] == name and name in kept}

    def evaluate(state: State) -> Sequence[Tensor]:
        with torch.no_grad():
            return floating(torch.func.functional_call(module, dict(state), positional, keywords))

    given, others = ([_renamed(space, canonical) for space in group] for group in (spaces, none))
    return prove_state(given, state, evaluate, seed, tolerance, others)


def prove_state(
    spaces: Sequence[Space],
    state: State,
    evaluate: Evaluate,
    seed: int = 0,
    tolerance: float = 1e-9,
    none: Sequence[Space] = (),
) -> list[Finding]:
    """Prove spaces on whatever `evaluate` makes of a state dict like `state`, whose numbers are drawn anew.

    One finding for each space in their order, with more than one space one for all together, and one for each of
    `none`: what must be no space, as the coordinates that a rotary embedding ties to frequencies. InputError where a
    space names a tensor or a place that is not there, or the network gives nothing finite.
    """
    _check([*spaces, *none], {name: tuple(tensor.shape) for name, tensor in state.items()})
    trial = _Trial(state, evaluate, seed, tolerance)
    found = [trial.space(space) for space in spaces]
    if len(spaces) > 1:
        found.append(trial.together(spaces))
    return found + [trial.tied(space) for space in none]


def coordinates(spaces: Sequence[Space]) -> tuple[Space, ...]:
    """For every space of heads the coordinates of its heads, with the same permutation in each head along all uses.

    It leaves value and output as they are together, and query and key only where no rotary embedding ties their
    coordinates to frequencies. Nothing where a space of kind `qk` says that all coordinates of a head are free.
    """
    free = max((space.size for space in spaces if space.kind == "qk"), default=0)
    found = []
    for space in spaces:
        width = min((use.block for use in space.uses), default=1)
        if space.kind == "heads" and space.parent is None and width > max(free, 1):
            uses = []
            for use in space.uses:
                end = use.start + (space.groups if use.grouped else space.size) * use.block
                starts = range(use.start, end, width)
                uses += [replace(use, block=1, start=start, grouped=False) for start in starts]
            found.append(Space(f"{space.name}.coordinates", "coordinates", width, tuple(uses)))
    return tuple(found)


def floating(outputs: Any) -> list[Tensor]:
    """All floating tensors in a nest of outputs."""
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


class _Trial:
    """One network with random weights, and what permutations do to it."""

    def __init__(self, state: State, evaluate: Evaluate, seed: int, tolerance: float):
        self._random = np.random.default_rng(seed)
        self._state = {name: self._drawn(state[name]) for name in sorted(state)}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        self._evaluate, self._tolerance = evaluate, tolerance
        self._outputs = [output.clone() for output in evaluate(self._state)]
        if not self._outputs or not all(bool(output.isfinite().all()) for output in self._outputs):
            raise InputError(Problem("the network gives no finite output, so nothing can be proved with it"))

    def space(self, space: Space) -> Finding:
        order = self._order(space)
        change = self._change([space], {space.name: order})
        alone = list(_alone(space))
        idle = tuple(
            name for name, part in alone if len(alone) > 1 and self._still(self._change([part], {part.name: order}))
        )
        if not change <= self._tolerance:
            detail = f"permuting it changes the outputs by {change:.1e} of their spread"
            return Finding(space.name, "fail", detail, change, idle)
        if len(alone) > 1 and len(idle) == len(alone):
            detail = "no tensor of it has an effect on the outputs, so nothing is proved"
            return Finding(space.name, "fail", detail, change, idle)
        return Finding(space.name, "ok", f"outputs unchanged ({change:.0e})", change, idle)

    def together(self, spaces: Sequence[Space]) -> Finding:
        change = self._change(spaces, {space.name: self._order(space) for space in spaces})
        if not change <= self._tolerance:
            detail = f"permuting every space at once changes the outputs by {change:.1e} of their spread"
            return Finding(TOGETHER, "fail", detail, change)
        return Finding(TOGETHER, "ok", f"outputs unchanged ({change:.0e})", change)

    def tied(self, space: Space) -> Finding:
        """That this space, which nobody claims, is none."""
        change = self._change([space], {space.name: self._order(space)})
        if self._still(change):
            return Finding(space.name, "warn", "may change places as well: no space says so", change)
        return Finding(space.name, "ok", f"keep their places: moving them changes the outputs ({change:.0e})", change)

    def _still(self, change: float) -> bool:
        return change <= 10 * self._tolerance

    def _change(self, spaces: Sequence[Space], orders: Mapping[str, Order]) -> float:
        made = moves(spaces, orders, self._shapes)
        state = {name: permuted(made[name], self._state[made[name].source]) if name in made else tensor
                 for name, tensor in self._state.items()}  # fmt: skip
        outputs = self._evaluate({name: tensor.contiguous() for name, tensor in state.items()})
        return max(_distance(a, b) for a, b in zip(self._outputs, outputs, strict=True))

    def _order(self, space: Space) -> Order:
        """A random member of the space's group. Something moves, and where there are several groups, a group does."""
        while True:
            groups = self._random.permutation(space.groups)
            within = [self._random.permutation(space.group) for _ in groups]
            order = np.concatenate([group * space.group + p for group, p in zip(groups, within, strict=True)])
            if not is_identity(order) and (space.groups == 1 or not is_identity(group_order(space, order))):
                return order.astype(np.int64)

    def _drawn(self, tensor: Any) -> Any:
        """A tensor like this one: matrices that keep the size of what they multiply, vectors near what they were.

        Running variances and the like, which are positive, stay so.
        """
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor.double()
        noise: Tensor = torch.from_numpy(np.asarray(self._random.standard_normal(tuple(tensor.shape))))
        if tensor.dim() > 1:
            return noise / max(1, tensor[0].numel()) ** 0.5
        return tensor * noise.clamp(-2, 2).mul(0.25).exp() if bool((tensor > 0).all()) else tensor + 0.3 * noise


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the spread of `a`; infinite where `b` is not finite."""
    if a.shape != b.shape or not bool(b.isfinite().all()):
        return float("inf")
    if not a.numel():
        return 0.0
    # Outputs that differ by rounding alone have no spread of their own.
    spread = max(float(a.std(correction=0)), 1e-3 * float(a.abs().max()))
    return float((a - b).abs().max()) / (spread or 1.0)


def _alone(space: Space) -> Iterator[tuple[str, Space]]:
    """The space as it would be with one tensor only, for each of its tensors."""
    for tensor in dict.fromkeys(use.tensor for use in space.uses):
        uses = tuple(use for use in space.uses if use.tensor == tensor)
        yield tensor, replace(space, uses=uses, renames=())
    for names in space.renames:
        yield names[0], replace(space, uses=(), renames=(names,))


def _check(spaces: Sequence[Space], shapes: Mapping[str, tuple[int, ...]]) -> None:
    problems = []
    for space in spaces:
        for use in space.uses:
            shape = shapes.get(use.tensor)
            end = use.start + (space.groups if use.grouped else space.size) * use.block
            if shape is None:
                problems.append(Problem(f"`{space.name}` uses `{use.tensor}`, which the network does not have"))
            elif use.axis >= len(shape) or end > shape[use.axis]:
                text = f"`{space.name}` reaches to place {end} of axis {use.axis} of `{use.tensor}` of shape {shape}"
                problems.append(Problem(text))
        missing = [name for names in space.renames for name in names if name not in shapes]
        problems += [Problem(f"`{space.name}` moves `{name}`, which the network does not have") for name in missing]
    if problems:
        raise InputError(problems)


def _renamed(space: Space, names: Mapping[str, str]) -> Space:
    """The space with the first name of each tensor, each use once."""
    uses = dict.fromkeys(replace(use, tensor=names.get(use.tensor, use.tensor)) for use in space.uses)
    renames = tuple(tuple(names.get(name, name) for name in group) for group in space.renames)
    return replace(space, uses=tuple(uses), renames=tuple(dict.fromkeys(renames)))


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

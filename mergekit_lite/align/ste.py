"""Permutations learnt by the loss of the merged network: the straight-through estimator. For small networks, which are
held in memory and matched anew at every step.

Git Re-Basin, ICLR 2023, arXiv 2209.04836, for two networks; Ito et al., ICML 2025, PMLR 267, for many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from mergekit_lite.align.apply import Order, moves, permuted
from mergekit_lite.align.assign import Assign, assignment
from mergekit_lite.align.many import match_many
from mergekit_lite.align.match import match, nothing
from mergekit_lite.errors import InputError
from mergekit_lite.family.spaces import Space
from mergekit_lite.lazy import Tensor, torch

State = Mapping[str, Tensor]
Loss = Callable[[State], Tensor]
Score = Callable[[State], "float | Tensor"]


@dataclass(frozen=True)
class Learnt:
    """The permutations of the second network with the least score, that score, and the step after which they came.
    `scores` are those of all steps; the first is that of weight matching, which nothing was learnt for."""

    permutations: dict[str, Order]
    score: float
    step: int
    scores: tuple[float, ...]


@dataclass(frozen=True)
class LearntMany:
    """The same for each of many networks; those of the first stay as they are."""

    permutations: list[dict[str, Order]]
    score: float
    step: int
    scores: tuple[float, ...]


def ste(
    reference: State,
    model: State,
    spaces: Sequence[Space],
    loss: Loss,
    *,
    kinds: Collection[str] = ("mlp",),
    lr: float = 0.1,
    momentum: float = 0.9,
    steps: int = 100,
    validation: Score | None = None,
    seed: int = 0,
    assign: Assign = assignment,
    check: Callable[[], None] = nothing,
) -> Learnt:
    """The permutations of `model` for which the mean of the two networks has the least loss.

    A shadow network starts as a copy of `reference`. At each step `model` is matched to it (weight matching, from the
    permutations before), and `loss` is taken of the mean of `reference` and the permuted model; its gradient moves the
    shadow (SGD at rate `lr`). `loss` takes a state dict and gives a scalar to differentiate, such as the cross-entropy
    of `torch.func.functional_call` on a batch of training data, another one each time; floating tensors come in float32
    (float64 if they are). `validation` gives the score on held-out data that the best permutations are chosen by;
    without it that is the loss of each step, on its own batch.

    Raises InputError where the networks have not the same tensors.
    """
    search = _Search([reference, model], spaces, kinds, seed, assign, check)
    first = search.matched(search.models[0], 1, None)
    shadows = [dict(search.models[0])]

    def optimizer(tensors: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(tensors, lr=lr, momentum=momentum)

    found = search.run([{}, first], shadows, optimizer, loss, validation, steps, mixed=False)
    return Learnt(found.permutations[1], found.score, found.step, found.scores)


def ste_many(
    models: Sequence[State],
    spaces: Sequence[Space],
    loss: Loss,
    *,
    kinds: Collection[str] = ("mlp",),
    lr: float = 0.01,
    steps: int = 100,
    validation: Score | None = None,
    mixed: bool = False,
    seed: int = 0,
    assign: Assign = assignment,
    check: Callable[[], None] = nothing,
) -> LearntMany:
    """The same for two or more networks at once, in the order of the first.

    Every network but the first has a shadow, which starts as the mean of all after `merge_many`. `loss` is taken of
    their mean or, if `mixed`, of a mixture with random weights at each step; Adam at rate `lr` moves the shadows.
    `validation` always sees the mean. Without it, and if `mixed`, the loss of the mean is taken once more at each step,
    to choose by.
    """
    search = _Search(models, spaces, kinds, seed, assign, check)
    matched = match_many(
        spaces,
        [model.__getitem__ for model in search.models],
        shapes=search.shapes,
        kinds=kinds,
        seed=seed,
        assign=assign,
    )
    start = [{}, *matched.permutations[1:]]
    middle = search.mean(start)

    def optimizer(tensors: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(tensors, lr=lr)

    shadows = [dict(middle) for _ in models[1:]]
    return search.run(start, shadows, optimizer, loss, validation, steps, mixed=mixed)


class _Search:
    def __init__(
        self,
        models: Sequence[State],
        spaces: Sequence[Space],
        kinds: Collection[str],
        seed: int,
        assign: Assign,
        check: Callable[[], None],
    ):
        self.shapes = {name: tuple(tensor.shape) for name, tensor in models[0].items()}
        for number, model in enumerate(models[1:], start=2):
            if {name: tuple(tensor.shape) for name, tensor in model.items()} != self.shapes:
                raise InputError(
                    f"model {number} has other tensors than model 1", hint="names and shapes must be the same"
                )
        self.models = [{name: _real(tensor) for name, tensor in model.items()} for model in models]
        self._spaces, self._kinds, self._seed, self._assign, self._check = spaces, kinds, seed, assign, check
        self._learnt = [name for name, tensor in self.models[0].items() if tensor.is_floating_point()]
        self._scores: dict[bytes, float] = {}

    def matched(self, to: State, number: int, start: Mapping[str, Order] | None) -> dict[str, Order]:
        """The permutations of one model that bring it closest to a network, found from others."""
        return match(
            self._spaces,
            to.__getitem__,
            self.models[number].__getitem__,
            shapes=self.shapes,
            kinds=self._kinds,
            seed=self._seed,
            check=self._check,
            assign=self._assign,
            start=start,
            anchored=start is None,
        ).permutations

    def mean(self, permutations: Sequence[Mapping[str, Order]]) -> dict[str, Tensor]:
        return self._mixture(permutations, [1 / len(self.models)] * len(self.models))

    def _mixture(self, permutations: Sequence[Mapping[str, Order]], weights: Sequence[float]) -> dict[str, Tensor]:
        """The weighted sum of the permuted models. What is no floating tensor is the first model's."""
        found = dict(self.models[0])
        each = [moves(self._spaces, p, self.shapes) for p in permutations]
        for name in self._learnt:
            found[name] = torch.zeros_like(found[name])
            for model, moved, weight in zip(self.models, each, weights, strict=True):
                own = permuted(moved[name], model[moved[name].source]) if name in moved else model[name]
                found[name] += weight * own
        return found

    def run(
        self,
        permutations: Sequence[dict[str, Order]],
        shadows: Sequence[dict[str, Tensor]],
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        loss: Loss,
        validation: Score | None,
        steps: int,
        *,
        mixed: bool,
    ) -> LearntMany:
        generator = torch.Generator().manual_seed(self._seed)
        for shadow in shadows:
            shadow.update({name: shadow[name].detach().clone().requires_grad_() for name in self._learnt})
        moving = optimizer([shadow[name] for shadow in shadows for name in self._learnt])
        now, best, chosen, scores = list(permutations), math.inf, 0, list[float]()
        kept = now
        for step in range(steps + 1):
            self._check()
            weights = [1 / len(self.models)] * len(self.models)
            if mixed:
                drawn = -torch.rand(len(weights), generator=generator, dtype=torch.float64).clamp(min=1e-300).log()
                weights = [float(part) for part in drawn / drawn.sum()]
            state = self._mixture(now, weights)
            for shadow, weight in zip(shadows, weights[1:], strict=True):
                for name in self._learnt:
                    state[name] = state[name] + weight * (shadow[name] - shadow[name].detach())
            value = loss(state)
            # Without held-out data and without a mixture, the loss just taken is that of the mean.
            judge = validation or (loss if mixed else None)
            scores.append(float(value.detach()) if judge is None else self._score(now, judge, validation is not None))
            if scores[-1] < best:
                best, chosen, kept = scores[-1], step, list(now)
            if step < steps:
                moving.zero_grad()
                value.backward()
                moving.step()
                with torch.no_grad():
                    for number, shadow in enumerate(shadows, start=1):
                        now[number] = self.matched(shadow, number, now[number])
        return LearntMany(kept, best, chosen, tuple(scores))

    def _score(self, now: Sequence[Mapping[str, Order]], judge: Score, same: bool) -> float:
        """What permutations are chosen by. Where `judge` gives the `same` score for the same ones, it is asked once."""
        key = b"".join(p[name].tobytes() for p in now for name in sorted(p))
        if not same or key not in self._scores:
            with torch.no_grad():
                self._scores[key] = float(judge(self.mean(now)))
        return self._scores[key]


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

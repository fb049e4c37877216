"""Weights that are learned: how many there are, what they are made of, and how a recipe writes them.

A learned soup (Wortsman et al., ICML 2022, arXiv 2203.05482) has w = softmax(a) over its inputs, AdaMerging (Yang et
al., ICLR 2024, arXiv 2310.02575) a factor for every task vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergekit_lite.errors import Problem, RecipeError
from mergekit_lite.evaluate.template import Template
from mergekit_lite.family.family import Family
from mergekit_lite.plan.outputs import saved_name
from mergekit_lite.recipe.holes import Hole
from mergekit_lite.recipe.learned import Learning
from mergekit_lite.recipe.model import Step

EPOCHS, SOUP_RATE = 5, 0.05  # of the learned soups that were published
STEPS, FACTOR_RATE = 500, 1e-3  # of AdaMerging
METHODS = ("linear", "task_arithmetic")
_METHODS = "weights are learned of `use: linear`, a soup, or of `use: task_arithmetic`"


@dataclass(frozen=True, slots=True)
class Open:
    """The step whose weights are to be learned. `factor` is that of the sum of task vectors, None: it is a soup."""

    hole: Hole
    step: Step
    learning: Learning
    factor: float | None

    @property
    def rate(self) -> float:
        return self.learning.rate or (SOUP_RATE if self.factor is None else FACTOR_RATE)

    def epochs(self, steps: int) -> int:
        """How often learning goes through data that make so many steps."""
        return self.learning.epochs or (EPOCHS if self.factor is None else math.ceil(STEPS / max(1, steps)))


def open_step(template: Template) -> Open:
    """What a template leaves to be learned. Raises RecipeError where it leaves no weights open, where its method is no
    weighted sum or its sum is not what is saved, and where a score is stated, which nothing would ask for."""
    hole, recipe = template.learned, template.first
    if hole is None or not isinstance(hole.learning, Learning):
        hint = "for example `of: {learned: [a, b, c], by: layer}`"
        raise RecipeError(Problem(f"`{template.file}` leaves no weights to be learned", None, hint))
    name = hole.path.removeprefix("steps.").removesuffix(".of").strip('"')
    step = recipe.steps[name]
    problems = []
    if step.use not in METHODS:
        problems.append(Problem(f"`{step.use}` is no weighted sum of its inputs", step.use_mark, _METHODS))
    if template.scores:
        hint = "leave it out; data are given by `--text` or `--data`, in Python by a loss"
        problems.append(Problem("weights are learned from data, not by a score", template.scores[0].mark, hint))
    if len(recipe.saves) != 1 or saved_name(recipe, recipe.saves[0]) != name:
        mark = recipe.saves[-1].mark
        problems.append(Problem(f"weights of `{name}` are learned where it is what is saved", mark, "save it alone"))
    if recipe.saves[0].tokenizer is not None:
        hint = "bring the models to one vocabulary first, by a recipe of its own"
        problems.append(Problem("weights are learned of models of one vocabulary", recipe.saves[0].mark, hint))
    if "weight" in step.params:
        problems.append(Problem("`weight` is what is learned", step.params["weight"].mark, "leave it out"))
    factor = None if step.use == "linear" else _factor(step, problems)
    if problems:
        raise RecipeError(problems)
    return Open(hole, step, hole.learning, factor)


def _factor(step: Step, problems: list[Problem]) -> float:
    given = step.params.get("lambda")
    if given is None:
        return 1.0  # another method, or a fault that is told already
    value = given.rules[0].value if given.constant else None
    normalize = step.params.get("normalize")
    if normalize is not None and any(value for value, _ in normalize.scalars()):
        hint = "leave it out: each task vector has a factor of its own"
        problems.append(Problem("learned weights are not normalised", normalize.mark, hint))
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value != 0:
        return float(value)
    hint = "it is where all weights begin, for example `lambda: 0.3`"
    problems.append(Problem("`lambda` must be one number other than 0 here", given.mark, hint))
    return 1.0


class Weights:
    """The weights of every group of tensors: as free numbers `raw` (groups, inputs) in float64, as the recipe writes
    them, and as factors of the inputs."""

    def __init__(self, opened: Open, names: Sequence[str], family: Family):
        self._factor, self._inputs = opened.factor, len(opened.step.of)
        self.groups: dict[str, list[str]] = {}
        for name in names:
            self.groups.setdefault(_group(name, opened.learning.by, family), []).append(name)
        start = 0.0 if self._factor is None else self._factor
        self.raw = torch.full((len(self.groups), self._inputs), start, dtype=torch.float64)

    def written(self) -> dict[str, list[float]]:
        """By group, one for each input: as a step's `weight`."""
        found = self.raw.softmax(dim=1) if self._factor is None else self.raw / self._factor
        return dict(zip(self.groups, found.tolist(), strict=True))

    def factors(self) -> dict[str, list[float]]:
        """By tensor, one for each input: what the merge multiplies them by."""
        found: dict[str, list[float]] = {}
        for group, weights in self.written().items():
            if self._factor is None:
                total = math.fsum(weights)  # as `linear` does it, to the bit
                weights = [weight / total for weight in weights]
            else:
                weights = [weight * self._factor for weight in weights]
            found |= dict.fromkeys(self.groups[group], weights)
        return found

    def gradient(self, products: Mapping[str, Sequence[float]]) -> Tensor:
        """dL/d raw from the inner products of dL/d theta with the inputs, or their task vectors, by tensor. Tensors
        that are left out have no gradient.

        The softmax s of a soup gives dL/da_i = s_i (<g, theta_i> - sum_j s_j <g, theta_j>).
        """
        sums = torch.tensor(
            [
                [math.fsum(products[name][i] for name in names if name in products) for i in range(self._inputs)]
                for names in self.groups.values()
            ],
            dtype=torch.float64,
        )
        if self._factor is not None:
            return sums
        share = self.raw.softmax(dim=1)
        return share * (sums - (share * sums).sum(dim=1, keepdim=True))


def of_value(inputs: Sequence[Any], weights: Mapping[str, Sequence[float]], start: float) -> list[dict[str, Any]]:
    """The `of` of a step whose inputs have these weights; `start` is for tensors that no group holds."""

    def one(i: int) -> Any:
        if list(weights) == [""]:
            return weights[""][i]
        return {**{group: values[i] for group, values in weights.items()}, "else": start}

    return [{"model": name, "weight": one(i)} for i, name in enumerate(inputs)]


def _group(name: str, by: str, family: Family) -> str:
    """What a tensor shares its weights with, as a glob: nothing, its layer, or all tensors (`""`)."""
    if by == "model":
        return ""
    layer = family.layer(name) if by == "layer" else None
    text = name if layer is None else f"{layer.prefix}{layer.index}."
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in text) + ("" if layer is None else "*")

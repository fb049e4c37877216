"""Weights of a merge learned by the gradient of a loss: learned soups and AdaMerging.

In memory are the merged tensors and their gradient. The models themselves are read again for each step: once for the
sum, once for the inner products that turn the gradient by tensors into one by weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mergekit_lite.errors import StoppedError
from mergekit_lite.evaluate.ingredients import Ingredients
from mergekit_lite.evaluate.loss import Objective
from mergekit_lite.evaluate.search import BEST, replace_file
from mergekit_lite.evaluate.template import Template
from mergekit_lite.evaluate.weights import Open, Weights, of_value
from mergekit_lite.evaluate.worker import make_folder
from mergekit_lite.family.family import family_of
from mergekit_lite.limits import hint_for
from mergekit_lite.recipe.holes import setting
from mergekit_lite.recipe.model import Recipe
from mergekit_lite.recipe.write import to_yaml

LEARNED = "learned.json"


@dataclass(frozen=True, slots=True)
class Learned:
    """What was learned. `weights` are those of each input of `inputs`, in that order, by the glob of the tensors that
    share them, `""` where all do. `before` and `after` are the loss over all data with the weights as they began and as
    they are, `epochs` its means in the course of learning; `better` is False where they are as they began, since
    learning had not lowered the loss. `recipe` has nothing left open, `text` is its file."""

    inputs: tuple[str, ...]
    weights: dict[str, tuple[float, ...]]
    before: float
    after: float
    epochs: tuple[float, ...]
    better: bool
    recipe: Recipe
    text: str

    def as_json(self) -> dict[str, Any]:
        """The outcome as plain data."""
        return {
            "inputs": list(self.inputs),
            "weights": {group or "*": list(values) for group, values in self.weights.items()},
            "before": self.before,
            "after": self.after,
            "epochs": list(self.epochs),
            "better": self.better,
            "recipe": self.text,
        }


class Learning:
    """The weights of `opened` on their way. `per_step` units of data make a step of Adam; their order is drawn anew for
    each epoch from the recipe's seed."""

    def __init__(
        self, template: Template, opened: Open, ingredients: Ingredients, objective: Objective, per_step: int = 1
    ):
        self._template, self._opened, self._ingredients, self._objective = template, opened, ingredients, objective
        self._per_step = per_step
        donor = ingredients.plan.checkpoints[ingredients.plan.outputs[0].donor]
        family = family_of(donor.config, ingredients.shapes, donor.configs)
        self.weights = Weights(opened, list(ingredients.shapes), family)
        self.epochs = opened.epochs(math.ceil(objective.units / per_step))

    def run(self, told: Callable[[float], None] = lambda loss: None) -> Learned:
        """Learn; `told` hears of the mean loss of every epoch. Raises StoppedError where the loss is not finite, and
        what the objective and the source raise."""
        weights, objective = self.weights, self._objective
        began = weights.raw.clone()
        before = self._whole()
        if not math.isfinite(before):
            hint = "look at the data, and at the merge with equal weights"
            raise StoppedError(f"the loss is {before} before anything is learned", hint=hint)
        # Without decay AdamW is Adam.
        adam = torch.optim.Adam([weights.raw, *objective.also], lr=self._opened.rate)
        draw = torch.Generator().manual_seed(self._template.first.seed)
        losses = []
        for epoch in range(self.epochs):
            order = torch.randperm(objective.units, generator=draw).tolist()
            seen = 0.0
            for at in range(0, len(order), self._per_step):
                units = order[at : at + self._per_step]
                seen += self._step(adam, units, epoch) * len(units)
            losses.append(seen / len(order))
            told(losses[-1])
        after = self._whole()
        better = after <= before
        if not better:
            weights.raw, after = began, before
        return self._learned(before, after, losses, better)

    def _step(self, adam: torch.optim.Optimizer, units: Sequence[int], epoch: int) -> float:
        self._mix()
        loss, slopes = self._objective.slopes(units)
        gradient = self.weights.gradient(self._ingredients.products(slopes))
        if not (math.isfinite(loss) and bool(gradient.isfinite().all())):
            hint = "a smaller `rate` beside `learned`"
            raise StoppedError(f"the loss is {loss} in epoch {epoch + 1}, or its gradient is not finite", hint=hint)
        self.weights.raw.grad = gradient
        adam.step()
        return loss

    def _mix(self) -> None:
        self._ingredients.mix(self.weights.factors(), self._objective.tensors)

    def _whole(self) -> float:
        self._mix()
        return self._objective.loss(range(self._objective.units))

    def _learned(self, before: float, after: float, losses: Sequence[float], better: bool) -> Learned:
        hole, template = self._opened.hole, self._template
        inputs, written = tuple(hole.values), self.weights.written()
        start = 1 / len(inputs) if self._opened.factor is None else 1.0
        recipe = template.fill([setting(hole.path, of_value(inputs, written, start))])
        recipe = replace(recipe, scores=())
        words = f"loss {after:.6g}, {before:.6g} at the start, {len(losses)} epochs of the data"
        head = "".join(sign if sign.isprintable() else " " for sign in f"# Learned by `merge search {template.file}`: ")
        text = f"{head}{words}.\n{to_yaml(recipe)}"
        weights = {group: tuple(values) for group, values in written.items()}
        return Learned(inputs, weights, before, after, tuple(losses), better, recipe, text)


def keep(folder: Path, learned: Learned) -> None:
    """Write the recipe and what is to be said of it. Raises StoppedError where the disk refuses."""
    make_folder(folder)
    try:
        replace_file(folder / LEARNED, json.dumps(learned.as_json(), indent=1) + "\n")
        replace_file(folder / BEST, learned.text)
    except OSError as fault:
        raise StoppedError(f"cannot write into `{folder}`: {fault.strerror}", hint=hint_for(fault)) from fault

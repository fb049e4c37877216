"""Permutations of a permute step learned by the gradient of a loss (`align.ste`), from data.

Both networks, their mean, the shadow of one and its gradient are in memory: it is for small networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mergekit_lite.align.file import to_bytes
from mergekit_lite.align.match import moved_share
from mergekit_lite.align.ste import Learnt, State, ste
from mergekit_lite.errors import Problem, RecipeError, StoppedError
from mergekit_lite.evaluate.ingredients import Ingredients
from mergekit_lite.evaluate.loss import Objective
from mergekit_lite.evaluate.search import BEST, replace_file
from mergekit_lite.evaluate.template import PERMUTATIONS, Template
from mergekit_lite.evaluate.worker import make_folder
from mergekit_lite.limits import hint_for
from mergekit_lite.plan.model import Alignment
from mergekit_lite.plan.outputs import saved_name
from mergekit_lite.recipe.holes import Hole, setting
from mergekit_lite.recipe.learned import LearningOrder
from mergekit_lite.recipe.model import Input, Recipe, Step
from mergekit_lite.recipe.value import Value
from mergekit_lite.recipe.write import to_yaml

_MEAN = "for example `mean: {use: linear, of: [a, moved]}`, where `moved` permutes `b`, and save that"
_SETTINGS = ("from", "spaces", "seed", "family")


@dataclass(frozen=True, slots=True)
class OpenOrder:
    """The permute step whose permutations are to be learned, and the step that takes the mean of what it gives and the
    network that stays, its input number `stays`."""

    hole: Hole
    step: Step
    mean: Step
    stays: int
    learning: LearningOrder


@dataclass(frozen=True, slots=True)
class LearnedOrder:
    """What was learned. `before` is the loss over all data with the permutations of weight matching, `after` with those
    found after `step` of `steps`, 0 where none were better; `moved` is the share of units that leave their place, by
    space. `recipe` has nothing left open, `text` is its file."""

    before: float
    after: float
    step: int
    steps: int
    moved: dict[str, float]
    recipe: Recipe
    text: str

    def as_json(self) -> dict[str, Any]:
        """The outcome as plain data."""
        names = ("before", "after", "step", "steps", "moved")
        return {**{name: getattr(self, name) for name in names}, "recipe": self.text}


def open_order(template: Template) -> OpenOrder:
    """What a template leaves to be learned. Raises RecipeError where it leaves no permutations open, where what is
    saved is not the mean of two networks, one of them permuted, and for settings that learning has no use for."""
    hole, recipe = template.order, template.first
    if hole is None or not isinstance(hole.learning, LearningOrder):
        hint = "for example `with: {from: {learned: ste}}` of a permute step"
        raise RecipeError(Problem(f"`{template.file}` leaves no permutations to be learned", None, hint))
    name = hole.path.removeprefix("steps.").removesuffix(".with.from").strip('"')
    step = recipe.steps[name]
    problems = [
        Problem(f"`{key}` does not go with permutations that are learned", value.mark, "leave it out")
        for key, value in step.params.items()
        if key not in _SETTINGS
    ]
    if template.scores:
        hint = "leave it out; data are given by `--text` or `--data`"
        problems.append(Problem("permutations are learned from data, not by a score", template.scores[0].mark, hint))
    save = recipe.saves[0]
    mean = recipe.steps.get(saved_name(recipe, save))
    if len(recipe.saves) != 1 or save.lora is not None or save.masks is not None or save.tokenizer is not None:
        message = "permutations are learned where one model is saved, in the vocabulary that it has"
        problems.append(Problem(message, recipe.saves[-1].mark, _MEAN))
    names = [item.ref.name for item in mean.of] if mean is not None else []
    others = [read.name for read in recipe.steps.values() if name in [item.ref.name for item in read.of]]
    if mean is None or mean.use != "linear" or len(names) != 2 or names.count(name) != 1 or others != [mean.name]:
        message = f"what is saved must be the mean of two networks, `{name}` and another"
        problems.append(Problem(message, save.mark if mean is None else mean.use_mark, _MEAN))
    elif mean.params or any(item.params for item in mean.of):
        message = "permutations are learned by the plain mean, without settings"
        problems.append(Problem(message, mean.use_mark, "leave out its weights; another merge may use the file later"))
    if problems or mean is None:
        raise RecipeError(problems)
    return OpenOrder(hole, step, mean, 1 - names.index(name), hole.learning)


def matching(recipe: Recipe, opened: OpenOrder) -> Recipe:
    """The recipe with weight matching in place of learning."""
    params = {key: value for key, value in opened.step.params.items() if key != "from"}
    like = opened.mean.of[opened.stays].ref
    step = replace(opened.step, params={**params, "like": Value.plain(like.name, like.mark)})
    return replace(recipe, steps={**recipe.steps, step.name: step})


def unmoved(recipe: Recipe, opened: OpenOrder) -> tuple[Recipe, Step]:
    """The recipe, and its mean, without the permute step."""
    items = [Input(opened.step.of[0].ref) for _ in opened.mean.of]
    items[opened.stays] = opened.mean.of[opened.stays]
    mean = replace(opened.mean, of=tuple(items))
    steps = {name: step for name, step in recipe.steps.items() if name != opened.step.name}
    return replace(recipe, steps={**steps, mean.name: mean}), mean


class _Bridge(torch.autograd.Function):
    """An objective as a function that autograd knows."""

    @staticmethod
    def forward(ctx: Any, objective: Objective, units: Sequence[int], names: Sequence[str], *tensors: Tensor) -> Tensor:
        _put(objective, dict(zip(names, tensors, strict=True)))
        value, slopes = objective.slopes(units)
        ctx.slopes = [slopes.get(name) for name in names]
        return torch.tensor(value, dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        (by,) = outer
        slopes = [None if slope is None else slope * by.to(slope.dtype) for slope in ctx.slopes]
        return (None, None, None, *slopes)


def bridged(objective: Objective, state: Mapping[str, Tensor], units: Sequence[int]) -> Tensor:
    """The loss of a state dict over these units, a scalar in float64 that may be differentiated once."""
    return cast(Tensor, _Bridge.apply(objective, units, list(state), *state.values()))  # type: ignore[no-untyped-call]


def _put(objective: Objective, state: Mapping[str, Tensor]) -> None:
    for name, place in objective.tensors.items():
        place.copy_(state[name])


def learned_order(
    template: Template,
    opened: OpenOrder,
    alignment: Alignment,
    ingredients: Ingredients,
    objective: Objective,
    per_step: int,
    told: Callable[[], None] = lambda: None,
) -> Learnt:
    """The permutations with the least loss over all data. `alignment` is that of `matching`, `ingredients` are of
    `unmoved`. Each step takes `per_step` units of the data, drawn by the recipe's seed. Raises StoppedError where the
    loss is not finite, and what the objective and the source raise."""
    draw = torch.Generator().manual_seed(template.first.seed)
    states = []
    for number in range(2):
        states.append(ingredients.empty())
        ingredients.mix({name: [1.0 - number, float(number)] for name in ingredients.shapes}, states[-1])
    reference, model = states[opened.stays], states[1 - opened.stays]

    def loss(state: State) -> Tensor:
        told()
        units = torch.randperm(objective.units, generator=draw)[:per_step].tolist()
        return _finite(bridged(objective, state, units))

    def score(state: State) -> Tensor:
        _put(objective, state)
        return _finite(torch.tensor(objective.loss(range(objective.units)), dtype=torch.float64))

    learning = opened.learning
    return ste(
        reference,
        model,
        alignment.spaces,
        loss,
        kinds=alignment.kinds,
        lr=learning.rate,
        steps=learning.steps,
        validation=score,
        seed=dict(alignment.params)["seed"],
    )


def _finite(loss: Tensor) -> Tensor:
    if not math.isfinite(float(loss.detach())):
        hint = "look at the data, and at the merge with `like` in place of `from`"
        raise StoppedError(f"the loss is {float(loss.detach())}", hint=hint)
    return loss


def keep(folder: Path, template: Template, opened: OpenOrder, found: Learnt) -> LearnedOrder:
    """Write the permutations and the recipe that takes them. Raises StoppedError where the disk refuses."""
    moved, steps = moved_share(found.permutations), opened.learning.steps
    recipe = replace(template.fill([setting(opened.hole.path, str(folder / PERMUTATIONS))]), scores=())
    words = f"loss {found.score:.6g}, {found.scores[0]:.6g} by weight matching, step {found.step} of {steps}"
    head = "".join(sign if sign.isprintable() else " " for sign in f"# Learned by `merge search {template.file}`: ")
    text = f"{head}{words}.\n{to_yaml(recipe)}"
    learned = LearnedOrder(found.scores[0], found.score, found.step, steps, moved, recipe, text)
    figures = {"before": learned.before, "after": learned.after, "step": found.step, "steps": steps, "moved": moved}
    make_folder(folder)
    try:
        replace_file(folder / PERMUTATIONS, to_bytes(found.permutations, figures))
        replace_file(folder / BEST, text)
    except OSError as fault:
        raise StoppedError(f"cannot write into `{folder}`: {fault.strerror}", hint=hint_for(fault)) from fault
    return learned

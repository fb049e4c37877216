"""How models and steps refer to one another: cycles, steps that nobody uses, the step that a recipe ends with."""

from __future__ import annotations

import graphlib
from collections.abc import Mapping, Sequence

from mergekit_lite.errors import Mark, Problem, RecipeError
from mergekit_lite.recipe.model import Recipe, Ref, Step
from mergekit_lite.recipe.value import Value

_MOST_CYCLES = 100


def references(step: Step) -> list[Ref]:
    """What `step` surely names: its inputs, `base`, `rest`, `below`, `above` and `like`. Other settings are plain text
    here."""
    found = [item.ref for item in step.of]
    found += [ref for ref in (step.base, step.rest, step.below, step.above) if ref is not None]
    like = step.params.get("like")
    if like is not None and like.constant and isinstance(like.rules[0].value, str):
        found.append(Ref(like.rules[0].value, like.mark))
    return found


def mentions(params: Mapping[str, Value]) -> set[str]:
    """Every text in the settings; which of them name a step, only the method knows."""
    return {scalar for value in params.values() for scalar, _ in value.scalars() if isinstance(scalar, str)}


def unused_steps(recipe: Recipe) -> list[str]:
    """The steps whose results go nowhere: no other step uses them and no save writes them. The plan warns of these.

    A step that another one mentions in its settings counts as used. Raises RecipeError as `final_step` does.
    """
    used = {name for step in recipe.steps.values() for name in _used_by(step)}
    for save in recipe.saves:
        used.add(save.step.name if save.step else final_step(recipe))
        used |= {ref.name for ref in save.beside}
    return [name for name in recipe.steps if name not in used]


def final_step(recipe: Recipe) -> str:
    """The name of the step that a save without `step` writes: the only one that no other uses.

    Raises RecipeError, naming the candidates, where none or several are unused.
    """
    ends = ends_of(
        {name: [ref.name for ref in references(step)] for name, step in recipe.steps.items()},
        {name: mentions(step.params) for name, step in recipe.steps.items()},
    )
    if len(ends) == 1:
        return ends[0]
    mark = next((save.mark for save in recipe.saves if save.step is None), None)
    raise RecipeError(no_single_end(ends, mark))


def ends_of(uses: Mapping[str, Sequence[str]], mentioned: Mapping[str, set[str]]) -> list[str]:
    """The steps that no other uses, in the order of the text: at least one where there are steps and no cycles.

    `uses` maps each step to the names it refers to, `mentioned` to the texts in its settings. The latter decide only
    where the former leave several ends, so that a word such as `largest` cannot hide a step of that name.
    """
    used = {name for step, names in uses.items() for name in names if name != step}
    ends = [step for step in uses if step not in used]
    if len(ends) > 1:
        named = {name for step, names in mentioned.items() for name in names if name != step}
        ends = [step for step in ends if step not in named] or ends
    return ends


def no_single_end(ends: Sequence[str], mark: Mark | None) -> Problem:
    """The finding that a save without `step` cannot tell what to write."""
    if not ends:
        return Problem("there is no step to save", mark, "add a step under `steps`, or name a model in `save.step`")
    names = ", ".join(f"`{name}`" for name in ends)
    hint = f"name the one to save, for example `save: {{step: {ends[-1]}, to: out/{ends[-1]}}}`"
    return Problem(f"{len(ends)} steps are used by no other: {names}", mark, hint)


def cycles(uses: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Cycles among the steps, each as a path that ends where it begins (`[a, b, a]`: a uses b, b uses a).

    The paths share no step and start at their earliest one; every step on a cycle is on a path or reaches one.
    """
    order = {name: place for place, name in enumerate(uses)}
    left = {name: [use for use in names if use in uses] for name, names in uses.items()}
    found: list[list[str]] = []
    while len(found) < _MOST_CYCLES:
        try:
            graphlib.TopologicalSorter(left).prepare()
            break
        except graphlib.CycleError as error:
            path = list(reversed(error.args[1]))[:-1]
            first = path.index(min(path, key=order.__getitem__))
            found.append([*path[first:], *path[: first + 1]])
            left = {n: [u for u in names if u not in path] for n, names in left.items() if n not in path}
    return sorted(found, key=lambda path: order[path[0]])


def _used_by(step: Step) -> set[str]:
    return ({ref.name for ref in references(step)} | mentions(step.params)) - {step.name}

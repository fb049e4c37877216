"""Every place on disk or on the Hub that a recipe names, held against the sandbox. Nothing is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mergekit_lite.checkpoint.hub import is_hub_id
from mergekit_lite.checkpoint.masks import split_task
from mergekit_lite.errors import Mark, Problem
from mergekit_lite.family.data import families
from mergekit_lite.methods.spec import Method
from mergekit_lite.recipe.model import Model, Recipe, Step
from mergekit_lite.sandbox import Sandbox


@dataclass(frozen=True, slots=True)
class Place:
    """A place as it is written; `hub` where it may stand for a model on the Hub."""

    text: str
    mark: Mark | None
    hub: bool = False


def outside(recipe: Recipe, methods: Mapping[str, Method], out: Path | None, box: Sandbox) -> list[Problem]:
    """What the recipe, and `--out`, name outside of `box`, used or not, in the order of the text."""
    places = [*_models(recipe), *_files(recipe, methods), *_outputs(recipe, out, box)]
    found = [(place, box.refusal(place.text, hub=place.hub)) for place in places]
    problems = [replace(problem, mark=place.mark) for place, problem in found if problem is not None]
    problems += no_pushes(recipe, "a sandbox has no network")
    return sorted(dict.fromkeys(problems), key=lambda p: (p.mark.line, p.mark.column) if p.mark else (0, 0))


def no_pushes(recipe: Recipe, reason: str) -> list[Problem]:
    """What the recipe wants to publish where it cannot."""
    hint = "take `push` out of the recipe; `merge push OUT REPO` publishes a finished output later"
    pushes = [save.push for save in recipe.saves if save.push is not None]
    return [Problem(f"nothing can be pushed to `{push.repo}`: {reason}", push.mark, hint) for push in pushes]


def _models(recipe: Recipe) -> Iterator[Place]:
    for model in recipe.models.values():
        if model.location:
            yield _place(model, model.location, model.revision)
        if model.adapter is not None:
            yield _place(model, model.adapter, model.adapter_revision)


def _place(model: Model, location: str, revision: str | None) -> Place:
    location, _ = split_task(location)
    return Place(location, model.mark, revision is not None or is_hub_id(location))


def _files(recipe: Recipe, methods: Mapping[str, Method]) -> Iterator[Place]:
    """What settings of the kind `path` name, save for steps and for families of this program."""
    names = {family.name for family in families().values()}
    for step in recipe.steps.values():
        kinds = {param.name: param.kind for param in methods[step.use].params} if step.use in methods else {}
        for name, text, mark in _texts(step):
            known = name == "from" and text in recipe.steps
            known = known or (name == "family" and text in names and not os.path.lexists(text))
            if kinds.get(name) == "path" and not known:
                yield Place(text, mark)


def _texts(step: Step) -> Iterator[tuple[str, str, Mark]]:
    given = [*step.params.items(), *(pair for item in step.of for pair in item.params.items())]
    for name, value in given:
        yield from ((name, scalar, mark) for scalar, mark in value.scalars() if isinstance(scalar, str))


def _outputs(recipe: Recipe, out: Path | None, box: Sandbox) -> Iterator[Place]:
    """The folders to be written, or where those are inside, the ones that an unfinished run leaves beside them."""
    for save in recipe.saves:
        text = str(out) if out is not None else save.to
        if text is not None:
            place = text if not box.holds(text) else f"{text.rstrip(os.sep)}.partial"
            yield Place(place, None if out is not None else save.mark)

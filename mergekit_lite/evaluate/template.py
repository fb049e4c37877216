"""A recipe with holes: what it is once they are filled, and whether every filling would be sound."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_lite.errors import Problem, RecipeError
from mergekit_lite.methods.registry import all_methods
from mergekit_lite.plan.settings import check_steps
from mergekit_lite.recipe.holes import Hole, setting
from mergekit_lite.recipe.model import Recipe, Scoring
from mergekit_lite.recipe.override import FILE
from mergekit_lite.recipe.read import holes_of, parse, read_file
from mergekit_lite.recipe.write import to_yaml

PERMUTATIONS = "permutations.safetensors"  # the file that learned permutations are put into


class Template:
    """The recipe in the file `path`, with the settings `overrides`. `scores` take the place of its own.

    Raises InputError where there is no such file, and RecipeError with all faults: those of the language, of the holes,
    and of what they may be filled with, each hole by itself.
    """

    def __init__(self, path: str | Path, overrides: Sequence[str] = (), scores: Sequence[Scoring] = ()):
        self.file = str(path)
        self.text = read_file(self.file)
        self.overrides = tuple(overrides)
        holes, problems = holes_of(self.text, self.file)
        if problems:
            raise RecipeError(problems)
        given = {text.partition("=")[0] for text in overrides}
        self.holes = [hole for hole in holes if hole.path not in given]
        self._check_kinds()
        self.scores = tuple(scores)
        self.first = self.fill([_end(hole, 0) for hole in self.holes])
        self.scores = self.scores or self.first.scores
        self._check_ends()

    def fill(self, settings: Sequence[str]) -> Recipe:
        """The recipe with every hole filled, its scores put in. Raises RecipeError."""
        recipe, problems = parse(self.text, self.file, (*self.overrides, *settings))
        if recipe is not None:
            problems = [*problems, *check_steps(recipe, all_methods())]
        if problems or recipe is None:
            raise RecipeError(list(self._at_holes(problems)))
        return replace(recipe, scores=self.scores or recipe.scores)

    def identity(self) -> str:
        """What is searched: the digest of all but comments and the order of keys."""
        holes = [replace(hole, mark=None) for hole in self.holes]  # type: ignore[arg-type]
        return hashlib.sha256(repr((to_yaml(self.first), holes)).encode()).hexdigest()

    @property
    def greedy(self) -> Hole | None:
        """The hole that a greedy soup fills, where it is one."""
        return next((hole for hole in self.holes if hole.kind == "greedy"), None)

    @property
    def learned(self) -> Hole | None:
        """The hole whose weights are learned from data, where it is one."""
        return next((hole for hole in self.holes if hole.kind == "learned"), None)

    @property
    def order(self) -> Hole | None:
        """The hole whose permutations are learned from data, where it is one."""
        return next((hole for hole in self.holes if hole.kind == "order"), None)

    def _check_kinds(self) -> None:
        if not self.holes:
            hint = "for example `t: {search: [0, 1]}`, `density: {choice: [0.2, 0.5]}` or `of: {greedy: [a, b, c]}`"
            raise RecipeError(Problem(f"`{self.file}` has nothing to search", None, hint))
        alone = self.greedy or self.learned or self.order
        if alone is not None and len(self.holes) > 1:
            other = next(hole for hole in self.holes if hole is not alone)
            hint = "search the other values first, and write them into the recipe"
            what = {
                "greedy": "a greedy soup is searched by itself",
                "learned": "weights are learned with no other hole beside",
                "order": "permutations are learned with no other hole beside",
            }[alone.kind]
            raise RecipeError(Problem(what, other.mark, hint))

    def _check_ends(self) -> None:
        """Raises RecipeError where a value that a hole may have is none that its setting takes. What does not go
        together with the others' first values may go with their other ones, and is left to the trials."""
        problems: dict[Any, Problem] = {}
        for hole in self.holes:
            if hole.kind in ("greedy", "learned", "order"):
                continue
            others = [_end(other, 0) for other in self.holes if other is not hole]
            for number in range(1, len(hole.ends())):
                try:
                    self.fill([*others, _end(hole, number)])
                except RecipeError as fault:
                    problems |= {(p.message, hole.path): p for p in fault.problems if p.mark == hole.mark}
        if problems:
            raise RecipeError(list(problems.values()))

    def _at_holes(self, problems: Sequence[Problem]) -> Iterator[Problem]:
        """The findings, those of a filled value at the hole that it fills."""
        marks = {hole.path: hole.mark for hole in self.holes}
        for problem in problems:
            mark = problem.mark
            path = mark.text.partition("=")[0] if mark is not None and mark.file == FILE else None
            yield replace(problem, mark=marks[path]) if path in marks else problem


def _end(hole: Hole, number: int) -> str:
    """The setting that fills a hole with one of its ends."""
    if hole.kind == "order":
        return setting(hole.path, PERMUTATIONS)
    if hole.kind in ("greedy", "learned"):
        return setting(hole.path, list(hole.values))
    return setting(hole.path, hole.ends()[number])

"""Which layers several models may share: those in which what they have changed points one way.

The other half of the share-or-split score (few-shot NAS by gradient matching, ICLR 2022, arXiv 2203.15207): layers that
score below a threshold are kept by each model, the others shared. The list is in the form that `use: share` takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.family.family import family_of
from mergekit_lite.family.home import by_home, globs_of
from mergekit_lite.recipe.write import dump


@dataclass(frozen=True, slots=True)
class Split:
    """The settings of a `share` step, `layers` and `tensors`, and what each model keeps, `own`, by the names of layers
    and modules that scores have."""

    threshold: float
    layers: tuple[int | str, ...]
    tensors: tuple[str, ...]
    own: tuple[str, ...]

    @property
    def settings(self) -> dict[str, list[int | str]]:
        given: dict[str, list[int | str]] = {"layers": list(self.layers), "tensors": list(self.tensors)}
        return {key: value for key, value in given.items() if value}

    @property
    def text(self) -> list[str]:
        """`with: {layers: [0-3], tensors: [head.*]}`, as a recipe has it, in lines."""
        return dump({"with": self.settings}).splitlines()

    def as_json(self) -> dict[str, object]:
        return {"threshold": self.threshold, "with": self.settings, "own": list(self.own)}


def split(
    base: Checkpoint, models: Sequence[Checkpoint], scores: Mapping[str, float | None], threshold: float
) -> Split:
    """Divide by `scores`, which are by `home_of`, None where no two models change anything. What has no score, or is
    not in all models in one shape, is not shared."""
    everyone = (base, *models)
    family = family_of(base.config, base.tensors, base.configs)
    tied = {alias for alias, canonical in family.tied if canonical in base.tensors}
    names = [n for n in dict.fromkeys(n for c in everyone for n in c.tensors) if n not in tied]
    homes = by_home(family, names)

    def is_shared(home: str) -> bool:
        score = scores.get(home)
        whole = all(len({c.tensors[n].shape if n in c.tensors else None for c in everyone}) == 1 for n in homes[home])
        return home in scores and whole and (score is None or score >= threshold)

    shared = [home for home in homes if is_shared(home)]
    numbers, tensors = [], []
    for home in shared:
        layer = family.layer(homes[home][0])
        if layer is not None and len(family.stacks) == 1:
            numbers.append(layer.index)
            continue
        tensors += globs_of(home, homes[home], names)
    return Split(threshold, tuple(_spans(numbers)), tuple(tensors), tuple(h for h in homes if h not in shared))


def _spans(numbers: Iterable[int]) -> list[int | str]:
    """`[0, 1, 2, 5]` as `["0-2", 5]`."""
    found: list[int | str] = []
    # Numbers of one span keep their distance from their place.
    for _, group in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        span = [number for _, number in group]
        found.append(span[0] if len(span) == 1 else f"{span[0]}-{span[-1]}")
    return found

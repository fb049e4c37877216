"""Straggler layers: those few that break the way between two models, and how a recipe names them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mergekit_lite.recipe.write import dump

COUNT = 2  # layers that are named
DENSITY = 0.5  # of the changes that such a layer keeps


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer, or a module outside of the layers, by its figures. `globs` match its tensors; `ranked` is False where
    these are vectors alone. `scores` and `barrier` are those of its own path, `screen` is ||B - A|| / ||A||;
    `sharpness` is None where it was not measured."""

    name: str
    globs: tuple[str, ...]
    ranked: bool
    scores: tuple[float, ...]
    barrier: float
    screen: float
    sharpness: float | None = None


@dataclass(frozen=True, slots=True)
class Stragglers:
    """The layers that are sharpest, or where that is not known have the highest barriers, from the worst down."""

    by: Literal["sharpness", "barrier"]
    layers: tuple[Layer, ...]

    @property
    def density(self) -> dict[str, float]:
        """The setting of a `sparsify` step that thins out what has changed in them and leaves the rest."""
        return {**{glob: DENSITY for layer in self.layers for glob in layer.globs}, "else": 1}

    @property
    def text(self) -> list[str]:
        """`with: {density: {"encoder.layers.2.*": 0.5, else: 1}}`, as a recipe has it, in lines."""
        return dump({"with": {"density": self.density}}).splitlines()


def stragglers(layers: Sequence[Layer], count: int = COUNT) -> Stragglers:
    """The `count` layers with the largest figure, the first of several alike; a layer whose figure is 0 is none."""
    sharp = any(layer.sharpness is not None for layer in layers)

    def figure(layer: Layer) -> float:
        value = layer.sharpness if sharp else layer.barrier
        return 0.0 if value is None or math.isnan(value) else value

    worst = sorted((layer for layer in layers if layer.ranked and figure(layer) > 0), key=lambda one: -figure(one))
    return Stragglers("sharpness" if sharp else "barrier", tuple(worst[:count]))

"""The merges of `make reproduce` that permute units: each is a recipe that the tool reads and runs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from alignment_models import Net, Weights

from mergekit_lite import load_recipe, merge_in_memory


@dataclass(frozen=True)
class Merger:
    """Merges networks of one kind, whose config.json is `config`."""

    net: Net
    config: Mapping[str, Any]

    def permuted(
        self, like: Weights, of: Weights, activations: tuple[Weights, Weights] | None = None, **settings: Any
    ) -> Weights:
        """`of` with its units in the order of those of `like`; settings are those of `permute`. `activations` of the
        two take the place of their weights."""
        models = {"like": like, "of": of}
        if activations is not None:
            models |= {"like_activations": activations[0], "activations": activations[1]}
            settings |= {"cost": "activation", **{name: name for name in ("like_activations", "activations")}}
        step = {"use": "permute", "of": "of", "with": {"like": "like", **self._family(), **settings}}
        return self._run(step, models)

    def many(self, models: Sequence[Weights], weights: Sequence[float] | None = None, **settings: Any) -> Weights:
        """The mean of the matched models, or that with `weights`; settings are those of `merge_many`."""
        named = {f"m{number}": model for number, model in enumerate(models)}
        shares = weights or [1.0] * len(models)
        of = {name: {"weight": share} for name, share in zip(named, shares, strict=True)}
        return self._run({"use": "merge_many", "of": of, "with": {**self._family(), **settings}}, named)

    def reordered(self, of: Weights, **settings: Any) -> Weights:
        """`of` with its units in a smooth order; settings are those of `reorder`."""
        return self._run({"use": "reorder", "of": "of", "with": {**self._family(), **settings}}, {"of": of})

    def mean(self, models: Sequence[Weights]) -> Weights:
        """The plain mean."""
        named = {f"m{number}": model for number, model in enumerate(models)}
        return self._run({"use": "linear", "of": list(named)}, named)

    def _family(self) -> dict[str, str]:
        return {} if self.net.family is None else {"family": self.net.family}

    def _run(self, step: Mapping[str, Any], models: Mapping[str, Weights]) -> Weights:
        recipe = {
            "version": 1,
            "models": {name: f"models/{name}" for name in models},
            "steps": {"merged": dict(step)},
            "save": {"step": "merged", "to": "out/merged"},
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.yaml"
            path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
            return merge_in_memory(load_recipe(path), models, config=self.config, threads=1)

"""How each multi-task method is asked for in a recipe, which settings are tried, and how they are chosen
(`make reproduce`).

Every merge is a recipe that the tool reads and runs. Settings are chosen on the validation split alone: the best, and
of equal ones the first. `lambda` is searched on the straight line on which these merges lie, from the one with
`lambda: 0` through the one with `lambda: 1`; the merge that is chosen is then made anew by a recipe of its own.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import eight_vit
import torch
import yaml
from eight_tasks import LAYERS, Experiment, Weights, accuracy, fisher, grams

from mergekit_lite import load_recipe, merge_in_memory
from mergekit_lite.methods.registry import all_methods

Settings = dict[str, Any]
# 0.1, 0.2, ... 1.0 is the usual grid; methods that average, or flatten a spectrum, need more than 1.
LAMBDAS = (*(i / 10 for i in range(1, 11)), 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0)
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6)
EXAMPLES = 256  # training images behind the statistics of `fisher` and `regmean`
MAGNITUDE = "magnitude_masks"  # the multi-task vector where the task's own changes are largest, of all tensors together
PER_TASK = ("tall_masks", MAGNITUDE, "emr")  # they give a model for each task
PARTS = ("add", "elect", "keep_shared", "stack")  # they take any number of models, but are no merge of their own
# For networks that were trained apart (docs/alignment.md), and for language models.
ALONE = ("merge_many", "moe")
STATISTICS = {"fisher": "fisher", "regmean": "gram"}  # the setting that names a model's statistics
IN_TURN = "regmean++"  # `regmean` whose statistics are gathered layer by layer behind the layers merged already


@dataclass(frozen=True)
class Row:
    """A method with fixed settings and those to choose from. `expected` is the figure that its specification states for
    these tasks, `bar` what it should reach; with `beside` the bar counts from task arithmetic.
    """

    method: str
    fixed: Settings = field(default_factory=dict)
    choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    expected: float | None = None
    bar: float | None = None
    beside: bool = False

    @property
    def per_task(self) -> bool:
        """Whether it gives a model for each task."""
        return self.method in PER_TASK

    @property
    def label(self) -> str:
        return " ".join([self.method, *(f"{name} {value}" for name, value in self.fixed.items())])


@dataclass(frozen=True)
class Score:
    """Normalised accuracy in percent on the test and on the validation split, and the settings chosen on the latter: of
    models for each task, a mapping for each setting."""

    accuracy: float
    chosen: Settings
    validation: float


FACTOR = {"lambda": LAMBDAS}
ROWS = (
    Row("linear", expected=90.6),
    Row("task_arithmetic", choices=FACTOR, expected=90.6),
    Row("ties", choices=FACTOR, expected=90.1),
    Row("dare_linear", choices={"drop_rate": (0.1, 0.5, 0.9), **FACTOR}),
    Row("dare_ties", choices={"drop_rate": (0.1, 0.5, 0.9), **FACTOR}),
    Row("della_linear", choices={"density": (0.2, 0.5, 0.8), **FACTOR}),
    Row("della", choices={"density": (0.2, 0.5, 0.8), **FACTOR}),
    Row("breadcrumbs", {"density": 0.1}, FACTOR, expected=90.5, bar=-0.5, beside=True),
    Row("breadcrumbs", {"density": 0.5}, FACTOR, expected=90.7),
    Row("breadcrumbs", {"density": 0.9}, FACTOR, expected=90.5),
    Row("breadcrumbs_ties", choices={"density": (0.1, 0.5, 0.9), **FACTOR}),
    Row("consensus", {"k": 1}, FACTOR, expected=90.3, bar=-1.5, beside=True),
    Row("consensus", {"k": 2}, FACTOR, expected=90.3, bar=-1.5, beside=True),
    Row("consensus", {"k": 3}, FACTOR, expected=90.0, bar=-1.5, beside=True),
    Row("pcb", choices={"ratio": (0.1, 0.2, 0.5), **FACTOR}),
    Row("cabs", {"n": 32}, FACTOR),
    Row("sce", choices={"select_topk": (0.1, 0.5, 1.0)}),
    Row("model_stock", choices={"granularity": ("tensor", "row")}),
    Row("geometric_median", choices={"scope": ("tensor", "global")}),
    Row("fisher", choices={"normalize": (True, False)}),
    Row("regmean", choices={"alpha": (0.5, 0.7, 0.9, 1.0)}),
    Row(IN_TURN, choices={"alpha": (0.5, 0.7, 0.9, 1.0)}),
    Row("iso_c", choices=FACTOR, expected=95.6, bar=95.0),
    Row("tsv_m", choices=FACTOR, expected=95.3, bar=95.0),
    Row("wudi", {"solver": "adam"}, FACTOR),
    Row("wudi", {"solver": "closed"}, FACTOR),
)
MODELS_PER_TASK = (
    Row("tall_masks", choices={"threshold": THRESHOLDS}, expected=98.5, bar=97.0),
    Row(MAGNITUDE, {"density": 0.1}, expected=90.5),
    Row("emr"),
)


def all_rows() -> tuple[Row, ...]:
    """The rows above, and with its default settings every other method of the registry that takes eight models."""
    listed = {row.method for row in ROWS}
    others = [
        Row(method.name, choices=FACTOR if any(p.name == "lambda" for p in method.params) else {})
        for method in all_methods().values()
        if method.public and method.inputs[1] is None and method.name not in (*listed, *PARTS, *ALONE)
    ]
    return *ROWS, *sorted(others, key=lambda row: row.method), *MODELS_PER_TASK


def recipe_text(method: str, settings: Settings, tasks: list[str], task: str | None = None) -> str:
    """The recipe of one merge of all tasks' models, or of the model for one `task`. A setting that is a mapping has a
    value for each task."""
    inputs: Any = list(tasks)
    single = {name: value for name, value in settings.items() if not isinstance(value, dict)}
    each = {name: value for name, value in settings.items() if isinstance(value, dict)}
    steps: dict[str, Any] = {}
    if method in STATISTICS:
        each[STATISTICS[method]] = {name: f"{name}.{method}" for name in tasks}
    if method in ("svc", "tall_masks", MAGNITUDE):
        steps["sum"] = {"use": "task_arithmetic", "base": "base", "of": inputs, "with": {"lambda": 1.0}}
        inputs = ["sum", *tasks] if method == "svc" else [task, "sum"]
    if method == "emr":
        steps["unified"] = {"use": "elect", "base": "base", "of": inputs, "with": {"aggregate": "max"}}
        inputs = [task, "unified"]
    if each:
        inputs = {name: {setting: values[name] for setting, values in each.items()} for name in tasks}
    if method == MAGNITUDE:
        # `keep_shared` takes from its first input what is not 0 in the second.
        steps["largest"] = {"use": "sparsify", "base": "base", "of": [task], "with": {**settings, "scope": "global"}}
        method, inputs, single = "keep_shared", ["sum", "largest"], {"k": 1}
    merged: dict[str, Any] = {"use": method, "of": inputs}
    if all_methods()[method].base != "no":
        merged["base"] = "base"
    if single:
        merged["with"] = single
    models = ["base", *tasks, *(each.get(STATISTICS.get(method, ""), {}).values())]
    return _text(models, {**steps, "merged": merged})


def _text(models: list[str], steps: Mapping[str, Any]) -> str:
    recipe = {
        "version": 1,
        "seed": 0,
        "models": {name: f"models/{name}" for name in models},
        "steps": dict(steps),
        "save": {"step": "merged", "to": "out/merged"},
    }
    return yaml.safe_dump(recipe, sort_keys=False)


class Bench:
    """The models of one seed: merged, measured, settings chosen."""

    def __init__(self, experiment: Experiment):
        self.data = experiment.data
        self.tasks = list(experiment.tuned)
        self.models: dict[str, Weights] = {"base": experiment.base, **experiment.tuned}
        for task, encoder in experiment.tuned.items():
            if eight_vit.FIRST in encoder:
                continue  # no statistics of a transformer: its rows are those of masks
            images = self.data[task].images["train"][:EXAMPLES]
            self.models[f"{task}.fisher"] = fisher(encoder, self.data[task].head, images)
            self.models[f"{task}.regmean"] = grams(encoder, images)
        self.own = {
            split: {task: accuracy(self.models[task], self.data[task], split) for task in self.tasks}
            for split in ("validation", "test")
        }

    def normalized(self, weights: Mapping[str, Weights], split: str) -> float:
        """Accuracy of each task's model over that of its fine-tune, mean over the tasks, in percent."""
        shares = (accuracy(weights[task], self.data[task], split) / own for task, own in self.own[split].items())
        return 100 * fmean(shares)

    def normalized_one(self, weights: Weights, split: str) -> float:
        """The same of one model for all tasks."""
        return self.normalized(dict.fromkeys(self.tasks, weights), split)

    def score(self, row: Row) -> Score:
        """Choose the settings on the validation split, measure on the test split."""
        if row.per_task:
            chosen = {task: self._choose_for(task, row) for task in self.tasks}
            models = {task: self.merge(row.method, {**row.fixed, **s}, task) for task, s in chosen.items()}
            each = {name: {task: settings[name] for task, settings in chosen.items()} for name in row.choices}
            return Score(self.normalized(models, "test"), each, self.normalized(models, "validation"))
        fixed = row.fixed
        if row.method == "consensus":
            fixed = {**fixed, "threshold": self.thresholds}
        found = [(self.normalized_one(w, "validation"), s) for s, w in self.candidates(row, fixed)]
        validation, settings = max(found, key=lambda pair: pair[0])
        merged = self.merge(row.method, {**fixed, **settings})
        return Score(self.normalized_one(merged, "test"), settings, validation)

    def merge(self, method: str, settings: Settings, task: str | None = None) -> Weights:
        if method == IN_TURN:
            return self._in_turn(settings)
        return self._run(recipe_text(method, settings, self.tasks, task))

    def _in_turn(self, settings: Settings) -> Weights:
        """RegMean++: the Gram matrices of a layer are those of its inputs behind the merged layers before it."""
        merged = self.models["base"]
        found: dict[str, Weights] = {task: {} for task in self.tasks}
        for layer in range(LAYERS):
            name = f"encoder.layers.{layer}.weight"
            for task, matrices in found.items():
                matrices[name] = grams(merged, self.data[task].images["train"][:EXAMPLES])[name]
            # Layers without Gram matrices so far get the mean, which the next round replaces.
            models = {**self.models, **{f"{task}.regmean": matrices for task, matrices in found.items()}}
            merged = self._run(recipe_text("regmean", settings, self.tasks), models)
        return merged

    @functools.cached_property
    def thresholds(self) -> dict[str, float]:
        """The threshold of every task that its TALL-masks model is best with on the validation split."""
        return {task: self._choose_for(task, MODELS_PER_TASK[0])["threshold"] for task in self.tasks}

    def census(self) -> dict[str, float]:
        """Percent of the weights in a task's mask (the mean over tasks), in no mask, and in exactly one."""
        base = self.models["base"]
        settings = [{"threshold": threshold, "output": "mask"} for threshold in self.thresholds.values()]
        masks = [self.merge("tall_masks", s, task) for task, s in zip(self.tasks, settings, strict=True)]
        # A mask comes as a change of the base.
        flat = torch.stack([torch.cat([(m[n] - base[n]).round().flatten() for n in base]) for m in masks]).sum(0)
        return {
            "in a mask": 100 * float(flat.mean()) / len(masks),
            "in none": 100 * float((flat == 0).double().mean()),
            "in one": 100 * float((flat == 1).double().mean()),
        }

    def _choose_for(self, task: str, row: Row) -> Settings:
        def found(settings: Settings) -> float:
            merged = self.merge(row.method, {**row.fixed, **settings}, task)
            return accuracy(merged, self.data[task], "validation")

        return max(_products(row.choices), key=found)

    def candidates(self, row: Row, fixed: Settings) -> Iterator[tuple[Settings, Weights]]:
        """All settings to choose from, with their models."""
        factors = row.choices.get("lambda", ())
        for settings in _products({name: values for name, values in row.choices.items() if name != "lambda"}):
            if not factors:
                yield settings, self.merge(row.method, {**fixed, **settings})
                continue
            ends = {
                "origin": self.merge("linear", {}) if row.method == "cart" else self.models["base"],
                "whole": self.merge(row.method, {**fixed, **settings, "lambda": 1.0}),
            }
            for factor in factors:
                step = {"use": "interpolate", "of": list(ends), "with": {"t": factor}}
                yield {**settings, "lambda": factor}, self._run(_text(list(ends), {"merged": step}), ends)

    def _run(self, text: str, models: Mapping[str, Weights] | None = None) -> Weights:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.yaml"
            path.write_text(text, encoding="utf-8")
            return merge_in_memory(load_recipe(path), models or self.models, threads=1)


def _products(choices: Mapping[str, tuple[Any, ...]]) -> list[Settings]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]

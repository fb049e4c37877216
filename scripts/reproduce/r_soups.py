"""R10: soups of twelve fine-tunes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import fmean

import soup_models
import torch
import yaml
from claims import Bar, Claim, Experiment, Figure, Measurement
from soup_models import Setting
from tucker_convs import merged

import mergekit_lite

SETTING = Setting()
SEEDS = tuple(range(6))


def measure(seed: int) -> Measurement:
    torch.set_num_threads(1)
    kitchen = soup_models.kitchen(seed, SETTING)
    names = list(kitchen.tuned)
    chosen = {name: kitchen.accuracy(weights, kitchen.validation) for name, weights in kitchen.tuned.items()}
    judged = {name: kitchen.accuracy(weights, kitchen.test) for name, weights in kitchen.tuned.items()}
    best = max(chosen, key=lambda name: chosen[name])
    recipe = {
        "version": 1,
        "models": {name: f"models/{name}" for name in names},
        "steps": {"soup": {"use": "linear", "of": {"greedy": names}}},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "soup.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        found = mergekit_lite.search(
            path, score=lambda tensors: kitchen.accuracy(tensors, kitchen.validation), models=kitchen.tuned, threads=1
        )
    greedy = mergekit_lite.merge_in_memory(found.recipes[0], kitchen.tuned, threads=1)
    uniform = merged(kitchen.tuned, {"soup": {"use": "linear", "of": names}})
    scores = sum(kitchen.scores(weights, kitchen.test).softmax(1) for weights in kitchen.tuned.values())
    assert isinstance(scores, torch.Tensor)
    return {
        "mean single": fmean(judged.values()),
        "best single": judged[best],
        "uniform": kitchen.accuracy(uniform, kitchen.test),
        "greedy": kitchen.accuracy(greedy, kitchen.test),
        "ensemble": float((scores.argmax(1) == kitchen.test[1]).double().mean()),
        "validation best single": chosen[best],
        "validation greedy": found.best[0].scores["score"],
        "ingredients": len(found.best[0].values["steps.soup.of"]),
        "gap": kitchen.accuracy(greedy, kitchen.test) - judged[best],
    }


EXPERIMENT = Experiment(
    "soups",
    measure,
    lambda: SETTING,
    (
        Claim(
            "R10",
            "model soups",
            "arXiv 2203.05482: a greedy soup of fine-tunes is above the best of them, 90.94% on ImageNet",
            f"A fully connected network of two hidden layers of {SETTING.width} units learns {SETTING.base_images} "
            f"digits and is fine-tuned twelve times on {SETTING.images} others with noise on their pixels: Adam at "
            f"{', '.join(f'{rate:g}' for rate in SETTING.rates)}, {SETTING.epochs[0]} or {SETTING.epochs[1]} epochs, "
            f"with and without label smoothing. {SETTING.validation} images choose. The specification does not state "
            "how strong the noise is nor what the four settings are; of noise of 0.3, 0.31, 0.32, 0.35 and 0.5, 0.31 "
            "has the mean accuracy of single models that comes nearest to its 0.817.",
            (
                Figure("mean of the single models", "mean single", "0.817"),
                Figure("the one best on validation", "best single", "0.824"),
                Figure("uniform soup", "uniform", "0.823"),
                Figure("greedy soup", "greedy", "0.826"),
                Figure("ensemble of all", "ensemble", "0.822"),
                Figure("validation: the best single", "validation best single"),
                Figure("validation: greedy soup", "validation greedy"),
                Figure("ingredients of the greedy soup", "ingredients", "", ".1f"),
            ),
            (
                Bar(
                    "validation: greedy less the best single, the least",
                    lambda m: min(m.each(lambda one: one["validation greedy"] - one["validation best single"])),
                    "at least",
                    0,
                ),
                Bar("greedy less the best single, mean", lambda m: m.mean("gap"), "at least", 0),
                Bar("uniform less the mean", lambda m: m.mean("uniform") - m.mean("mean single"), "above", 0),
                Bar(
                    "seeds in which greedy is below the best single",
                    lambda m: sum(gap < 0 for gap in m["gap"]),
                    "at most",
                    0,
                    ".0f",
                    claimed=False,
                ),
            ),
        ),
    ),
    seeds=SEEDS,
)

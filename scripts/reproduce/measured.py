"""Measurements on disk: one file for each seed in the cache, and all that the page is written from in one.

A measurement in the cache counts as long as the experiment's setting and the release of torch are the same; what the
code does with them is not looked at, so after a change of code `--fresh` measures anew. Experiments that draw nothing
are runs of tests, and measured anew each time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from claims import Experiment, Found, Measurement

ROOT = Path(__file__).parents[2]
CACHE = Path("demo/reproduction")
STORE = ROOT / "docs" / "reproduction.json"
DIGITS = 6  # significant ones that are kept


def cached(experiment: Experiment, seed: int, fresh: bool = False) -> Measurement:
    """The numbers of one seed, from the cache or measured."""
    file = CACHE / f"{experiment.name}-{seed}-{experiment.digest}-{torch.__version__}.json"
    if fresh or not experiment.drawn or not file.is_file():
        found = {name: rounded(value) for name, value in experiment.measure(seed).items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1), encoding="utf-8")
        partial.rename(file)
    return {name: float(value) for name, value in json.loads(file.read_text(encoding="utf-8")).items()}


def rounded(value: float) -> float:
    """So that what is stored is short, and bars are held against what is shown."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else value


def load(store: Path) -> dict[str, Any]:
    """By experiment: `setting`, a digest, and `seeds`, the numbers by seed."""
    return dict(json.loads(store.read_text(encoding="utf-8"))) if store.is_file() else {}


def update(store: Path, experiment: Experiment, seeds: Mapping[int, Measurement]) -> None:
    """Put the measurements of one experiment in the place of what is stored of it."""
    stored = load(store)
    stored[experiment.name] = {
        "setting": experiment.digest,
        "seeds": {str(seed): measured for seed, measured in sorted(seeds.items())},
    }
    store.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n", encoding="utf-8")


def found(store: Mapping[str, Any], experiment: Experiment) -> Found | None:
    """What is stored of an experiment; None if nothing is."""
    if experiment.name not in store:
        return None
    seeds = store[experiment.name]["seeds"]
    return Found({int(seed): measured for seed, measured in seeds.items()})

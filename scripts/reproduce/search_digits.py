"""Search the merge of eight tasks' models, and hold what is found against the best recipe of one parameter: minutes.

    python scripts/reproduce/search_digits.py --write docs/search.md

The models and the tasks are those of `make reproduce` (eight_tasks.py). Everything is chosen on the validation split
and measured on the test split. Of each seed the models, the splits and what is drawn are its own.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from eight_merges import LAMBDAS, Bench
from eight_tasks import LAYERS, Setting, Weights, experiment
from rich.console import Console
from work import page, processes

import mergekit_lite

SEEDS = (0, 1, 2)
TRIALS = 40
CACHE = Path("demo/eight_tasks")
BEGIN, END = "<!-- made by scripts/reproduce/search_digits.py -->", "<!-- end of what it made -->"
# The recipes of one parameter: every value of the grid is tried.
SINGLE = ("task_arithmetic", "ties", "iso_c", "tsv_m")
BY_LAYER = {f"encoder.layers.{layer}.*" for layer in range(LAYERS)}
Steps = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """The recipe that was best on the validation split: percent there and on the test split; how many were scored."""

    validation: float
    test: float
    trials: int


def between(low: float, high: float) -> Any:
    """A hole for a factor."""
    return {"search": [low, high], "log": True}


def merged(method: Any, of: Any, **settings: Any) -> Steps:
    return {"merged": {"use": method, "base": "base", "of": of, "with": settings}}


def by_layer(low: float, high: float) -> Any:
    return {glob: between(low, high) for glob in sorted(BY_LAYER)}


def single(method: str, tasks: Sequence[str]) -> Steps:
    return merged(method, list(tasks), **{"lambda": {"choice": list(LAMBDAS)}})


def weighted(tasks: Sequence[str]) -> Steps:
    """For each task a model whose change has a weight: what any method takes."""
    factor = {"lambda": {"search": [0.5, 1.5]}}
    return {f"of_{t}": {"use": "task_arithmetic", "base": "base", "of": [t], "with": factor} for t in tasks}


SEARCHED: dict[str, Callable[[Sequence[str]], Steps]] = {
    "task_arithmetic, lambda by layer": lambda tasks: merged(
        "task_arithmetic", list(tasks), **{"lambda": by_layer(0.03, 1)}
    ),
    "task_arithmetic, weight by task": lambda tasks: merged(
        "task_arithmetic", {task: {"weight": {"search": [0.0, 0.5]}} for task in tasks}, **{"lambda": 1.0}
    ),
    "ties, density, lambda by layer": lambda tasks: merged(
        "ties", list(tasks), density={"search": [0.05, 1.0]}, **{"lambda": by_layer(0.05, 2)}
    ),
    "iso_c, lambda by layer": lambda tasks: merged("iso_c", list(tasks), **{"lambda": by_layer(0.5, 4)}),
    "iso_c, weight by task, lambda by layer": lambda tasks: {
        **weighted(tasks), **merged("iso_c", list(weighted(tasks)), **{"lambda": by_layer(0.5, 4)})
    },
    "method, lambda by layer": lambda tasks: merged(
        {"choice": ["task_arithmetic", "ties", "iso_c"]}, list(tasks), **{"lambda": by_layer(0.05, 4)}
    ),
}  # fmt: skip


@functools.lru_cache(maxsize=len(SEEDS))
def bench(seed: int) -> Bench:
    """The models of one seed, read from the cache or trained."""
    torch.set_num_threads(1)
    return Bench(experiment(seed, Setting(), CACHE))


def search(name: str, seed: int, trials: int) -> Outcome:
    """The best recipe of one row of the table."""
    measured = bench(seed)
    steps = single(name, measured.tasks) if name in SINGLE else SEARCHED[name](measured.tasks)
    models: dict[str, Weights] = {model: measured.models[model] for model in ("base", *measured.tasks)}
    recipe = {
        "version": 1,
        "seed": seed,
        "models": {model: f"models/{model}" for model in models},
        "steps": steps,
        "save": {"step": "merged", "to": "out/merged"},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "open.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        found = mergekit_lite.search(
            path,
            score=lambda tensors: measured.normalized_one(tensors, "validation"),
            models=models,
            trials=trials,
            sampler="grid" if name in SINGLE else None,
        )
    best = mergekit_lite.merge_in_memory(found.recipes[0], models)
    scores = {split: measured.normalized_one(best, split) for split in ("validation", "test")}
    return Outcome(scores["validation"], scores["test"], len(found.trials))


def table(found: dict[str, list[Outcome]]) -> str:
    """The rows, and what they say: for each seed the best by validation of either kind."""

    def row(name: str) -> str:
        outcomes = found[name]
        each = " ".join(f"{outcome.test:.1f}" for outcome in outcomes)
        mean, validation = (fmean(getattr(o, split) for o in outcomes) for split in ("test", "validation"))
        return f"| {name} | {outcomes[0].trials} | {validation:.2f} | {mean:.2f} | {each} |"

    chosen = {
        kind: [max((found[name][i] for name in names), key=lambda o: o.validation) for i in range(len(SEEDS))]
        for kind, names in (("one parameter", SINGLE), ("searched", SEARCHED))
    }
    rows = [row(f"{name}") for name in (*SINGLE, *SEARCHED)]
    gains = [b.test - a.test for a, b in zip(chosen["one parameter"], chosen["searched"], strict=True)]
    seen = [b.validation - a.validation for a, b in zip(chosen["one parameter"], chosen["searched"], strict=True)]
    verdict = "in every seed" if min(gains) > 0 else f"in {sum(gain > 0 for gain in gains)} of {len(gains)} seeds"
    text = (
        f"The best by validation of the recipes of one parameter against the best of those searched: on test images "
        f"{' '.join(f'{o.test:.2f}' for o in chosen['one parameter'])} against "
        f"{' '.join(f'{o.test:.2f}' for o in chosen['searched'])} for the seeds {', '.join(map(str, SEEDS))}. "
        f"So the search is better {verdict}, by {' '.join(f'{gain:+.2f}' for gain in gains)} points; on the validation "
        f"split that it went by, by {' '.join(f'{gain:+.2f}' for gain in seen)}."
    )
    head = "| recipe | trials | validation | test | test, of the seeds |\n| :- | -: | -: | -: | -: |"
    return "\n".join([head, *map(str, rows)]) + "\n\n" + page(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"put the table between the marks `{BEGIN}` in FILE")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--trials", type=int, default=TRIALS, help="of each search")
    given = parser.parse_args()
    console = Console(stderr=True)
    names = (*SINGLE, *SEARCHED)
    with processes(given.workers, console) as (pool, wait):
        wait("models", [pool.submit(bench_of, seed) for seed in SEEDS])
        futures = {(name, seed): pool.submit(search, name, seed, given.trials) for name in names for seed in SEEDS}
        wait("searches", list(futures.values()))
    text = table({name: [futures[name, seed].result() for seed in SEEDS] for name in names})
    if given.write is None:
        print(text)
        return
    before, _, rest = given.write.read_text(encoding="utf-8").partition(BEGIN + "\n")
    after = rest.partition(END)[2]
    given.write.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def bench_of(seed: int) -> None:
    """Have the models of a seed in the cache."""
    bench(seed)


if __name__ == "__main__":
    main()

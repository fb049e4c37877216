"""Merge the models of eight tasks by every multi-task method and compare the results: minutes on two cores.

    python scripts/reproduce/eight_page.py --write docs/eight_tasks.md

Accuracy is normalised: that of a merged model over that of the task's own fine-tune, mean over the tasks, in percent.
The tables show the test split; all settings of methods are chosen on the validation split.
"""

from __future__ import annotations

import argparse
import functools
from concurrent.futures import Future
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from eight_merges import Bench, Row, Score, all_rows
from eight_store import store
from eight_tasks import Setting, experiment
from eight_text import Results, bars_text, census_text, document, tables
from rich.console import Console
from work import processes

from mergekit_lite.merge import default_threads

SEEDS = (0, 1, 2)
CACHE = Path("demo/eight_tasks")
BASE = Row("base", expected=88.3)
OTHERS = {
    "nearest without bars": Setting(white=16.0, standardized=False, base_epochs=5, head_epochs=3),
}


@functools.lru_cache(maxsize=len(SEEDS))
def bench(seed: int, setting: Setting) -> Bench:
    """The models of one seed, read from the cache or trained."""
    torch.set_num_threads(1)
    return Bench(experiment(seed, setting, CACHE))


def train(seed: int, setting: Setting) -> float:
    """Leave the models in the cache; give the fine-tunes' mean accuracy on the test split, in percent."""
    return 100 * fmean(bench(seed, setting).own["test"].values())


def score(row: Row, seed: int, setting: Setting) -> Score:
    measured = bench(seed, setting)
    if row.method == BASE.method:
        base = measured.models["base"]
        return Score(measured.normalized_one(base, "test"), {}, measured.normalized_one(base, "validation"))
    return measured.score(row)


def census(seed: int, setting: Setting) -> dict[str, float]:
    measured = bench(seed, setting)
    return measured.census() | store(measured)


def measure(workers: int, console: Console) -> Results:
    rows = (BASE, *all_rows())
    settings = {"": Setting(), **OTHERS}
    with processes(workers, console) as (pool, wait):
        own = {name: [pool.submit(train, seed, s) for seed in SEEDS] for name, s in settings.items()}
        wait("training", [future for futures in own.values() for future in futures])
        scores = {
            (name, row.label): [pool.submit(score, row, seed, setting) for seed in SEEDS]
            for name, setting in settings.items()
            for row in rows
            if not name or row.expected is not None  # settings are judged by these
        }
        censuses = {name: [pool.submit(census, seed, s) for seed in SEEDS] for name, s in settings.items()}
        started: list[list[Future[Any]]] = [*scores.values(), *censuses.values()]
        wait("merging", [future for futures in started for future in futures])
        found = {key: [future.result() for future in futures] for key, futures in scores.items()}
        return Results(
            SEEDS,
            rows,
            [found["", row.label] for row in rows],
            [future.result() for future in own[""]],
            {name: [future.result() for future in futures] for name, futures in censuses.items()},
            {name: {label: line for (n, label), line in found.items() if n == name} for name in OTHERS},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=min(default_threads(), len(SEEDS)), help="processes")
    parser.add_argument("--write", type=Path, help="write the results as a document")
    args = parser.parse_args()

    results = measure(args.workers, Console(stderr=True))
    console = Console()
    for table in tables(results, console.width):
        console.print(table)
    console.print(census_text(results), bars_text(results), sep="\n")
    if args.write:
        args.write.write_text(document(results), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Merge the models of eight tasks by every multi-task method and compare the results: minutes on two cores.

    python scripts/reproduce.py --write docs/reproduce.md

Accuracy is normalised: that of a merged model over that of the task's own fine-tune, mean over the tasks, in percent.
The table shows the test split; all settings are chosen on the validation split.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from eight_merges import EXAMPLES, LAMBDAS, Bench, Row, Score, all_rows
from eight_tasks import Setting, experiment
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

SEEDS = (0, 1, 2)
CACHE = Path("demo/eight_tasks")
BASE = Row("base", expected=88.3)
CENSUS = {"in a mask": 29, "in none": 22, "in one": 17}  # what is expected, in percent
HEADINGS = ("method", "accuracy", "of the seeds", "expected", "bar", "chosen on validation")


@dataclass(frozen=True)
class Results:
    """`scores` by row and seed; by seed the fine-tunes' own mean test accuracy and the census of the masks."""

    rows: Sequence[Row]
    scores: Sequence[Sequence[Score]]
    own: Sequence[float]
    censuses: Sequence[Mapping[str, float]]


@functools.cache
def bench(seed: int) -> Bench:
    """The models of one seed, read or trained once in each process."""
    torch.set_num_threads(1)
    return Bench(experiment(seed, Setting(), CACHE))


def train(seed: int) -> float:
    """Leave the models in the cache; give the fine-tunes' mean accuracy on the test split, in percent."""
    return 100 * fmean(bench(seed).own["test"].values())


def score(row: Row, seed: int) -> Score:
    if row.method == BASE.method:
        return Score(bench(seed).normalized_one(bench(seed).models["base"], "test"), {})
    return bench(seed).score(row)


def census(seed: int) -> dict[str, float]:
    return bench(seed).census()


def measure(workers: int, console: Console) -> Results:
    rows = (BASE, *all_rows())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool, Progress(*columns, console=console) as progress:

        def wait(what: str, futures: Sequence[Future[Any]]) -> None:
            bar = progress.add_task(what, total=len(futures))
            for future in as_completed(futures):
                future.result()
                progress.advance(bar)

        own = [pool.submit(train, seed) for seed in SEEDS]
        wait("training", own)
        censuses = [pool.submit(census, seed) for seed in SEEDS]
        scores = [[pool.submit(score, row, seed) for seed in SEEDS] for row in rows]
        wait("merging", [*censuses, *(future for line in scores for future in line)])
        return Results(
            rows,
            [[future.result() for future in line] for line in scores],
            [future.result() for future in own],
            [future.result() for future in censuses],
        )


def cells(row: Row, scores: Sequence[Score]) -> tuple[str, ...]:
    mean = fmean(score.accuracy for score in scores)
    met = "" if row.bar is None else f"{row.bar:g} {'met' if mean >= row.bar else 'missed'}"
    return (
        row.label,
        f"{mean:.1f}",
        " ".join(f"{score.accuracy:.1f}" for score in scores),
        "" if row.expected is None else f"{row.expected:.1f}",
        met,
        "; ".join(f"{name} {_values([score.chosen[name] for score in scores])}" for name in scores[0].chosen),
    )


def _values(found: Sequence[Any]) -> str:
    """What the seeds have chosen, in their order; of choices for each task the range."""
    shown = [f"{min(v.values()):g} to {max(v.values()):g}" if isinstance(v, dict) else str(v).lower() for v in found]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


def census_text(results: Results) -> str:
    parts = (
        f"{name} {fmean(found[name] for found in results.censuses):.0f}% (expected {expected}%)"
        for name, expected in CENSUS.items()
    )
    return f"Of the weights are {', '.join(parts)}."


def table(results: Results) -> Table:
    result = Table(title="normalised accuracy on the test split, percent, mean of the seeds")
    for heading in HEADINGS:
        result.add_column(heading, justify="left" if heading in (HEADINGS[0], HEADINGS[-1]) else "right")
    for row, scores in zip(results.rows, results.scores, strict=True):
        shown = cells(row, scores)
        result.add_row(*shown, style="bold" if row.expected is not None else None)
    return result


def document(results: Results) -> str:
    setting = Setting()
    lines = [
        "# Eight tasks, every multi-task method",
        "",
        "Written by `make reproduce`: one encoder, eight tasks on scikit-learn's digits, one table for every method of the",
        "registry that merges any number of models. Seeds 0, 1 and 2.",
        "",
        "## Table",
        "",
        "Normalised accuracy: that of a merged model over that of the task's own fine-tune (on average "
        f"{fmean(results.own):.1f}% correct),",
        "mean over the tasks, in percent, on the test split. *Expected* are figures measured for the method",
        "specification that this project follows, with another implementation; *bar* is what a faithful one should reach.",
        "Differences below one point are noise.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "| - | -: | -: | -: | -: | - |",
        *(
            "| " + " | ".join(cells(row, scores)) + " |"
            for row, scores in zip(results.rows, results.scores, strict=True)
        ),
        "",
        f"TALL-masks: {census_text(results)}",
        "",
        *setting_text(setting),
    ]
    return "\n".join(lines) + "\n"

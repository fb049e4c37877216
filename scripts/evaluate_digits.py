"""Evaluate digit checkpoints on every task and print one table. Knows nothing of how a checkpoint was made.

    python scripts/evaluate_digits.py demo/base demo/upright out/quickstart/merged
    python scripts/evaluate_digits.py --json

Without folders it takes the quickstart's: the base, its fine-tunes, their plain average and the merged model.
Settings such as a merge's strength are chosen with `--split validation`; the table shows the test split.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from digits import TASKS, accuracy, load, show, split
from rich.console import Console
from rich.table import Table

QUICKSTART = [*(f"demo/{name}" for name in ("base", *TASKS)), "out/quickstart/average", "out/quickstart/merged"]


def evaluate(folder: Path, part: str) -> dict[str, float]:
    """Accuracy on each task and their mean."""
    weights = load(folder)
    images, labels = split(part)
    scores = {task: accuracy(weights, show(task, images), labels) for task in TASKS}
    return scores | {"mean": sum(scores.values()) / len(scores)}


def table(rows: dict[str, dict[str, float]], part: str) -> Table:
    """Checkpoints down, tasks across, percent; the best of each column stands out."""
    columns = [*TASKS, "mean"]
    best = {column: max(scores[column] for scores in rows.values()) for column in columns}
    result = Table(title=f"accuracy on the {part} split, percent")
    result.add_column("checkpoint")
    for column in columns:
        result.add_column(column, justify="right")
    for name, scores in rows.items():
        cells = [f"{100 * scores[c]:.1f}" for c in columns]
        styled = [f"[bold]{t}[/bold]" if scores[c] == best[c] else t for c, t in zip(columns, cells, strict=True)]
        result.add_row(name, *styled)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", default=QUICKSTART, help="checkpoint folders")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()

    torch.set_num_threads(1)
    try:
        rows = {folder: evaluate(Path(folder), args.split) for folder in args.folders}
    except ValueError as fault:
        print(f"error: {fault}\nhint: `make demo` trains and merges the quickstart's checkpoints", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps({"split": args.split, "accuracy": rows}, indent=2))
    else:
        Console().print(table(rows, args.split))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Learned soups and AdaMerging of the digits' fine-tunes against plain merges, over three seeds: a minute or two.

    python scripts/learned_soups.py --models demo/learned

Weights are learned on the validation split (AdaMerging sees its pictures without labels), the table is of the test
split: mean accuracy over the four tasks, in percent. Models are trained into the folder where it does not hold them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean, stdev

import torch
from digits import TASKS, Weights, accuracy, forward, load, show, split
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mergekit_lite

SEEDS = (0, 1, 2)
BATCH = 64
SINGLE, UNIFORM, FIXED = "best single model", "uniform soup", "task arithmetic, lambda 0.3"
LEARNED = {
    "learned soup": "{use: linear, of: {learned: OF}}",
    "learned soup by layer": "{use: linear, of: {learned: OF, by: layer}}",
    "AdaMerging by task": "{use: task_arithmetic, base: base, of: {learned: OF, loss: entropy}, with: {lambda: 0.3}}",
    "AdaMerging by layer": (
        "{use: task_arithmetic, base: base, of: {learned: OF, loss: entropy, by: layer}, with: {lambda: 0.3}}"
    ),
}
PLAIN = {
    UNIFORM: "{use: linear, of: OF}",
    FIXED: "{use: task_arithmetic, base: base, of: OF, with: {lambda: 0.3}}",
}
ROWS = (SINGLE, *PLAIN, *LEARNED)


def trained(folder: Path, seed: int) -> dict[str, Weights]:
    """The base and the fine-tunes of one seed."""
    place = folder / str(seed)
    if not (place / list(TASKS)[-1] / "model.safetensors").exists():
        script = Path(__file__).with_name("train_digits.py")
        words = [sys.executable, str(script), "--out", str(place), "--seed", str(seed)]
        subprocess.run(words, check=True, capture_output=True)
    return {name: load(place / name) for name in ("base", *TASKS)}


def mean_accuracy(weights: Weights, part: str) -> float:
    images, labels = split(part)
    return 100 * fmean(accuracy(weights, show(task, images), labels) for task in TASKS)


def labelled(tensors: Mapping[str, Tensor], batch: tuple[Tensor, Tensor], beta: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(beta * forward(dict(tensors), batch[0]), batch[1])


def entropy(tensors: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """The sum over tasks of the mean entropy of predictions; a batch has as many pictures of each task, in order."""
    log = forward(dict(tensors), batch[0]).log_softmax(dim=1)
    return -(log.exp() * log).sum(dim=1).mean() * len(TASKS)


def batches() -> list[tuple[Tensor, Tensor]]:
    """The validation split as all tasks show it."""
    images, labels = split("validation")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(5)).split(BATCH // len(TASKS))
    return [(torch.cat([show(task, images[i]) for task in TASKS]), labels[i].repeat(len(TASKS))) for i in order]


def recipe(folder: Path, step: str, seed: int) -> Path:
    path = folder / "recipe.yaml"
    named = ", ".join(f"{name}: ./{name}" for name in ("base", *TASKS))
    step = step.replace("OF", f"[{', '.join(TASKS)}]")
    path.write_text(f"version: 1\nseed: {seed}\nmodels: {{{named}}}\nsteps: {{m: {step}}}\n", encoding="utf-8")
    return path


def one_seed(folder: Path, seed: int) -> dict[str, float]:
    """The accuracy of every row on the test split."""
    models = trained(folder, seed)
    best = max(TASKS, key=lambda task: mean_accuracy(models[task], "validation"))
    found = {SINGLE: mean_accuracy(models[best], "test")}
    for name, step in PLAIN.items():
        made = mergekit_lite.merge_in_memory(mergekit_lite.load_recipe(recipe(folder, step, seed)), models)
        found[name] = mean_accuracy(made, "test")
    for name, step in LEARNED.items():
        beta = torch.ones((), requires_grad=True)
        soup = "entropy" not in step
        loss: Callable[..., Tensor] = (lambda t, b, beta=beta: labelled(t, b, beta)) if soup else entropy
        learned = mergekit_lite.learn(
            recipe(folder, step, seed), loss, batches=batches(), also=[beta] if soup else [], models=models, threads=1
        )
        found[name] = mean_accuracy(mergekit_lite.merge_in_memory(learned.recipe, models), "test")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("demo/learned"))
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.models.mkdir(parents=True, exist_ok=True)
    runs = [one_seed(args.models, seed) for seed in args.seeds]
    table = Table(title=f"mean accuracy over {len(TASKS)} tasks on the test split, percent")
    table.add_column("merge")
    for column in (*(f"seed {seed}" for seed in args.seeds), "mean", "spread"):
        table.add_column(column, justify="right")
    for row in ROWS:
        values = [run[row] for run in runs]
        spread = stdev(values) if len(values) > 1 else 0.0
        table.add_row(row, *(f"{value:.1f}" for value in (*values, fmean(values))), f"{spread:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()

"""Train the demo's checkpoints: one base and one fine-tune per task, about ten seconds on one core.

    python scripts/train_digits.py --out demo

The base sees a few images of every task and knows each of them poorly. A fine-tune goes on from the base with all
training images of its own task, and rehearses the base's few images of the others so that it forgets nothing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from digits import TASKS, Weights, forward, save, show, split
from torch import Tensor

FEW = 60  # images per task that the base sees, and that every fine-tune rehearses
WIDTH, LAYERS = 256, 3


def fresh(seed: int) -> Weights:
    """Random weights as torch.nn.Linear draws them."""
    torch.manual_seed(seed)
    weights: Weights = {}
    for index in range(LAYERS):
        layer = torch.nn.Linear(WIDTH if index else 64, WIDTH)
        weights |= {f"encoder.layers.{index}.{name}": value.detach() for name, value in layer.named_parameters()}
    head = torch.nn.Linear(WIDTH, 10)
    return weights | {f"head.{name}": value.detach() for name, value in head.named_parameters()}


def train(start: Weights, pixels: Tensor, labels: Tensor, *, epochs: int, rate: float, seed: int) -> Weights:
    """Adam on cross-entropy from `start`, which stays as it is."""
    weights = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=rate)
    torch.manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(forward(weights, pixels[batch]), labels[batch]).backward()
            optimizer.step()
    return {name: value.detach() for name, value in weights.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the checkpoints")
    parser.add_argument("--epochs", type=int, default=15, help="epochs of the base and of every fine-tune")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # One thread: the sums are then formed in one order, and the same machine gives the same weights each time.
    torch.set_num_threads(1)
    started = time.perf_counter()
    images, labels = split("train")
    few = {task: show(task, images[:FEW]) for task in TASKS}
    few_labels = labels[:FEW]

    base = train(
        fresh(args.seed),
        torch.cat(list(few.values())),
        few_labels.repeat(len(few)),
        epochs=args.epochs,
        rate=1e-3,
        seed=args.seed + 1,
    )
    save(args.out / "base", base)
    for number, task in enumerate(TASKS):
        others = [pixels for name, pixels in few.items() if name != task]
        tuned = train(
            base,
            torch.cat([show(task, images), *others]),
            torch.cat([labels, few_labels.repeat(len(others))]),
            epochs=args.epochs,
            rate=3e-4,
            seed=args.seed + 10 + number,
        )
        save(args.out / task, tuned)
    names = ", ".join(["base", *TASKS])
    print(f"trained {names} in {time.perf_counter() - started:.1f} s, wrote them to {args.out}")


if __name__ == "__main__":
    main()

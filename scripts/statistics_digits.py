"""Collect the statistics that `fisher` and `regmean` ask for, of the demo's fine-tunes: some seconds on one core.

    python scripts/statistics_digits.py --models demo --out demo/statistics

For every task it writes two checkpoints: `TASK-fisher` with the diagonal Fisher information of every parameter, and
`TASK-gram` with the Gram matrix of the inputs of every linear layer, under the name of the layer's weight.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from digits import TASKS, Weights, forward, load, show, split
from safetensors.torch import save_file
from torch import Tensor

EXAMPLES = 256


def fisher(weights: Weights, pixels: Tensor) -> Weights:
    """E_x E_{y ~ p(y|x)} (d log p(y|x) / d theta)^2: exact over the classes, squared example by example."""
    found = {name: torch.zeros_like(value) for name, value in weights.items()}
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    for row in pixels:
        scores = torch.log_softmax(forward(leaves, row[None]), dim=1)[0]
        for score in scores:
            slopes = torch.autograd.grad(score, list(leaves.values()), retain_graph=True)
            for name, slope in zip(leaves, slopes, strict=True):
                found[name] += score.exp().detach() * slope.square() / len(pixels)
    return found


def grams(weights: Weights, pixels: Tensor) -> Weights:
    """X^T X / n of the inputs of every linear layer."""
    found: Weights = {}
    hidden = pixels
    layers = sum(name.startswith("encoder.layers.") and name.endswith(".weight") for name in weights)
    for part in [*(f"encoder.layers.{i}" for i in range(layers)), "head"]:
        found[f"{part}.weight"] = hidden.T @ hidden / len(hidden)
        hidden = torch.relu(torch.nn.functional.linear(hidden, weights[f"{part}.weight"], weights[f"{part}.bias"]))
    return found


def write(folder: Path, tensors: Weights) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("demo"))
    parser.add_argument("--out", type=Path, default=Path("demo/statistics"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    images, _ = split("train")
    for task in TASKS:
        weights = load(args.models / task)
        pixels = show(task, images[:EXAMPLES])
        write(args.out / f"{task}-fisher", fisher(weights, pixels))
        write(args.out / f"{task}-gram", grams(weights, pixels))
    print(f"wrote statistics of {', '.join(TASKS)} to {args.out}")


if __name__ == "__main__":
    main()

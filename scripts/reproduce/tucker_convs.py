"""A small convolutional network on scikit-learn's digits, fine-tuned on turned ones, and the change of its two larger
convolutions cut down: by Tucker's decomposition, and as a matrix with at least as many numbers.

Every merge is a recipe, run by `merge_in_memory`. What is merged is the base with the fine-tune's two convolutions of
3x3 that have many channels on both sides; all else is the base's.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from mergekit_lite import load_recipe, merge_in_memory

Weights = dict[str, Tensor]
CONVS = ("layers.1.weight", "layers.2.weight")


@dataclass(frozen=True)
class Setting:
    """`channels` of the three convolutions; `train` is the number of images learnt, the others are the test's. The base
    learns them as they are, the fine-tune, all of its weights, turned by 90°."""

    channels: tuple[int, int, int] = (32, 64, 64)
    train: int = 1200
    batch: int = 64
    base_epochs: int = 15
    base_rate: float = 3e-3
    epochs: int = 20
    rate: float = 3e-3
    ranks: tuple[int, ...] = (8, 16)


class Net(nn.Module):
    """Convolutions of 3x3 with ReLU, the second with stride 2, the mean over the pixels, 10 scores."""

    def __init__(self, channels: tuple[int, int, int]):
        super().__init__()
        pairs = zip((1, *channels), channels, strict=False)
        self.layers = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1, stride=2 if n == 1 else 1) for n, (i, o) in enumerate(pairs)
        )
        self.head = nn.Linear(channels[-1], 10)

    def forward(self, pixels: Tensor) -> Tensor:
        for layer in self.layers:
            pixels = torch.relu(layer(pixels))
        found: Tensor = self.head(pixels.mean((2, 3)))
        return found


@dataclass(frozen=True)
class Trained:
    """The base, its fine-tune, and the turned images and labels of the test."""

    net: Net
    base: Weights
    tuned: Weights
    images: Tensor
    labels: Tensor

    def accuracy(self, weights: Mapping[str, Tensor]) -> float:
        with torch.no_grad():
            scores = functional_call(self.net, dict(weights), (self.images,))
        return float((scores.argmax(1) == self.labels).double().mean())


def trained(seed: int, setting: Setting) -> Trained:
    """The networks of one seed: some seconds."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[order][:, None]
    labels = torch.tensor(digits.target)[order]
    turned = torch.rot90(images, 1, (2, 3))
    torch.manual_seed(1000 + seed)
    net = Net(setting.channels)

    def fit(shown: Tensor, epochs: int, rate: float) -> Weights:
        optimizer = torch.optim.Adam(net.parameters(), lr=rate)
        for _ in range(epochs):
            for seen in torch.randperm(setting.train).split(setting.batch):
                optimizer.zero_grad()
                cross_entropy(net(shown[seen]), labels[seen]).backward()
                optimizer.step()
        return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}

    base = fit(images, setting.base_epochs, setting.base_rate)
    tuned = fit(turned, setting.epochs, setting.rate)
    return Trained(net, base, tuned, turned[setting.train :], labels[setting.train :])


def merged(models: Mapping[str, Weights], steps: Mapping[str, Any]) -> Weights:
    """The last of the steps."""
    recipe = {
        "version": 1,
        "models": {name: f"models/{name}" for name in models},
        "steps": dict(steps),
        "save": {"step": list(steps)[-1], "to": "out/merged"},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return merge_in_memory(load_recipe(path), models, threads=1)


def tucker(models: Mapping[str, Weights], rank: int) -> Weights:
    return merged(models, {"small": {"use": "tucker", "of": "whole", "base": "base", "with": {"rank": rank}}})


def as_matrices(models: Mapping[str, Weights], ranks: Mapping[str, int]) -> Weights:
    """The change of each convolution as a matrix (out, in x 3 x 3) of this rank."""
    return merged(
        models,
        {
            "change": {"use": "delta", "of": "whole", "base": "base"},
            "small": {"use": "decompose", "of": "change", "with": {"rank": {**ranks, "else": 1}, "share": 0.0}},
            "merged": {"use": "add", "of": "small", "base": "base"},
        },
    )


def numbers(shape: torch.Size, rank: int) -> int:
    """What Tucker's core and factors take with this rank along the first two axes."""
    ranks: list[int] = [min(rank, shape[0]), min(rank, shape[1]), *shape[2:]]
    return math.prod(ranks) + sum(int(n) * r for n, r in zip(shape, ranks, strict=True))


def matrix_rank(shape: torch.Size, rank: int) -> int:
    """The least rank of the matrix whose two factors take at least as many numbers."""
    return -(-numbers(shape, rank) // (shape[0] + shape[1:].numel()))


def tails(change: Tensor, rank: int) -> float:
    """The sum of the squared singular values that are left out along the first two axes: the bound on the squared error
    of HOSVD."""
    found = 0.0
    for axis in (0, 1):
        unfolded = np.moveaxis(change.double().numpy(), axis, 0).reshape(change.shape[axis], -1)
        found += float((np.linalg.svd(unfolded, compute_uv=False)[rank:] ** 2).sum())
    return found


def measure(seed: int, setting: Setting) -> dict[str, float]:
    """Relative errors by convolution and way, accuracies on turned images, and the largest share of HOSVD's bound that
    a squared error takes."""
    it = trained(seed, setting)
    whole = it.base | {name: it.tuned[name] for name in CONVS}
    models = {"base": it.base, "whole": whole}
    found = {"base": it.accuracy(it.base), "tuned": it.accuracy(it.tuned), "whole": it.accuracy(whole)}
    changes = {name: whole[name].double() - it.base[name].double() for name in CONVS}

    def error(weights: Weights, name: str) -> float:
        return float(((weights[name].double() - it.base[name].double()) - changes[name]).norm() / changes[name].norm())

    bounds = []
    for rank in setting.ranks:
        ways = {
            "tucker": tucker(models, rank),
            "matrix": as_matrices(models, {name: matrix_rank(change.shape, rank) for name, change in changes.items()}),
        }
        for way, weights in ways.items():
            found[f"{way} {rank}"] = it.accuracy(weights)
            found |= {f"{way} {rank} error {n}": error(weights, name) for n, name in enumerate(CONVS, 2)}
        for n, (name, change) in enumerate(changes.items(), 2):
            bounds.append((error(ways["tucker"], name) * float(change.norm())) ** 2 / tails(change, rank))
            found[f"size {rank} {n}"] = 100 * numbers(change.shape, rank) / change.numel()
            left, right = change.shape[0], change[0].numel()
            found[f"matrix size {rank} {n}"] = 100 * matrix_rank(change.shape, rank) * (left + right) / change.numel()
    full = tucker(models, max(setting.channels))
    return found | {"bound": max(bounds), "full": max(error(full, name) for name in CONVS)}

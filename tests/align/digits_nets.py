"""MLPs trained on scikit-learn's digits, as dicts of tensors that fit `align_nets.mlp`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import numpy as np
import torch
from align_nets import mlp
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

Weights = Mapping[str, Tensor]
TRAIN, VALIDATION, TEST = slice(0, 1000), slice(1000, 1300), slice(1300, None)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The tensors are small, and sums are formed in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Pixels (n, 64) in [0, 1] and labels, shuffled."""
    data, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]


def logits(weights: Weights, x: Tensor) -> Tensor:
    for i in range(len(weights) // 2):
        x = linear(x.relu() if i else x, weights[f"{i}.weight"], weights[f"{i}.bias"])
    return x


def loss(weights: Weights, part: slice) -> Tensor:
    pixels, labels = digits()
    return cross_entropy(logits(weights, pixels[part]), labels[part])


def accuracy(weights: Weights, part: slice) -> float:
    pixels, labels = digits()
    return float((logits(weights, pixels[part]).argmax(dim=1) == labels[part]).double().mean())


def train(widths: Sequence[int], seed: int, *, epochs: int = 15) -> dict[str, Tensor]:
    """Adam at 2e-3 on batches of 64 training images."""
    pixels, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in mlp(widths).shapes.items():
        bound = 1 / np.sqrt(shape[-1])
        weights[name] = ((2 * torch.rand(shape, generator=generator) - 1) * bound).requires_grad_()
    optimizer = torch.optim.Adam(list(weights.values()), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(1000, generator=generator).split(64):
            optimizer.zero_grad()
            cross_entropy(logits(weights, pixels[batch]), labels[batch]).backward()
            optimizer.step()
    return {name: tensor.detach() for name, tensor in weights.items()}


def between(a: Weights, b: Weights, alpha: float) -> dict[str, Tensor]:
    return {name: (1 - alpha) * a[name] + alpha * b[name] for name in a}


def losses_on_path(a: Weights, b: Weights, part: slice, points: int = 25) -> tuple[list[float], list[float]]:
    alphas = [i / (points - 1) for i in range(points)]
    with torch.no_grad():
        return [float(loss(between(a, b, alpha), part)) for alpha in alphas], alphas

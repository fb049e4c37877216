"""Networks that rely on features which are right only where they were trained: a zero-shot model and its fine-tune, of
WiSE-FT's kind, on scikit-learn's digits.

An input is 64 noisy pixels and 16 features of 10 numbers, each of which says a class: 8 of group A, 8 of group B. A
feature of a group that is right by p tells the image's class with probability p, and any class otherwise.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, one_hot

Weights = dict[str, Tensor]
FEATURES, CLASSES = 8, 10  # in a group


@dataclass(frozen=True)
class Setting:
    """Images, draws of noise and features of each, epochs, learning rates; how often group A and group B are right in
    the base's data, the fine-tune's and those of another distribution."""

    noise: float = 0.5
    width: int = 128
    layers: int = 2
    batch: int = 64
    base_images: int = 900
    base_draws: int = 8
    base_epochs: int = 8
    base_rate: float = 1e-3
    base_smoothing: float = 0.1
    images: int = 250
    draws: int = 4
    epochs: int = 20
    rate: float = 3e-3
    smoothing: float = 0.1  # of the second fine-tune
    base_right: tuple[float, float] = (0.4, 0.0)
    right: tuple[float, float] = (0.0, 0.4)
    shifted: tuple[float, float] = (0.15, 0.15)


@dataclass(frozen=True)
class Trained:
    """The models and the images of the test, as the fine-tune's distribution and another one show them."""

    base: Weights
    tuned: Weights
    smooth: Weights  # fine-tuned with label smoothing
    net: nn.Module
    own: tuple[Tensor, Tensor]
    other: tuple[Tensor, Tensor]

    def scores(self, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """The logits (n, 10)."""
        with torch.no_grad():
            found: Tensor = functional_call(self.net, dict(weights), (inputs,))
        return found

    def accuracy(self, weights: Mapping[str, Tensor], shown: tuple[Tensor, Tensor]) -> float:
        return float((self.scores(weights, shown[0]).argmax(1) == shown[1]).double().mean())

    def loss(self, weights: Mapping[str, Tensor], shown: tuple[Tensor, Tensor]) -> float:
        return float(cross_entropy(self.scores(weights, shown[0]).double(), shown[1]))


def _shown(
    images: Tensor, labels: Tensor, right: tuple[float, float], noise: float, draws: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`draws` inputs of every image, and their labels."""
    images, labels = images.repeat(draws, 1), labels.repeat(draws)
    pixels = images + noise * torch.randn(images.shape, generator=generator)
    told = []
    for share in right:
        size = (len(labels), FEATURES)
        drawn = torch.randint(CLASSES, size, generator=generator)
        true = torch.rand(size, generator=generator) < share
        told.append(torch.where(true, labels[:, None], drawn))
    features = one_hot(torch.cat(told, dim=1), CLASSES).flatten(1).float()
    return torch.cat([pixels, features], dim=1), labels


@functools.lru_cache(maxsize=3)
def trained(seed: int, setting: Setting) -> Trained:
    """The models of one seed: seconds."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.data / 16, dtype=torch.float32)[order]
    labels = torch.tensor(digits.target)[order]
    generator = torch.Generator().manual_seed(2000 + seed)
    torch.manual_seed(1000 + seed)
    sizes = [64 + 2 * FEATURES * CLASSES, *[setting.width] * setting.layers]
    pairs = itertools.pairwise(sizes)
    net = nn.Sequential(
        *(part for i, o in pairs for part in (nn.Linear(i, o), nn.ReLU())), nn.Linear(setting.width, CLASSES)
    )

    def part(start: int, stop: int | None, right: tuple[float, float], draws: int) -> tuple[Tensor, Tensor]:
        return _shown(images[start:stop], labels[start:stop], right, setting.noise, draws, generator)

    def fit(shown: tuple[Tensor, Tensor], epochs: int, rate: float, smoothing: float) -> Weights:
        optimizer = torch.optim.Adam(net.parameters(), lr=rate)
        for _ in range(epochs):
            for seen in torch.randperm(len(shown[1])).split(setting.batch):
                optimizer.zero_grad()
                cross_entropy(net(shown[0][seen]), shown[1][seen], label_smoothing=smoothing).backward()
                optimizer.step()
        return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}

    first, last = setting.base_images, setting.base_images + setting.images
    base = fit(
        part(0, first, setting.base_right, setting.base_draws),
        setting.base_epochs,
        setting.base_rate,
        setting.base_smoothing,
    )
    learnt = part(first, last, setting.right, setting.draws)
    tuned = fit(learnt, setting.epochs, setting.rate, 0.0)
    net.load_state_dict(base)
    smooth = fit(learnt, setting.epochs, setting.rate, setting.smoothing)
    return Trained(base, tuned, smooth, net, part(last, None, setting.right, 4), part(last, None, setting.shifted, 4))

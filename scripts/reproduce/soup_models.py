"""Twelve fine-tunes of one network on noisy digits: the ingredients of soups."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

Weights = dict[str, Tensor]
Shown = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """Images of each split, noise on the pixels of all but the base's, and what the fine-tunes differ in."""

    width: int = 128
    base_images: int = 700
    base_epochs: int = 10
    base_rate: float = 1e-3
    images: int = 300
    validation: int = 300
    noise: float = 0.31
    batch: int = 32
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    epochs: tuple[int, ...] = (10, 20)
    smoothings: tuple[float, ...] = (0.0, 0.1)


@dataclass(frozen=True)
class Kitchen:
    """The base, its fine-tunes by name, and the noisy images that choose and judge."""

    net: nn.Module
    base: Weights
    tuned: Mapping[str, Weights]
    validation: Shown
    test: Shown

    def scores(self, weights: Mapping[str, Tensor], shown: Shown) -> Tensor:
        """The logits (n, 10)."""
        with torch.no_grad():
            found: Tensor = functional_call(self.net, dict(weights), (shown[0],))
        return found

    def accuracy(self, weights: Mapping[str, Tensor], shown: Shown) -> float:
        return float((self.scores(weights, shown).argmax(1) == shown[1]).double().mean())

    def loss(self, weights: Mapping[str, Tensor], shown: Shown) -> float:
        return float(cross_entropy(self.scores(weights, shown).double(), shown[1]))


@functools.lru_cache(maxsize=2)
def kitchen(seed: int, setting: Setting) -> Kitchen:
    """The models of one seed: some seconds."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.data / 16, dtype=torch.float32)[order]
    labels = torch.tensor(digits.target)[order]
    generator = torch.Generator().manual_seed(2000 + seed)
    noisy = images + setting.noise * torch.randn(images.shape, generator=generator)
    torch.manual_seed(1000 + seed)
    w = setting.width
    net = nn.Sequential(nn.Linear(64, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 10))

    def fit(shown: Shown, epochs: int, rate: float, smoothing: float) -> Weights:
        optimizer = torch.optim.Adam(net.parameters(), lr=rate)
        for _ in range(epochs):
            for seen in torch.randperm(len(shown[1])).split(setting.batch):
                optimizer.zero_grad()
                cross_entropy(net(shown[0][seen]), shown[1][seen], label_smoothing=smoothing).backward()
                optimizer.step()
        return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}

    a, b = setting.base_images, setting.base_images + setting.images
    c = b + setting.validation
    base = fit((images[:a], labels[:a]), setting.base_epochs, setting.base_rate, 0.0)
    tuned: dict[str, Weights] = {}
    for rate, epochs, smoothing in itertools.product(setting.rates, setting.epochs, setting.smoothings):
        net.load_state_dict(base)
        tuned[f"m{len(tuned)}"] = fit((noisy[a:b], labels[a:b]), epochs, rate, smoothing)
    return Kitchen(net, base, tuned, (noisy[b:c], labels[b:c]), (noisy[c:], labels[c:]))

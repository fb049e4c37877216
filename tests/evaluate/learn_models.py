"""Small networks whose merge is learned, and the losses that it is learned by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

Models = dict[str, dict[str, Tensor]]
Write = Callable[..., Path]
WIDTHS = (6, 9, 8, 4)
SOUP = "{use: linear, of: {learned: [a, b, c]BESIDE}}"
FACTORS = "{use: task_arithmetic, base: base, of: {learned: [a, b, c]BESIDE}, with: {lambda: 0.3}}"
STEPS = {"soup": SOUP, "factors": FACTORS}
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(4, (40,), generator=torch.Generator().manual_seed(2))


def scores(tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    for i in range(3):
        x = x @ tensors[f"layers.{i}.weight"].T + tensors[f"layers.{i}.bias"]
        x = x.tanh() if i < 2 else x
    return x


def labelled(tensors: Mapping[str, Tensor], rows: slice = slice(None)) -> Tensor:
    assert tensors["seen"].tolist() == [7] and tensors["seen"].dtype == torch.int64
    return cross_entropy(scores(tensors, X[rows]), Y[rows])


def entropy(tensors: Mapping[str, Tensor], rows: slice = slice(None)) -> Tensor:
    log = scores(tensors, X[rows]).log_softmax(dim=1)
    return -(log.exp() * log).sum(dim=1).mean()

"""Eight tasks on scikit-learn's digits, one shared encoder, a frozen linear head per task: what multi-task merges are
compared on (`make reproduce`).

A base encoder is trained on a few upright digits. Each task gets a linear probe on the base's features as its head; then the
encoder alone is fine-tuned for the task, so that all models differ in the encoder and only there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

Weights = dict[str, Tensor]
WIDTH, LAYERS = 512, 3
TRAIN, VALIDATION = 1000, 1250  # images up to these numbers; the rest is the test split


@dataclass(frozen=True)
class Task:
    """How the digits are shown and what is asked of them."""

    show: Callable[[Tensor], Tensor]
    label: Callable[[Tensor], Tensor]
    classes: int


@dataclass(frozen=True)
class Data:
    """One task's images (n, 64) and labels by split, and its head (classes, width) with bias."""

    images: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]
    head: Tensor
    bias: Tensor


def tasks(seed: int) -> dict[str, Task]:
    """The eight tasks; the shuffles and the noise are drawn from `seed`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rows, columns = torch.randperm(8, generator=generator), torch.randperm(8, generator=generator)
    noise = 0.3 * torch.randn(2000, 8, 8, generator=generator)

    def same(labels: Tensor) -> Tensor:
        return labels

    return {
        "upright": Task(lambda x: x, same, 10),
        "rot90": Task(lambda x: torch.rot90(x, 1, (1, 2)), same, 10),
        "rot180": Task(lambda x: torch.rot90(x, 2, (1, 2)), same, 10),
        "negative": Task(lambda x: 1 - x, same, 10),
        "flip": Task(lambda x: x.flip(2), same, 10),
        "row_parity": Task(lambda x: x[:, rows], lambda y: y % 2, 2),
        "noisy_large": Task(lambda x: x + noise[: len(x)], lambda y: (y >= 5).long(), 2),
        "column_mod3": Task(lambda x: x[:, :, columns], lambda y: y % 3, 3),
    }


def encode(weights: Weights, pixels: Tensor) -> Tensor:
    """Features (n, width) of images (n, 64)."""
    hidden = pixels
    for index in range(LAYERS):
        layer = f"encoder.layers.{index}"
        hidden = torch.relu(torch.nn.functional.linear(hidden, weights[f"{layer}.weight"], weights[f"{layer}.bias"]))
    return hidden


def accuracy(weights: Weights, data: Data, split: str) -> float:
    with torch.no_grad():
        scores = encode(weights, data.images[split]) @ data.head.T + data.bias
        return (scores.argmax(1) == data.labels[split]).double().mean().item()


def fit(leaves: list[Tensor], loss: Callable[[Tensor], Tensor], count: int, *, epochs: int, rate: float) -> None:
    """Adam over shuffled batches of 64; `loss` takes the indices of a batch."""
    optimizer = torch.optim.Adam(leaves, lr=rate)
    for _ in range(epochs):
        for batch in torch.randperm(count).split(64):
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()


def experiment(seed: int, *, base_epochs: int, epochs: int, rate: float) -> tuple[Weights, dict[str, Weights], dict[str, Data]]:
    """The base encoder, a fine-tuned encoder per task, and the tasks' data with their heads."""
    torch.manual_seed(seed)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[order]
    labels = torch.tensor(digits.target)[order]
    cuts = {"train": slice(0, TRAIN), "validation": slice(TRAIN, VALIDATION), "test": slice(VALIDATION, None)}

    base: Weights = {}
    for index in range(LAYERS):
        layer = torch.nn.Linear(WIDTH if index else 64, WIDTH)
        base |= {f"encoder.layers.{index}.{name}": value.detach() for name, value in layer.named_parameters()}
    top = torch.nn.Linear(WIDTH, 10)
    upright = images[cuts["train"]].flatten(1)
    leaves = {name: value.requires_grad_() for name, value in base.items()}
    fit(
        [*leaves.values(), *top.parameters()],
        lambda b: torch.nn.functional.cross_entropy(top(encode(leaves, upright[b])), labels[cuts["train"]][b]),
        len(upright),
        epochs=base_epochs,
        rate=1e-3,
    )
    base = {name: value.detach() for name, value in leaves.items()}

    tuned: dict[str, Weights] = {}
    data: dict[str, Data] = {}
    for name, task in tasks(seed).items():
        shown, asked = task.show(images).flatten(1), task.label(labels)
        head = torch.nn.Linear(WIDTH, task.classes)
        x, y = shown[cuts["train"]], asked[cuts["train"]]
        features = encode(base, x)
        fit(
            list(head.parameters()),
            lambda b, f=features, y=y, h=head: torch.nn.functional.cross_entropy(h(f[b]), y[b]),
            len(x),
            epochs=20,
            rate=1e-2,
        )
        weight, bias = head.weight.detach(), head.bias.detach()
        mine = {key: value.clone().requires_grad_() for key, value in base.items()}
        fit(
            list(mine.values()),
            lambda b, m=mine, x=x, y=y, w=weight, c=bias: torch.nn.functional.cross_entropy(
                torch.nn.functional.linear(encode(m, x[b]), w, c), y[b]
            ),
            len(x),
            epochs=epochs,
            rate=rate,
        )
        tuned[name] = {key: value.detach() for key, value in mine.items()}
        split = {key: shown[cut] for key, cut in cuts.items()}
        data[name] = Data(split, {key: asked[cut] for key, cut in cuts.items()}, weight, bias)
    return base, tuned, data

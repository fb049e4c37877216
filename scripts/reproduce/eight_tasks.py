"""Eight tasks on scikit-learn's digits, one shared encoder, a frozen linear head per task: what multi-task merges are
compared on (`make reproduce`).

A base encoder learns the upright digits. Each task gets a linear head, fitted to the base's features and then frozen;
the encoder alone is fine-tuned for the task, so that the models differ in the encoder and only there. All numbers are
those of `Setting`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import eight_vit
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

Weights = dict[str, Tensor]
LAYERS = 3
HEAD = ("head.weight", "head.bias")


@dataclass(frozen=True)
class Setting:
    """How everything is trained. `kind` of the encoder: mlp, three layers, or vit, three blocks. `train` and
    `validation` are numbers of images, the test split is the rest. Pixels lie between 0 and `white`; `noise` is the
    deviation of what is added to them. If `standardized`, they then get mean 0 and deviation 1 over a task's training
    images. A base of 0 epochs keeps its initial weights."""

    kind: str = "mlp"
    width: int = 512
    train: int = 1000
    validation: int = 250
    white: float = 1.0
    standardized: bool = True
    noise: float = 0.3
    base_batch: int = 64
    base_epochs: int = 0
    base_rate: float = 1e-3
    head_epochs: int = 15
    head_rate: float = 1e-3
    batch: int = 64
    epochs: int = 25
    rate: float = 2e-4


@dataclass(frozen=True)
class Task:
    """How the digits (n, 8, 8) are shown, what is asked of them, and how many answers there are."""

    show: Callable[[Tensor], Tensor]
    label: Callable[[Tensor], Tensor]
    classes: int


@dataclass(frozen=True)
class Data:
    """One task's images (n, 64) and labels by split, and its head."""

    images: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]
    head: Weights


@dataclass(frozen=True)
class Experiment:
    """The base encoder, and by task its fine-tuned encoder and its data."""

    base: Weights
    tuned: Mapping[str, Weights]
    data: Mapping[str, Data]


def tasks(seed: int, noise: float, white: float) -> dict[str, Task]:
    """The eight tasks on pixels from 0 to `white`; the shuffles and the noise, of standard deviation `noise`, are drawn
    from `seed`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rows, columns = torch.randperm(8, generator=generator), torch.randperm(8, generator=generator)
    grain = noise * torch.randn(2000, 8, 8, generator=generator)

    def same(labels: Tensor) -> Tensor:
        return labels

    return {
        "upright": Task(lambda x: x, same, 10),
        "rot90": Task(lambda x: torch.rot90(x, 1, (1, 2)), same, 10),
        "rot180": Task(lambda x: torch.rot90(x, 2, (1, 2)), same, 10),
        "negative": Task(lambda x: white - x, same, 10),
        "flip": Task(lambda x: x.flip(2), same, 10),
        "row_parity": Task(lambda x: x[:, rows], lambda y: y % 2, 2),
        "noisy_large": Task(lambda x: x + grain[: len(x)], lambda y: (y >= 5).long(), 2),
        "column_mod3": Task(lambda x: x[:, :, columns], lambda y: y % 3, 3),
    }


def activations(encoder: Weights, pixels: Tensor) -> list[Tensor]:
    """The inputs of every layer, (n, 64) first, and at last the features (n, width)."""
    found = [pixels]
    for index in range(LAYERS):
        layer = f"encoder.layers.{index}"
        found.append(torch.relu(linear(found[-1], encoder[f"{layer}.weight"], encoder[f"{layer}.bias"])))
    return found


def scores(encoder: Weights, head: Weights, pixels: Tensor) -> Tensor:
    """Scores (n, classes) of images (n, 64)."""
    found = eight_vit.features(encoder, pixels) if eight_vit.FIRST in encoder else activations(encoder, pixels)[-1]
    return linear(found, head["head.weight"], head["head.bias"])


def accuracy(encoder: Weights, data: Data, split: str) -> float:
    with torch.no_grad():
        return (scores(encoder, data.head, data.images[split]).argmax(1) == data.labels[split]).double().mean().item()


def experiment(seed: int, setting: Setting, cache: Path) -> Experiment:
    """The models of one seed, trained (some twenty seconds on one core) or read from the folder `cache`."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.images / 16 * setting.white, dtype=torch.float32)[order]
    labels = torch.tensor(digits.target)[order]
    held = setting.train + setting.validation
    cuts = {"train": slice(0, setting.train), "validation": slice(setting.train, held), "test": slice(held, None)}

    kinds = tasks(seed, setting.noise, setting.white)
    shown: dict[str, dict[str, Tensor]] = {}
    asked: dict[str, dict[str, Tensor]] = {}
    for name, task in kinds.items():
        pixels = task.show(images).flatten(1)
        if setting.standardized:
            seen = pixels[cuts["train"]]
            pixels = (pixels - seen.mean()) / seen.std()
        shown[name] = {split: pixels[cut] for split, cut in cuts.items()}
        asked[name] = {split: task.label(labels)[cut] for split, cut in cuts.items()}

    def trained() -> dict[str, Weights]:
        classes = {name: task.classes for name, task in kinds.items()}
        return _train(
            seed, setting, {n: s["train"] for n, s in shown.items()}, {n: a["train"] for n, a in asked.items()}, classes
        )

    models = _cached(trained, ["base", *kinds], cache / _digest(seed, setting))
    data = {n: Data(shown[n], asked[n], {key: models[n].pop(key) for key in HEAD}) for n in kinds}
    return Experiment(models.pop("base"), models, data)


def _train(
    seed: int,
    setting: Setting,
    images: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    classes: Mapping[str, int],
) -> dict[str, Weights]:
    """`base`, the encoder alone, and for every task its fine-tuned encoder with its head."""
    torch.manual_seed(seed)
    if setting.kind == "vit":
        encoder = eight_vit.initial(setting.width, LAYERS)
    else:
        layers = [torch.nn.Linear(setting.width if index else 64, setting.width) for index in range(LAYERS)]
        encoder = {
            f"encoder.layers.{i}.{n}": p.detach() for i, layer in enumerate(layers) for n, p in layer.named_parameters()
        }

    def fit(weights: Weights, learned: Collection[str], task: str, batch: int, epochs: int, rate: float) -> Weights:
        """`weights` with the `learned` ones trained by Adam over shuffled batches."""
        leaves = {name: w.clone().requires_grad_(name in learned) for name, w in weights.items()}
        optimizer = torch.optim.Adam([leaves[name] for name in learned], lr=rate, fused=True)
        for _ in range(epochs):
            for seen in torch.randperm(setting.train).split(batch):
                optimizer.zero_grad()
                cross_entropy(scores(leaves, leaves, images[task][seen]), labels[task][seen]).backward()
                optimizer.step()
        return {name: leaf.detach() for name, leaf in leaves.items()}

    def head(count: int) -> Weights:
        layer = torch.nn.Linear(setting.width, count)
        return {name: p.detach() for name, p in zip(HEAD, layer.parameters(), strict=True)}

    s = setting
    found = fit({**encoder, **head(10)}, [*encoder, *HEAD], "upright", s.base_batch, s.base_epochs, s.base_rate)
    base = {name: found[name] for name in encoder}
    models = {"base": base}
    for task, count in classes.items():
        probed = fit({**base, **head(count)}, HEAD, task, s.batch, s.head_epochs, s.head_rate)
        models[task] = fit(probed, list(base), task, s.batch, s.epochs, s.rate)
    return models


def _cached(make: Callable[[], dict[str, Weights]], names: Collection[str], folder: Path) -> dict[str, Weights]:
    files = {name: folder / f"{name}.safetensors" for name in names}
    if not all(file.is_file() for file in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        for name, weights in make().items():
            save_file(weights, files[name])
    return {name: load_file(file) for name, file in files.items()}


def _digest(seed: int, setting: Setting) -> str:
    """Changes with everything that the models depend on, this file included."""
    text = f"{Path(__file__).read_text(encoding='utf-8')}{setting}{torch.__version__}"
    return f"{seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def grams(encoder: Weights, pixels: Tensor) -> Weights:
    """X^T X / n of the inputs X of every layer, under the name of its weight: what `regmean` asks for."""
    inputs = activations(encoder, pixels)[:LAYERS]
    return {f"encoder.layers.{index}.weight": x.T @ x / len(x) for index, x in enumerate(inputs)}


def fisher(encoder: Weights, head: Weights, pixels: Tensor) -> Weights:
    """The diagonal Fisher information E_x E_{y ~ p(y|x)} (d log p(y|x) / d theta)^2 of the encoder.

    Exact over the classes. In a linear layer an example's gradient is the outer product of the slope at the layer's
    output and its input, so the sum of the squares over the examples is a product of squares.
    """
    found = {name: torch.zeros_like(value) for name, value in encoder.items()}
    inputs = activations(encoder, pixels)
    chances = torch.softmax(scores(encoder, head, pixels), dim=1)
    for answer in range(chances.shape[1]):
        slope = -chances @ head["head.weight"] + head["head.weight"][answer]
        for index in reversed(range(LAYERS)):
            layer = f"encoder.layers.{index}"
            slope = slope * (inputs[index + 1] > 0)
            squares = slope.square() * chances[:, answer : answer + 1] / len(pixels)
            found[f"{layer}.weight"] += squares.T @ inputs[index].square()
            found[f"{layer}.bias"] += squares.sum(0)
            slope = slope @ encoder[f"{layer}.weight"]
    return found

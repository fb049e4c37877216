"""What the demo's training and evaluation share: the digits, the four tasks and a small network in a folder.

One task is one way of showing the same 8x8 digits (upright, turned, negative, mirrored). All tasks share the ten
classes and one head, so a single merged network can answer them all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor

TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda images: images,
    "turned": lambda images: torch.rot90(images, 1, (1, 2)),
    "negative": lambda images: 1 - images,
    "mirrored": lambda images: images.flip(2),
}
SPLITS = {"train": slice(0, 1000), "validation": slice(1000, 1300), "test": slice(1300, None)}
Weights = dict[str, Tensor]


def split(name: str) -> tuple[Tensor, Tensor]:
    """Images (n, 8, 8) in [0, 1] and labels of one split; the shuffle is the same on every call."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[SPLITS[name]]
    return torch.tensor(data.images / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]


def show(task: str, images: Tensor) -> Tensor:
    """The images as `task` shows them, one row of 64 pixels each."""
    return TASKS[task](images).flatten(1)


def forward(weights: Weights, pixels: Tensor) -> Tensor:
    """Scores of the ten classes: an encoder of ReLU layers, then the head."""
    hidden = pixels
    for index in range(sum(name.startswith("encoder.layers.") and name.endswith(".weight") for name in weights)):
        prefix = f"encoder.layers.{index}"
        hidden = torch.relu(torch.nn.functional.linear(hidden, weights[f"{prefix}.weight"], weights[f"{prefix}.bias"]))
    return torch.nn.functional.linear(hidden, weights["head.weight"], weights["head.bias"])


def accuracy(weights: Weights, pixels: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (forward(weights, pixels).argmax(1) == labels).double().mean().item()


def save(folder: Path, weights: Weights) -> None:
    """Write a checkpoint folder: `config.json` and `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "digits_mlp",
        "input_size": weights["encoder.layers.0.weight"].shape[1],
        "hidden_size": weights["head.weight"].shape[1],
        "num_hidden_layers": len(weights) // 2 - 1,
        "num_labels": weights["head.weight"].shape[0],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")


def load(folder: Path) -> Weights:
    """Read a checkpoint folder, in one file or in shards; ValueError says what is missing."""
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not files:
        raise ValueError(f"no checkpoint in {folder}: it needs config.json and *.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "digits_mlp":
        raise ValueError(f"{folder} is not a digits_mlp checkpoint")
    weights = {name: tensor.float() for file in files for name, tensor in load_file(file).items()}
    for part in [*(f"encoder.layers.{i}" for i in range(config["num_hidden_layers"])), "head"]:
        for name in (f"{part}.weight", f"{part}.bias"):
            if name not in weights:
                raise ValueError(f"{folder} lacks the tensor {name}")
    return weights

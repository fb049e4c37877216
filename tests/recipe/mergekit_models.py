"""Tiny Llama-shaped models for the tests of mergekit's recipes, and mergekit's formulas in plain torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lite import load_recipe, merge_in_memory

LAYERS = 4
OUTSIDE = {"model.embed_tokens.weight": (12, 6), "model.norm.weight": (6,), "lm_head.weight": (12, 6)}
LAYER = {"self_attn.o_proj.weight": (6, 6), "mlp.up_proj.weight": (9, 6), "mlp.down_proj.weight": (6, 9)}
CONFIG = {"model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": 6, "tie_word_embeddings": False}
State = dict[str, Tensor]


def state(seed: int, layers: int = LAYERS, base: State | None = None) -> State:
    """Random tensors, or a fine-tune of `base` whose changes are about as large as its entries."""
    generator = torch.Generator().manual_seed(seed)
    names = OUTSIDE | {f"model.layers.{i}.{rest}": shape for i in range(layers) for rest, shape in LAYER.items()}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    return drawn if base is None else {name: x + base[name] for name, x in drawn.items()}


BASE = state(0)
MODELS: Mapping[str, State] = {"base": BASE, **{name: state(i, base=BASE) for i, name in enumerate("abc", start=1)}}


def merged(path: Path, text: str) -> State:
    """What the recipe `text` makes of the models above, which it calls `./base`, `./a`, `./b` and `./c`."""
    path.write_text(text, encoding="utf-8")
    return merge_in_memory(load_recipe(path), MODELS, config=CONFIG)


def depth(name: str, layers: int = LAYERS) -> float:
    """mergekit's t: 0 in the first layer and outside the layers, 1 in the last."""
    parts = name.split(".")
    return int(parts[2]) / (layers - 1) if parts[1] == "layers" else 0.0


def setting(value: Any, name: str, t: float) -> Any:
    """A parameter's value for one tensor as mergekit's documentation describes it; None where no filter fits."""
    if not isinstance(value, list):
        return value
    if all(not isinstance(item, dict) for item in value):
        place = t * (len(value) - 1)
        left = min(int(place), len(value) - 1)
        right = min(left + 1, len(value) - 1)
        return value[left] * (1 - (place - left)) + value[right] * (place - left)
    for item in value:
        if item.get("filter") in (None, "*") or item["filter"] in name:
            return setting(item["value"], name, t)
    return None


def slerp(t: float, a: Tensor, b: Tensor) -> Tensor:
    x, y = a.double().flatten(), b.double().flatten()
    cosine = (x @ y / x.norm() / y.norm()).item()
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
    mixed = torch.sin((1 - t) * angle) * a.double() + torch.sin(t * angle) * b.double()
    return (mixed / torch.sin(angle)).float()


def rescaled(kept: Tensor, delta: Tensor) -> Tensor:
    return kept * (delta.abs().sum() / kept.abs().sum())


def largest(delta: Tensor, density: float, skip: float = 0.0) -> Tensor:
    """The largest entries up to a share of `density`, after the first share of `skip`, which gives way."""
    if density >= 1:
        return delta
    n = delta.numel()
    count = int(density * n)
    top = min(int(skip * n), n - count)
    order = delta.abs().flatten().sort(descending=True).indices[top : top + count]
    kept = torch.zeros(n)
    kept[order] = delta.flatten()[order]
    return kept.reshape(delta.shape)


def consensus(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Weighted deltas that have the sign of their sum, added up and divided by their weights."""
    parts = torch.stack([d * w for d, w in zip(deltas, weights, strict=True)])
    agree = parts.sign() == torch.where(parts.sum(0) >= 0, 1, -1)
    total = (parts * agree).sum(0)
    shape = (-1,) + (1,) * (parts.dim() - 1)
    share = (torch.tensor(list(weights)).reshape(shape) * agree).sum(0)
    return total / torch.where(share == 0, 1.0, share) if normalize else total

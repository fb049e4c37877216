"""What tests of learned weights share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learn_models import WIDTHS, Models, Write
from torch import Tensor


@pytest.fixture
def models() -> Models:
    """Networks of three layers near a base, and a whole number that takes no part."""
    draw = torch.Generator().manual_seed(3)

    def some(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(3):
        shapes |= {f"layers.{i}.weight": (WIDTHS[i + 1], WIDTHS[i]), f"layers.{i}.bias": (WIDTHS[i + 1],)}
    base = {name: some(shape) for name, shape in shapes.items()}
    found = {m: {name: value + 0.5 * some(value.shape) for name, value in base.items()} for m in "abc"}
    return {m: {**tensors, "seen": torch.tensor([7])} for m, tensors in {**found, "base": base}.items()}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a recipe of this step, with `beside` in its hole."""

    def one(step: str, beside: str = "", more: str = "", steps: str = "") -> Path:
        path = tmp_path / "r.yaml"
        step = step.replace("BESIDE", beside)
        text = "version: 1\ncompute: float64\nmodels: {a: ./a, b: ./b, c: ./c, base: ./base}\n"
        path.write_text(f"{text}steps:\n  m: {step}\n{steps}{more}", encoding="utf-8")
        return path

    return one

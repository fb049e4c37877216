"""How often a run reads its inputs, as the plan says it beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lite import load_recipe, plan, run

STEPS = {
    "{use: linear, of: [a, b]}": 1,
    "{use: slerp, of: [a, b], with: {t: 0.4}}": 2,
    "{use: model_stock, base: base, of: [a, b]}": 2,
    "{use: breadcrumbs, base: base, of: [a, b], with: {density: 0.4}}": 3,
    "{use: ties, base: base, of: [a, b]}": 3,
    "{use: ties, base: base, of: [a, b], with: {scope: tensor}}": 3,
    "{use: tsv_m, base: base, of: [a, b]}": 1,
}


@pytest.mark.parametrize("step", STEPS)
def test_passes_are_those_of_the_run(step: str, tmp_path: Path) -> None:
    torch.manual_seed(1)  # a rank whose sample misleads is sought once more, and other numbers may mislead
    base = {f"layers.{i}.w": torch.randn(2000, 1000) for i in range(2)}
    for number, name in enumerate(("base", "a", "b")):
        tensors = {key: value + 0.01 * number * torch.randn_like(value) for key, value in base.items()}
        save_file({key: value.bfloat16() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
    names = ", ".join(f"{name}: {tmp_path / name}.safetensors" for name in ("base", "a", "b"))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"version: 1\nmodels: {{{names}}}\nsteps: {{m: {step}}}\nsave: {{to: {tmp_path / 'out'}}}\n")
    made = plan(load_recipe(recipe))
    used = 2 if "base" not in step else 3
    assert made.bytes_input == used * 2 * 2000 * 1000 * 2
    assert made.bytes_read == STEPS[step] * made.bytes_input
    # The first look of a rank is at a sample, which is much of a small tensor, and its last may not be needed.
    assert run(made).bytes_read == pytest.approx(made.bytes_read, rel=0.45)

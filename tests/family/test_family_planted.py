"""Checkpoints of every family, scrambled by a random member of their symmetry group: the engine puts every unit back,
bit for bit, though the copy is a noisy one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from family_models import MODELS, build, saved
from safetensors.torch import load_file, save_file

from mergekit_lite import load_recipe, plan, run
from mergekit_lite.align.apply import Order, moves, permuted
from mergekit_lite.family.axes import spaces_of

NOISE = 1e-3
# The same tables as another model here, or half an hour's more of the same.
LIKE_OTHERS = ("-tied-bias", "-classifier", "-tokens", "-answers", "-base", "-choice", "-masked", "-pretraining")
CHOSEN = [name for name in MODELS if not name.endswith(LIKE_OTHERS)]


@pytest.mark.parametrize("name", CHOSEN)
def test_a_scrambled_noisy_copy_is_put_back_in_order(name: str, tmp_path: Path) -> None:
    config, tensors = saved(build(MODELS[name]), tmp_path / "made")
    generator = torch.Generator().manual_seed(4)
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    noisy = {
        n: t + NOISE * torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
        for n, t in tensors.items()
    }
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    spaces = spaces_of(config, shapes)
    random = np.random.default_rng(1)
    orders: dict[str, Order] = {}
    for space in spaces:
        inner = [group * space.group + random.permutation(space.group) for group in random.permutation(space.groups)]
        orders[space.name] = np.concatenate(inner)
    moved = moves(spaces, orders, shapes)
    scrambled = noisy | {n: permuted(move, noisy[move.source]).contiguous() for n, move in moved.items()}
    for folder, held in (("a", tensors), ("b", scrambled)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(held, tmp_path / folder / "model.safetensors", {"format": "pt"})
    kinds = ", ".join(sorted({space.kind for space in spaces}))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"""version: 1
models: {{a: {tmp_path / "a"}, b: {tmp_path / "b"}}}
steps:
  m: {{use: permute, of: b, like: a, with: {{spaces: [{kinds}]}}}}
save: {{to: {tmp_path / "out"}}}
""",
        encoding="utf-8",
    )
    run(plan(load_recipe(recipe)), threads=2)
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert any(not torch.equal(scrambled[n], noisy[n]) for n in noisy)
    assert [n for n in noisy if not torch.equal(got[n], noisy[n])] == []

"""FLoRA adapters, saved as the published layers name their parameters, folded into a base by a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_for_runs import CONFIG
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_lite import InputError, RecipeError, load_recipe, plan, run
from mergekit_lite.cli.app import execute

SHAPES = {"image": (5, 4, 3, 2), "cube": (3, 4, 2, 1, 2), "flat": (6, 4), "left": (2, 2)}
ADAPTED = ("image", "cube", "flat")
RANKS = (2, 3, 1, 1, 2)


def randoms(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(folder: Path, prefix: str = "", scale: Any = 0.5) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A base in `base`, an adapter in `flora`; gives the base and the adapter's parameters."""
    base = {f"{name}.weight": randoms(shape, i) for i, (name, shape) in enumerate(SHAPES.items())}
    made: dict[str, Tensor] = {}
    for i, name in enumerate(ADAPTED):
        out, inputs, *kernel = SHAPES[name]
        dims = (inputs, out, *kernel)
        made[f"{name}.flora_layer.param_G"] = randoms(RANKS[: len(dims)], 10 + i)
        for axis, length in enumerate(dims):
            made[f"{name}.flora_layer.param_{axis}"] = randoms((length, RANKS[axis]), 20 + 8 * i + axis)
    (folder / "base").mkdir(parents=True)
    (folder / "base/config.json").write_text(json.dumps(CONFIG))
    save_file(base, folder / "base/model.safetensors")
    adapter(folder, {prefix + key: value for key, value in made.items()}, scale=scale)
    return base, made


def adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    (folder / "flora").mkdir(exist_ok=True)
    (folder / "flora/adapter_config.json").write_text(json.dumps({"peft_type": "FLORA", **config}))
    save_file(tensors, folder / "flora/adapter_model.safetensors")


def recipe(folder: Path) -> Path:
    text = f"version: 1\nmodels: {{m: {{path: {folder}/base, adapter: {folder}/flora}}}}\n"
    (folder / "r.yaml").write_text(f"{text}save: {{step: m, to: {folder}/out}}\n")
    return folder / "r.yaml"


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model."])
def test_it_is_folded_as_the_layers_add_it(prefix: str, tmp_path: Path) -> None:
    base, made = write(tmp_path, prefix)
    run(plan(load_recipe(recipe(tmp_path))), threads=2)
    got = load_file(tmp_path / "out/model.safetensors")
    for name in SHAPES:
        wanted = base[f"{name}.weight"].double()
        if name in ADAPTED:
            # The published forward, a contraction at a time; then its first two axes change places.
            change = made[f"{name}.flora_layer.param_G"].double()
            for axis in range(len(SHAPES[name])):
                change = torch.tensordot(change, made[f"{name}.flora_layer.param_{axis}"].double(), dims=[[0], [1]])
            wanted = wanted + 0.5 * change.transpose(0, 1)
        torch.testing.assert_close(got[f"{name}.weight"].double(), wanted, rtol=0, atol=2e-6)


def test_what_it_is_at_a_glance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    assert execute(["inspect", str(tmp_path / "flora"), "--json"]) == 0
    look = json.loads(capsys.readouterr().out)
    assert (look["kind"], look["scales"], look["tensors"]) == ("FLoRA", [0.5], 14)
    assert look["modules"] == dict.fromkeys(ADAPTED, 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("image.flora_layer.param_2"), "without their partners: `image.flora_layer"),
        (lambda t: t.update({"image.base_layer.weight": torch.ones(2)}), "no part of FLoRA: `image.base_layer.weight`"),
        (lambda t: t.update({"image.flora_layer.param_9": torch.ones(2)}), "without their partners"),
        (lambda t: t.update({"image.flora_layer.param_0": torch.ones(5, 2)}), "do not fit a weight of 5×4×3×2"),
        (lambda t: t.update({"image.flora_layer.param_G": torch.ones(2, 3, 1)}), "do not fit a weight of 5×4×3×2"),
        (lambda t: t.update({"image.flora_layer.param_0": torch.ones(4)}), "do not fit a weight of 5×4×3×2"),
    ],
)
def test_tensors_that_do_not_go_together(change: Any, says: str, tmp_path: Path) -> None:
    _, made = write(tmp_path)
    change(made)
    adapter(tmp_path, made, scale=1)
    with pytest.raises((InputError, RecipeError), match=says.replace("(", r"\(")):
        plan(load_recipe(recipe(tmp_path)))


@pytest.mark.parametrize("scale", [None, "4", True, float("inf")])
def test_a_scale_that_is_no_number(scale: Any, tmp_path: Path) -> None:
    write(tmp_path, scale=scale)
    with pytest.raises(InputError, match="`scale` is a number"):
        plan(load_recipe(recipe(tmp_path)))

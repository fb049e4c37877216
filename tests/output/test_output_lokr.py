"""Merges saved as LoKr adapters with Tucker's form for kernels: what peft loads, and what it makes of the base."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_output_adapters import _peft_may_warn, llama, merged, write_base, write_recipe
from test_output_lora import MODELS, loaded, save_model, tuned
from torch import Tensor, nn

from mergekit_lite import RecipeError, load_recipe, plan, run

__all__ = ["_peft_may_warn"]  # a fixture that every test here uses


class Kernels(nn.Module):
    """Kernels of one and of two axes, of one entry, in groups; and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(14, 20, 3, bias=False)
        self.tall = nn.Conv2d(4, 24, (3, 2), bias=False)
        self.point = nn.Conv2d(12, 18, 1, bias=False)
        self.groups = nn.Conv2d(16, 12, 3, groups=2, bias=False)
        self.line = nn.Conv1d(11, 16, 3, bias=False)
        self.linear = nn.Linear(15, 9, bias=False)
        self.config = {"model_type": "custom"}


def save(base: Path, other: Path, to: Path, settings: str) -> Any:
    text = f"version: 1\nmodels: {{base: {base}, other: {other}}}\n"
    text += f"save: {{step: other, as: lokr, base: base, to: {to}, {settings}}}\n"
    (to.parent / "r.yaml").write_text(text)
    return run(plan(load_recipe(to.parent / "r.yaml")))


@pytest.mark.parametrize("name", ["llama", "kernels"])
def test_at_full_rank_peft_gets_the_model_back(name: str, tmp_path: Path) -> None:
    model = Kernels() if name == "kernels" else llama()
    base, other = write_base(model, tmp_path / "base"), tuned(model)
    result = save(base, save_model(other, tmp_path / "other"), tmp_path / "lokr", "rank: 999")
    theirs, wanted = loaded(model, tmp_path / "lokr"), other.state_dict()
    assert set(theirs) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(theirs[key], value, rtol=0, atol=2e-6)
    errors = result.errors[str(tmp_path / "lokr")]
    assert all(left <= 1e-6 * whole for whole, left in errors.values())


@pytest.mark.parametrize("settings", ["rank: 4", "rank: 5, dtype: bfloat16", "energy: 0.8", "energy: 0.95, rank: 7"])
def test_errors_are_what_peft_s_model_lacks(settings: str, tmp_path: Path) -> None:
    """Forms and ranks are those that peft makes of the configuration; errors keep the bound of the decomposition."""
    model = Kernels()
    base, other = write_base(model, tmp_path / "base"), tuned(model, rank=None)
    result = save(base, save_model(other, tmp_path / "other"), tmp_path / "lokr", settings)
    theirs, start, wanted = loaded(model, tmp_path / "lokr"), model.state_dict(), other.state_dict()
    config = json.loads((tmp_path / "lokr/adapter_config.json").read_text())
    stored = load_file(tmp_path / "lokr/adapter_model.safetensors")
    if "rank: 4" in settings:
        assert {key.rpartition(".")[2] for key in stored if ".wide." in key} == {
            "lokr_w1",
            "lokr_t2",
            "lokr_w2_a",
            "lokr_w2_b",
        }
    for module, (whole, left) in result.errors[str(tmp_path / "lokr")].items():
        change = (wanted[f"{module}.weight"] - start[f"{module}.weight"]).double()
        assert whole == pytest.approx(float(change.norm()), rel=1e-5)
        found = float((wanted[f"{module}.weight"] - theirs[f"{module}.weight"]).double().norm())
        assert left == pytest.approx(found, rel=1e-3, abs=3e-6 * whole)
        if settings == "energy: 0.8":
            assert left**2 <= 0.2 * whole**2 * (1 + 1e-6)
        rank = config["rank_pattern"].get(f"^{module}", config["r"])
        if settings == "rank: 4" and 2 * rank < max(change.shape[:2]):
            bound = sum(
                float((torch.linalg.svdvals(change.movedim(axis, 0).flatten(1))[rank:] ** 2).sum()) for axis in (0, 1)
            )
            assert 0 < left**2 <= bound * (1 + 1e-6)
    # And this program reads what it has written.
    recipe = write_recipe(tmp_path, f"m: {{path: {base}, adapter: {tmp_path}/lokr}}")
    for key, value in merged(recipe, tmp_path / "back").items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=2e-6)


def test_a_planted_core_is_kept_with_fewer_numbers_than_lora(tmp_path: Path) -> None:
    model = Kernels()
    base = write_base(model, tmp_path / "base")
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(4)
    core, u, v = (torch.randn(s, generator=generator) for s in ((2, 3, 3, 3), (20, 2), (14, 3)))
    with torch.no_grad():
        other.wide.weight += torch.einsum("abkl,oa,ib->oikl", core, u, v)
    folder = save_model(other, tmp_path / "other")
    result = save(base, folder, tmp_path / "lokr", "energy: 0.9999999, targets: wide.weight")
    ((whole, left),) = result.errors[str(tmp_path / "lokr")].values()
    sizes: list[Tensor] = list(load_file(tmp_path / "lokr/adapter_model.safetensors").values())
    assert left <= 1e-4 * whole and sum(t.numel() for t in sizes) == 1 + 3 * 3 * 9 + 3 * (20 + 14)
    rank = int(torch.linalg.matrix_rank((other.wide.weight - model.wide.weight).flatten(1), rtol=1e-5))
    assert sum(t.numel() for t in sizes) < rank * (20 + 14 * 9)


def test_what_peft_has_no_lokr_for(tmp_path: Path) -> None:
    """GPT-2's layers, and convolutions whose biases have changed too: peft loads no adapter that is whole modules."""
    for name in ("gpt2", "convolutions"):
        model = MODELS[name]()
        base = write_base(model, tmp_path / name / "base")
        other = save_model(tuned(model), tmp_path / name / "other")
        with pytest.raises(RecipeError, match="has factors for none"):
            save(base, other, tmp_path / name / "lokr", "rank: 2, targets: ['*c_attn*', wide*, point*]")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("as: loha, base: base, rank: 2", "`as` must be lora, lokr or masks"),
        ("as: lokr, base: base, rank: 2, svd: randomised", "no randomised search"),
        ("as: lokr, rank: 2", "names its `base`"),
    ],
)
def test_wrong_saves(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(f"version: 1\nmodels: {{base: ./b}}\nsave: {{step: base, to: x, {text}}}\n")
    with pytest.raises(RecipeError, match=says):
        load_recipe(tmp_path / "w.yaml")

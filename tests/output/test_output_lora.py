"""Merges saved as adapters: what peft loads, and what it makes of the base with them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from test_output_adapters import Convolutions, _peft_may_warn, gpt2, llama, merged, write_base, write_recipe
from torch import Tensor, nn

from mergekit_lite import load_recipe, plan, run

__all__ = ["_peft_may_warn"]  # a fixture that every test here uses
KEYS: Callable[[Path], dict[str, Tensor]] = lambda folder: load_file(folder / "adapter_model.safetensors")  # noqa: E731


class Depthwise(Convolutions):
    """With a layer that takes its channels one by one, and statistics of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Conv2d(6, 6, 3, groups=6)
        self.norm = nn.BatchNorm2d(6)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama_tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "convolutions": Depthwise,
}


def tuned(model: Any, seed: int = 9, rank: int | None = None) -> Any:
    """A copy with every parameter changed a little, matrices by a change of `rank`."""
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if rank is not None and parameter.ndim > 1:
                columns = parameter[0].numel()
                change = torch.randn(len(parameter), rank, generator=generator)
                change = change @ torch.randn(rank, columns, generator=generator) / rank
                parameter.add_(0.05 * change.view_as(parameter))
            else:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


def save_model(model: Any, folder: Path) -> Path:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        from safetensors.torch import save_file

        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def saved(base: Path, other: Path, to: Path, settings: str, *more: str) -> Any:
    text = f"version: 1\nmodels: {{base: {base}, other: {other}}}\n"
    (to.parent / "r.yaml").write_text(f"{text}save: {{step: other, as: lora, base: base, to: {to}, {settings}}}\n")
    return run(plan(load_recipe(to.parent / "r.yaml", more)))


def loaded(model: Any, folder: Path) -> dict[str, Tensor]:
    return dict(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload().state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_at_full_rank_peft_gets_the_model_back(name: str, tmp_path: Path) -> None:
    """Every parameter: linear layers, convolutions, embeddings, norms, biases, a tied head."""
    model = MODELS[name]()
    base = write_base(model, tmp_path / "base")
    other = tuned(model)
    result = saved(base, save_model(other, tmp_path / "other"), tmp_path / "lora", "rank: 999")
    theirs, wanted = loaded(model, tmp_path / "lora"), other.state_dict()
    assert set(theirs) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(theirs[key], value, rtol=0, atol=2e-6)
    errors = result.errors[str(tmp_path / "lora")]
    assert errors and all(left <= 1e-6 * whole for whole, left in errors.values())
    # And so do we, from the same folder.
    recipe = write_recipe(tmp_path, f"m: {{path: {base}, adapter: {tmp_path}/lora}}")
    ours = merged(recipe, tmp_path / "back")
    assert len(ours) >= len(wanted) - 1
    for key, value in ours.items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=2e-6)


@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_logits_of_a_change_of_low_rank(svd: str, tmp_path: Path) -> None:
    """A rank that suffices loses nothing: peft's model beside the adapter gives the tuned model's logits."""
    model = llama()
    base = write_base(model, tmp_path / "base")
    other = tuned(model, rank=3)
    saved(base, save_model(other, tmp_path / "other"), tmp_path / "lora", f"rank: 4, svd: {svd}")
    beside = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "lora").eval()
    assert {m.scaling["default"] for m in beside.modules() if isinstance(m, LoraLayer)} == {1.0}
    tokens = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        ours, wanted = (m(input_ids=tokens).logits for m in (beside, other.eval()))
        start = model.eval()(input_ids=tokens).logits
    size = max(1.0, float(wanted.abs().max()))
    assert float((ours - wanted).abs().max()) <= 1e-5 * size < float((start - wanted).abs().max())


@pytest.mark.parametrize(("name", "settings"), [
    ("llama", "rank: 4"), ("gpt2", "rank: 3"), ("convolutions", "rank: 2"),
    ("llama", "energy: 0.7"), ("gpt2", "energy: 0.9"), ("convolutions", "energy: 0.6, rank: 3"),
])  # fmt: skip
def test_errors_are_what_peft_s_model_lacks(name: str, settings: str, tmp_path: Path) -> None:
    """The error of every module, held against the folded weights, and against the singular values left out."""
    model = MODELS[name]()
    base, other = write_base(model, tmp_path / "base"), tuned(model)
    result = saved(base, save_model(other, tmp_path / "other"), tmp_path / "lora", settings)
    theirs, start, wanted = loaded(model, tmp_path / "lora"), model.state_dict(), other.state_dict()
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    factors = KEYS(tmp_path / "lora")
    energy = float(settings.split("energy: ")[1].split(",")[0]) if "energy" in settings else None
    errors = result.errors[str(tmp_path / "lora")]
    assert set(errors) == set(config["target_modules"])
    for module, (whole, left) in errors.items():
        change = (wanted[f"{module}.weight"] - start[f"{module}.weight"]).double()
        assert whole == pytest.approx(float(change.norm()), rel=1e-5)
        found = (wanted[f"{module}.weight"] - theirs[f"{module}.weight"]).double().norm()
        assert left == pytest.approx(float(found), rel=1e-4)
        rank = len(factors[f"base_model.model.{module}.lora_A.weight"])
        values = torch.linalg.svdvals(change.flatten(1)) ** 2
        assert left**2 == pytest.approx(float(values[rank:].sum()), rel=1e-4)
        if energy is not None:
            most = 3 if "rank" in settings else len(values)
            need = next(r for r in range(1, len(values) + 1) if values[:r].sum() >= energy * values.sum())
            assert rank == min(need, most)


def test_of_a_delta_and_of_some_targets(tmp_path: Path) -> None:
    model = llama()
    base, other = write_base(model, tmp_path / "base"), save_model(tuned(model), tmp_path / "other")
    text = (
        f"version: 1\nmodels: {{base: {base}, other: {other}}}\nsteps: {{d: {{use: delta, of: other, base: base}}}}\n"
    )
    save = f"save: {{step: d, as: lora, base: base, rank: 99, to: {tmp_path}/lora, targets: '*.q_proj.*'}}\n"
    (tmp_path / "d.yaml").write_text(text + save)
    made = plan(load_recipe(tmp_path / "d.yaml"))
    assert any("stay as they are there" in warning.message for warning in made.warnings)
    run(made)
    theirs, wanted, start = loaded(model, tmp_path / "lora"), load_file(other / "model.safetensors"), model.state_dict()
    for key, value in theirs.items():
        torch.testing.assert_close(value, wanted[key] if "q_proj" in key else start[key], rtol=0, atol=2e-6)


def test_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    """The rounding of the factors is part of the error that is told."""
    model = llama()
    base, other = write_base(model, tmp_path / "base"), tuned(model)
    result = saved(base, save_model(other, tmp_path / "other"), tmp_path / "lora", "rank: 99, dtype: bfloat16")
    factors = KEYS(tmp_path / "lora")
    assert {value.dtype for value in factors.values()} == {torch.bfloat16}
    for module, (_, left) in result.errors[str(tmp_path / "lora")].items():
        a, b = (factors[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
        change = (other.state_dict()[f"{module}.weight"] - model.state_dict()[f"{module}.weight"]).double()
        assert left == pytest.approx(float((change - b @ a).norm()), rel=1e-4)

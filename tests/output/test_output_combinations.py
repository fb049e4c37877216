"""peft's `add_weighted_adapter`, and the same combinations by recipe, saved as adapters that peft loads."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.tuners.lora.layer import LoraLayer
from test_output_adapters import Convolutions, _peft_may_warn, gpt2, llama, randomise, write_base
from torch import Tensor

from mergekit_lite import RecipeError, load_recipe, plan, run

__all__ = ["_peft_may_warn"]  # a fixture that every test here uses
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn"], "convolutions": ["wide", "linear"]}
MODELS: Mapping[str, Any] = {"llama": llama, "gpt2": gpt2, "convolutions": Convolutions}
# What peft calls it, with its settings; the settings of a step, and of its save.
TIES = {"combination": "ties", "density": 0.4}
PRUNE = {"combination": "magnitude_prune", "density": 0.3}
SAME: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("cat", {}, {}, "rank: 99"),
    ("svd", {"svd_rank": 3}, {}, "rank: 3"),
    ("linear", {}, {"on": "factors"}, "rank: 99"),
    ("ties", {"density": 0.4}, {**TIES, "on": "factors"}, "rank: 99"),
    ("ties_svd", {"density": 0.4, "svd_rank": 5}, TIES, "rank: 5"),
    (
        "ties_svd",
        {"density": 0.4, "svd_rank": 8, "majority_sign_method": "frequency"},
        {**TIES, "majority": "frequency"},
        "rank: 8",
    ),
    ("magnitude_prune", {"density": 0.3}, {**PRUNE, "on": "factors"}, "rank: 99"),
    ("magnitude_prune_svd", {"density": 0.3, "svd_rank": 4}, PRUNE, "rank: 4"),
    # Nothing is dropped, so that there is nothing to draw.
    ("dare_linear", {"density": 1.0}, {"combination": "dare_linear", "density": 1.0, "on": "factors"}, "rank: 99"),
    ("dare_ties", {"density": 1.0}, {"combination": "dare_ties", "density": 1.0, "on": "factors"}, "rank: 99"),
    ("dare_linear_svd", {"density": 1.0, "svd_rank": 2}, {"combination": "dare_linear", "density": 1.0}, "rank: 2"),
    ("dare_ties_svd", {"density": 1.0, "svd_rank": 9}, {"combination": "dare_ties", "density": 1.0}, "rank: 9"),
]
WEIGHTS = (0.7, -0.4, 1.3)


def deltas(model: Any, name: str) -> dict[str, Tensor]:
    layers = [(key, m) for key, m in model.named_modules() if isinstance(m, LoraLayer)]
    return {key: layer.get_delta_weight(name).detach() for key, layer in layers}


def three(model: Any, targets: list[str], folder: Path) -> Any:
    """peft's model with three adapters, of one rank and several scales, which are saved too."""
    made: Any = None
    for i, alpha in enumerate((4, 10, 3)):
        config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, fan_in_fan_out="c_attn" in targets)
        if made is None:
            made = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=f"l{i}")
        else:
            made.add_adapter(f"l{i}", config)
        made.set_adapter(f"l{i}")
        randomise(made, 20 + i)
    for i in range(3):
        made.save_pretrained(folder, selected_adapters=[f"l{i}"])
    return made


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any, Path]]:
    found = {}
    for name, make in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        model = make()
        write_base(model, folder / "base")
        found[name] = (model, three(model, TARGETS[name], folder), folder)
    return found


def write(folder: Path, to: Path, settings: Mapping[str, Any], save: str) -> Path:
    models = ", ".join(f"l{i}: {{adapter: {folder}/l{i}}}" for i in range(3))
    of = ", ".join(f"{{model: l{i}, weight: {w}}}" for i, w in enumerate(WEIGHTS))
    text = f"version: 1\nmodels: {{base: {folder}/base, {models}}}\n"
    text += f"steps: {{m: {{use: weighted_adapter, base: base, of: [{of}], with: {json.dumps(settings)}, "
    text += f"missing: zero_delta}}}}\nsave: {{to: {to}/out{save}}}\n"
    (to / "r.yaml").write_text(text)
    return to / "r.yaml"


@pytest.mark.parametrize(
    ("name", "theirs", "options", "settings", "save"),
    [(n, *case) for case in SAME for n in (MODELS if case[0] in ("cat", "ties_svd", "linear") else ["llama"])],
)
def test_what_is_not_drawn_is_what_peft_makes(
    name: str,
    theirs: str,
    options: dict[str, Any],
    settings: dict[str, Any],
    save: str,
    adapted: dict[str, tuple[Any, Any, Path]],
    tmp_path: Path,
) -> None:
    model, tuned, folder = adapted[name]
    label = f"{theirs}{sorted(options.items())}".translate(dict.fromkeys(map(ord, ".()[]', _"), "x"))
    tuned.add_weighted_adapter([f"l{i}" for i in range(3)], list(WEIGHTS), label, combination_type=theirs, **options)
    run(plan(load_recipe(write(folder, tmp_path, settings, f", as: lora, base: base, {save}"))))
    ours = deltas(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out"), "default")
    wanted = deltas(tuned.base_model, label)
    assert {key.removeprefix("base_model.model.") for key in ours} == {key.removeprefix("model.") for key in wanted}
    for (key, value), other in zip(ours.items(), wanted.values(), strict=True):
        size = float(other.abs().max())
        assert float((value - other).abs().max()) <= 1e-5 * size, key


def test_random_masks_keep_the_share(adapted: dict[str, tuple[Any, Any, Path]], tmp_path: Path) -> None:
    """peft draws other masks: what is held against it is how many entries there are, and which."""
    _, tuned, folder = adapted["llama"]
    from safetensors.torch import load_file

    run(plan(load_recipe(write(folder, tmp_path, {"combination": "dare_ties", "density": 0.3}, ""))))
    base, got = load_file(folder / "base/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    share = []
    for key, layer in tuned.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            change = got[f"{key}.weight"] - base[f"{key}.weight"]
            share.append(float((change.abs() > 1e-5).float().mean()))
    assert all(abs(s - (1 - 0.7**3)) < 0.08 for s in share) and len(share) == 6


def test_factors_of_several_ranks_and_whole_models_are_refused(
    adapted: dict[str, tuple[Any, Any, Path]], tmp_path: Path
) -> None:
    model, _, folder = adapted["llama"]
    config = peft.LoraConfig(r=3, target_modules=TARGETS["llama"])
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "other")
    path = write(folder, tmp_path, {"on": "factors"}, "")
    text = path.read_text()
    path.write_text(text.replace(f"{folder}/l1}}", f"{tmp_path}/other}}"))
    with pytest.raises(RecipeError, match="adapters of one rank"):
        plan(load_recipe(path))
    write_base(copy.deepcopy(model), tmp_path / "copy")
    path.write_text(text.replace(f"l1: {{adapter: {folder}/l1}}", f"l1: {tmp_path}/copy"))
    with pytest.raises(RecipeError, match="needs inputs that are LoRA adapters"):
        plan(load_recipe(path.rename(tmp_path / "whole.yaml")))

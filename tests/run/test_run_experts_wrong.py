"""What cannot be merged is refused before anything is written, with the line that is at fault."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import MIXTRAL, Tiny, changed, merged, tiny, write_recipe
from safetensors.torch import load_file, save_file

from mergekit_lite import InputError, RecipeError, load_recipe, plan, run

__all__ = ["tiny"]  # a fixture


def without(path: Path, tiny: Tiny, change: Any) -> Path:
    stored = load_file(tiny.statistics)
    change(stored)
    save_file(stored, path)
    return path


@MIXTRAL
def test_wrong_input_is_told_where_it_stands(tiny: Tiny, tmp_path: Path) -> None:
    gate = "model.layers.1.block_sparse_moe.gate"
    fewer = without(tmp_path / "fewer.safetensors", tiny, lambda s: s.update({f"{gate}.usage": torch.ones(4).long()}))
    layer = without(tmp_path / "layer.safetensors", tiny, lambda s: s.pop(f"{gate}.logits_gram"))
    folder = tmp_path / "routerless"
    changed(tiny, folder, lambda held: [held.pop(name) for name in list(held) if "gate" in name])
    wrong = {
        "into: 9, statistics: routers": (tiny, "`into: 9` is more than the 8 experts", "into: 9"),
        "into: 4, statistics: routers, router: compact, protect: [0, 1]": (tiny, "equally many", "protect"),
        "into: 4, statistics: routers, protect: [1, 3]": (tiny, "has layers 0 to 1", "protect"),
        "into: 4": (tiny, "needs `statistics`", "merge_experts"),
        "into: 4, similarity: weight, adaptive: true": (tiny, "`adaptive`", "merge_experts"),
    }
    others = [
        ("into: 4, statistics: routers", Tiny(tiny.model, tiny.folder, fewer), "has 8 experts", "routers"),
        ("into: 4, statistics: routers", Tiny(tiny.model, tiny.folder, layer), f"router `{gate}`", "routers"),
        ("into: 4, similarity: weight", Tiny(tiny.model, folder, tiny.statistics), "no router", "of: a"),
    ]
    for settings, (model, message, at) in wrong.items():
        others.append((settings, model, message, at))
    for number, (settings, model, message, at) in enumerate(others):
        with pytest.raises(RecipeError) as fault:
            plan(load_recipe(write_recipe(tmp_path / f"{number}.yaml", model, settings)))
        problem = fault.value.problems[0]
        assert message in problem.message and problem.mark is not None and at in problem.mark.text


@pytest.mark.parametrize("tiny", [("deepseek_v3", False)], indirect=True, ids=["deepseek_v3"])
def test_routing_groups_must_still_divide(tiny: Tiny, tmp_path: Path) -> None:
    for into, message in ((5, "2 routing groups"), (2, "2 or more")):
        recipe = write_recipe(tmp_path / f"{into}.yaml", tiny, f"into: {into}, statistics: routers, router: compact")
        with pytest.raises(RecipeError, match=message):
            plan(load_recipe(recipe))
    merged(write_recipe(tmp_path / "alias.yaml", tiny, "into: 2, statistics: routers"))


@pytest.mark.parametrize("tiny", [("phimoe", False)], indirect=True, ids=["phimoe"])
def test_a_router_whose_code_chooses_two_keeps_two(tiny: Tiny, tmp_path: Path) -> None:
    settings = "into: 1, statistics: routers"
    with pytest.raises(RecipeError, match=r"fewer than the 2 experts") as fault:
        plan(load_recipe(write_recipe(tmp_path / "one.yaml", tiny, f"{settings}, router: compact")))
    assert "`into: 2` does" in str(fault.value.problems[0].hint)
    merged(write_recipe(tmp_path / "alias.yaml", tiny, settings))


@MIXTRAL
def test_the_tensor_that_holds_nan_is_named(tiny: Tiny, tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    changed(tiny, tmp_path / "broken", lambda held: held[name][3].fill_(float("nan")))
    for number, similarity in enumerate(("weight", "router-weight")):
        model = Tiny(tiny.model, tmp_path / "broken", tiny.statistics)
        recipe = write_recipe(tmp_path / f"{number}.yaml", model, f"into: 1, similarity: {similarity}")
        with pytest.raises(InputError, match=re.escape(f"`{name}` holds NaN")):
            run(plan(load_recipe(recipe)))

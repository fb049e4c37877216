"""A model whose middle layers stand twice is loaded by transformers, and is what the layers in that order are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import LAYERS, loaded, logits_of, write_dense
from torch import nn

from mergekit_lite import load_recipe, plan, run


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("mistral", {}),
        (
            "qwen2",
            {
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                "sliding_window": 4,
                "use_sliding_window": True,
            },
        ),
        ("qwen3", {}),
    ],
)
def test_layers_that_stand_twice(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "m", kind, 0, **changes)
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(
        f"version: 1\nsteps: {{deep: {{use: stack, of: [{{model: {tmp_path}/m, layers: [0, 2]}}, "
        f"{{model: {tmp_path}/m, layers: [1, 3]}}]}}}}\nsave: {{to: {out}}}\n"
    )
    run(plan(load_recipe(recipe)))
    order = [0, 1, 1, 2]
    found = loaded(out)
    assert found.config.num_hidden_layers == LAYERS + 1
    types = getattr(dense.config, "layer_types", None)
    if types is not None:
        assert found.config.layer_types == [types[i] for i in order]
    # The same network by hand: the modules in that order, one of them twice.
    dense.model.layers = nn.ModuleList(dense.model.layers[i] for i in order)
    dense.config.num_hidden_layers = len(order)
    if types is not None:
        dense.config.layer_types = [types[i] for i in order]
    dense.config.use_cache = False
    torch.testing.assert_close(logits_of(found), logits_of(dense), rtol=1e-5, atol=1e-5)

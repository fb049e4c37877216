"""Weight matching against answers of plain loops and searches in NumPy (tests/oracles.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from align_nets import Net

from mergekit_lite.align.match import match
from mergekit_lite.family.spaces import Space, Use

ORACLES: dict[str, dict[str, Any]] = {
    case["id"]: case
    for case in json.loads((Path(__file__).parents[1] / "oracles.json").read_text(encoding="utf-8"))["cases"]
}
CASES = ["one_hidden_layer", "two_hidden_layers", "gqa_heads"]


def tensors(stored: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor(value["data"], dtype=torch.float64).reshape(value["shape"]) for name, value in stored.items()
    }


def net_of(case: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Net:
    if "groups" in case["params"]:
        spaces = []
        for name, uses in case["params"]["groups"].items():
            found = tuple(Use(tensor, axis) for tensor, axis in uses)
            spaces.append(Space(name, "mlp", shapes[found[0].tensor][found[0].axis], found))
        return Net(spaces, shapes)
    head, groups = case["params"]["head_dim"], case["params"]["num_kv_heads"]
    g = case["params"]["queries_per_kv"]
    uses = (Use("q", 0, head), Use("k", 0, head, grouped=True), Use("v", 0, head, grouped=True), Use("o", 1, head))
    return Net([Space("heads", "heads", groups * g, uses, g)], shapes)


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_weight_matching(name: str, anchored: bool) -> None:
    case = ORACLES[f"weight_matching/{name}"]
    a, b = (tensors(case["inputs"][which]) for which in "ab")
    net = net_of(case, {name: tuple(tensor.shape) for name, tensor in a.items()})
    found = match(net.spaces, a.__getitem__, b.__getitem__, shapes=net.shapes, kinds=net.kinds, anchored=anchored)
    expected = case["expected"]
    perms = expected["perm"] if "perm" in expected else {"heads": expected["query_perm"]}
    for space, perm in perms.items():
        np.testing.assert_array_equal(found.permutations[space], perm["data"])
    for tensor, value in tensors(expected["b_aligned"]).items():
        torch.testing.assert_close(net.apply(found.permutations, b)[tensor], value, rtol=0.0, atol=case["atol"])
    objective = expected.get("objective", expected.get("global_optimum_objective"))
    assert found.objective[-1] == pytest.approx(objective, abs=case["atol"])

"""Oracle cases and how they are checked, and methods put around a base as the plan does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_lite.methods import Call, Method, Slot, get
from mergekit_lite.methods.whole import evaluate

ORACLES: dict[str, dict[str, Any]] = {
    case["id"]: case
    for case in json.loads((Path(__file__).parents[1] / "oracles.json").read_text(encoding="utf-8"))["cases"]
}


def tensor(stored: dict[str, Any]) -> Tensor:
    kinds = {"float64": torch.float64, "bool": torch.bool, "int": torch.int64}
    return torch.tensor(stored["data"], dtype=kinds[stored["dtype"]]).reshape(stored["shape"])


def around_base(method: Method, count: int, **params: Any) -> Call:
    """`method` on `count` models whose base is slot `count`."""
    base = Slot(count)
    return get("add")(method(*(get("delta")(Slot(i), base) for i in range(count)), **params), base)


BOTH = pytest.mark.parametrize("compute", [torch.float64, torch.float32], ids=["f64", "f32"])


def cases(prefix: str, *without: str) -> pytest.MarkDecorator:
    found = [name for name in ORACLES if name.startswith(prefix) and name not in without]
    assert found
    return pytest.mark.parametrize("case", found)


def close(got: Tensor, case: str, name: str, compute: torch.dtype) -> None:
    expected = tensor(ORACLES[case]["expected"][name])
    assert got.dtype == compute and got.shape == expected.shape
    if compute == torch.float64:
        tolerance = {"rtol": 0.0, "atol": ORACLES[case]["atol"]}
    else:
        tolerance = {"rtol": 1e-5, "atol": 1e-5 * float(expected.abs().max())}
    torch.testing.assert_close(got.double(), expected, **tolerance)


def check(case: str, call: Call, models: list[dict[str, Any]], compute: torch.dtype) -> None:
    """Every tensor of the models at once, so that statistics over the whole model are what they are."""
    names = list(models[0])
    stacked = [[tensor(model[name]) for model in models] for name in names]
    for name, got in zip(names, evaluate(call, stacked, compute=compute), strict=True):
        close(got, case, name, compute)

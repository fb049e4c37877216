"""Oracle cases, and methods put around a base as the plan does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lite.methods import Call, Method, Slot, get

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

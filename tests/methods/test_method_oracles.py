"""The methods against answers computed by plain loops in NumPy (tests/oracles.json)."""

from __future__ import annotations

import pytest
import torch
from method_cases import BOTH, ORACLES, around_base, cases, check, close, tensor

from mergekit_lite.methods import Slot, get, sparsify
from mergekit_lite.methods.whole import apply, evaluate


@BOTH
@cases("linear/")
def test_linear(case: str, compute: torch.dtype) -> None:
    given, params = ORACLES[case]["inputs"], ORACLES[case]["params"]
    call = get("linear")(*map(Slot, range(3)), weight=params["weights"], normalize=params["normalize"])
    check(case, call, given["models"], compute)


@BOTH
@pytest.mark.parametrize(
    "case", [c for c in ORACLES if c.startswith("wise_ft/alpha")] + ["bang/given_balanced_checkpoint"]
)
def test_interpolate(case: str, compute: torch.dtype) -> None:
    given = ORACLES[case]["inputs"]
    call = get("interpolate")(Slot(0), Slot(1), t=ORACLES[case]["params"]["alpha"])
    check(case, call, [given["zeroshot"], given["finetuned"]], compute)


@BOTH
@cases("task_arithmetic/")
def test_task_arithmetic(case: str, compute: torch.dtype) -> None:
    given, factors = ORACLES[case]["inputs"], ORACLES[case]["params"]["lambda"]
    call = around_base(get("task_arithmetic"), len(factors), weight=factors, **{"lambda": 1.0})
    check(case, call, [*given["models"], given["base"]], compute)


@BOTH
@cases("ties/")
def test_ties(case: str, compute: torch.dtype) -> None:
    given, params = ORACLES[case]["inputs"], dict(ORACLES[case]["params"])
    settings = {
        "density": params.pop("density"),
        "lambda": params.pop("lam"),
        "aggregate": params.pop("agg", "mean"),
        "weight": params.pop("weights", 1.0),
        **params,
    }
    call = around_base(get("ties"), len(given["models"]), **settings)
    check(case, call, [*given["models"], given["base"]], compute)


@BOTH
@cases("dare/")
def test_dare(case: str, compute: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    given, params = ORACLES[case]["inputs"], ORACLES[case]["params"]
    masks = iter([tensor(mask["w"]).reshape(-1) for mask in given["masks"]])
    monkeypatch.setattr(sparsify, "keep_mask", lambda *ignored: next(masks))
    settings = {"drop_rate": params["drop_rate"], "rescale": params["rescale"]}
    if params.get("then") == "ties":
        method = get("dare_ties")
        settings |= {"aggregate": params["agg"], "zero_sign": params["zero_sign"], "lambda": params["lam"]}
    else:
        method = get("dare_linear")
        settings |= {"weight": params["lambda"]}
    call = around_base(method, len(given["models"]), **settings)
    check(case, call, [*given["models"], given["base"]], compute)


@BOTH
@cases("breadcrumbs/", *(c for c in ORACLES if c.startswith("breadcrumbs/row_reference")))
def test_breadcrumbs(case: str, compute: torch.dtype) -> None:
    given, params = ORACLES[case]["inputs"], ORACLES[case]["params"]
    call = around_base(get("breadcrumbs"), len(given["models"]), **params)
    check(case, call, [*given["models"], given["base"]], compute)


@BOTH
@cases("breadcrumbs/row_reference")
def test_breadcrumbs_by_row(case: str, compute: torch.dtype) -> None:
    given, params = ORACLES[case]["inputs"], ORACLES[case]["params"]
    settings = {"density": params["keep"], "gamma": params["remove"], "remove_first": params["remove_first"]}
    got = apply(
        get("sparsify"), [tensor(given["delta"])], {**settings, "keep": "middle", "scope": "row"}, compute=compute
    )
    close(got, case, "delta", compute)


@BOTH
@cases("slerp/")
def test_slerp(case: str, compute: torch.dtype) -> None:
    given = ORACLES[case]["inputs"]
    got = apply(get("slerp"), [tensor(given["a"]), tensor(given["b"])], ORACLES[case]["params"], compute=compute)
    close(got, case, "out", compute)


@BOTH
def test_straggler(compute: torch.dtype) -> None:
    case = "straggler/sparse_interpolation"
    given, params = ORACLES[case]["inputs"], ORACLES[case]["params"]
    for name in given["zeroshot"]:
        ends = [tensor(given["finetuned"][name]), tensor(given["zeroshot"][name])]
        if name in params["stragglers"]:
            sparse = get("sparsify")(get("delta")(Slot(0), Slot(1)), density=1 - params["sparsity"])
            call = get("add")(sparse, Slot(1), weight=params["alpha"])
        else:
            call = get("interpolate")(Slot(1), Slot(0), t=params["alpha"])
        close(evaluate(call, [ends], compute=compute)[0], case, name, compute)

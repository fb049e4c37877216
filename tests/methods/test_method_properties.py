"""What holds for every registered method."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from method_cases import around_base
from torch import Tensor

from mergekit_lite.errors import RecipeError
from mergekit_lite.methods import Call, Method, Slot, all_methods, expand, get
from mergekit_lite.methods.whole import apply, evaluate

METHODS = [m for m in all_methods().values() if m.public]
# Methods that read statistics beside the models are tried through the plan: test_method_statistics.py.
WHOLE_MODELS = ("structure", "alignment", "vocabulary")  # carried out by the plan and the run
NUMERIC = [m for m in METHODS if m.reach not in WHOLE_MODELS and not any(p.kind == "reference" for p in m.params)]
SHAPES = [(), (1,), (7,), (3, 4), (1, 5), (6, 1), (2, 3, 5), (0, 4)]


def required(method: Method) -> dict[str, Any]:
    return {p.name: 0.5 for p in method.params if p.required}


def count(method: Method) -> int:
    return method.inputs[1] or 3


def use(method: Method) -> tuple[Call, int]:
    """The method on as many inputs as it takes, around a base where it can be, and the number of slots."""
    n = count(method)
    if method.surrounds:
        return around_base(method, n, **required(method)), n + 1
    n += method.base_last
    return method(*map(Slot, range(n)), **required(method)), n


def random_tensors(n: int, shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).bfloat16() for _ in range(n)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", NUMERIC, ids=lambda m: m.name)
def test_shape_and_dtype(method: Method, shape: tuple[int, ...]) -> None:
    call, n = use(method)
    for compute in (torch.float32, torch.float64):
        xs = random_tensors(n, shape)
        (result,) = evaluate(call, [xs], compute=compute, grain=5)
        assert result.shape == shape and result.dtype == compute and bool(result.isfinite().all())


@pytest.mark.parametrize("method", [m for m in NUMERIC if m.surrounds], ids=lambda m: m.name)
def test_models_that_are_the_base_return_it_bit_for_bit(method: Method) -> None:
    call, n = use(method)
    base = torch.tensor([0.0, -0.0, 1.5, -2.0, 1e-45, 3e38, float("inf"), -0.0])[:7].repeat(3)
    base[5] = 0.1
    base = base[base.isfinite()]
    (result,) = evaluate(call, [[base] * n])
    assert result.view(torch.int32).tolist() == base.view(torch.int32).tolist()


# `importance` is no merge: of copies it is 0.
MERGES = [m for m in NUMERIC if not m.surrounds and m.base != "required" and m.name != "importance"]


@pytest.mark.parametrize("method", MERGES, ids=lambda m: m.name)
def test_copies_of_one_model_return_it(method: Method) -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(1))
    settings = {**required(method)}
    for param in method.per_input:
        settings[param.name] = (settings.get(param.name, param.default),) * count(method)
    torch.testing.assert_close(apply(method, [x] * count(method), settings), x, rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "breadcrumbs"])
def test_the_order_of_the_inputs_matters_only_in_rounding(name: str) -> None:
    *models, base = random_tensors(4, (40,))
    weights = (0.2, 0.7, 1.3)
    results = []
    for order in itertools.permutations(range(3)):
        settings = {**required(get(name)), "weight": tuple(weights[i] for i in order)}
        method = get(name)
        call = around_base(method, 3, **settings) if method.surrounds else method(*map(Slot, range(3)), **settings)
        results.append(evaluate(call, [[*(models[i] for i in order), base]], compute=torch.float64)[0])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "name, settings, chosen",
    [
        ("linear", {"weight": (0.0, 3.0)}, 1),
        ("linear", {"weight": (1.0, 0.0), "normalize": False}, 0),
        ("interpolate", {"t": 0.0}, 0),
        ("interpolate", {"t": 1}, 1),
        ("slerp", {"t": 1.0}, 1),
        ("slerp", {"t": 0.0, "mode": "row"}, 0),
    ],
)
def test_an_input_alone_is_copied_whatever_the_others_hold(name: str, settings: dict[str, Any], chosen: int) -> None:
    xs = [torch.tensor([1.0, -0.0, 3e38, float("inf")]), torch.tensor([float("nan"), -0.0, 5.0, -float("inf")])]
    result = apply(get(name), xs, settings)
    assert result.view(torch.int32).tolist() == xs[chosen].view(torch.int32).tolist()


@pytest.mark.parametrize("name", ["ties", "dare_linear", "dare_ties"])
def test_nothing_left_out_of_one_model_is_that_model(name: str) -> None:
    x, base = random_tensors(2, (64,))
    keep_all = {"density": 1.0} if name == "ties" else {"drop_rate": 0.0}
    (result,) = evaluate(around_base(get(name), 1, **keep_all), [[x, base]], compute=torch.float64)
    assert torch.equal(result, x.double())


def test_an_input_that_holds_nan_shows() -> None:
    bad = torch.tensor([float("nan"), 1.0, float("inf")])
    for aggregate, zero_sign in itertools.product(("mean", "sum", "max"), ("positive", "drop", "majority")):
        settings = {"aggregate": aggregate, "zero_sign": zero_sign}
        result = apply(get("elect"), [bad, torch.tensor([1.0, 1.0, 1.0])], settings)
        assert not result[0].isfinite() and result[1].isfinite() and not result[2].isfinite()


def test_random_masks_differ_between_models_and_tensors() -> None:
    ones, zeros = torch.ones(400), torch.zeros(400)
    call = around_base(get("dare_linear"), 2, drop_rate=0.5, weight=(1.0, 1000.0), rescale=False)
    first, second = evaluate(call, [[ones, ones, zeros]] * 2, key=5)
    kept = torch.stack([first % 1000, first // 1000, second % 1000, second // 1000])
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    for a, b in itertools.combinations(kept, 2):
        assert 150 < int((a == b).sum()) < 250
    assert torch.equal(evaluate(call, [[ones, ones, zeros]], key=5)[0], first)
    assert not torch.equal(evaluate(call, [[ones, ones, zeros]], key=6)[0], first)


def test_row_selection_keeps_the_first_of_equals() -> None:
    x = torch.tensor([[1.0, -1.0, 1.0, 0.5], [0.0, 2.0, float("nan"), -2.0]])
    result = apply(get("sparsify"), [x], {"density": 0.5, "scope": "row"})
    assert result.nan_to_num(nan=9.0).tolist() == [[1.0, -1.0, 0.0, 0.0], [0.0, 2.0, 9.0, 0.0]]
    middle = apply(get("sparsify"), [x], {"density": 0.5, "gamma": 0.25, "keep": "middle", "scope": "row"})
    assert middle.tolist() == [[0.0, -1.0, 1.0, 0.0], [0.0, 2.0, 0.0, -2.0]]


def test_weights_that_cancel_are_an_error() -> None:
    assert get("linear").check is not None
    assert "add up to 0" in (get("linear").check({"weight": (1.0, -1.0), "normalize": True}, 2) or "")
    with pytest.raises(RecipeError, match="add up to 0"):
        apply(get("linear"), [torch.ones(2)] * 2, {"weight": (1.0, -1.0)})


@pytest.mark.parametrize(
    "settings",
    [
        {"density": 0.5, "keep": "random", "scope": "row"},
        {"density": 0.5, "keep": "middle", "select": "threshold"},
        {"density": 0.1, "keep": "middle", "gamma": 0.2, "remove_first": False},
    ],
)
def test_sparsify_refuses_settings_without_meaning(settings: dict[str, Any]) -> None:
    check = get("sparsify").check
    assert check is not None
    defaults = {p.name: p.default for p in get("sparsify").params}
    assert check({**defaults, **settings}, 1) and not check({**defaults, "density": 0.5}, 1)


def test_remarks() -> None:
    def remark(name: str, **settings: Any) -> str | None:
        method = get(name)
        assert method.remark is not None
        return method.remark({**{p.name: p.default for p in method.params}, **settings}, 2)

    assert "extrapolates" in (remark("interpolate", t=1.5) or "") and remark("interpolate", t=0.5) is None
    assert "0.99" in (remark("dare_ties", drop_rate=(0.5, 0.999)) or "") and not remark("dare_ties", drop_rate=(0.9,))
    assert "outliers" in (remark("breadcrumbs", density=(0.9,), gamma=(0.2,)) or "")
    assert remark("breadcrumbs", density=(0.9,), gamma=(0.01,)) is None


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_method_explains_itself(method: Method) -> None:
    assert method.summary.endswith(".") and len(method.summary) < 110
    assert "Source" in method.doc and ("out =" in method.doc or method.name in ("elect", "ties", "stack", "dare_ties"))
    assert method.paper
    for param in method.params:
        assert param.help and param.range_text()
        values = param.default if isinstance(param.default, tuple) else (param.default,)
        assert param.required or param.default is None or all(param.fault(value) is None for value in values)


@pytest.mark.parametrize("method", [m for m in METHODS if m.composite], ids=lambda m: m.name)
def test_composites_are_made_of_public_parts(method: Method) -> None:
    """But `knots`, some of whose parts have results that only its other parts can read."""

    def walk(call: Call | Slot) -> list[Call]:
        return [] if isinstance(call, Slot) else [call, *(c for below in call.inputs for c in walk(below))]

    full = {p.name: p.default for p in method.params} | required(method)
    for param in method.per_input:
        full[param.name] = (full[param.name],) * 2
    slots = tuple(map(Slot, range(2 + method.base_last)))
    calls = walk(expand(Call(method, slots, tuple(full.items()))))
    assert calls and not any(c.method.composite for c in calls)
    assert method.name == "knots" or all(c.method.public for c in calls)
    assert all(get(c.method.name) is c.method for c in calls)


def test_the_registry() -> None:
    assert list(all_methods()) == sorted(all_methods())
    assert {"linear", "ties", "stack", "passthrough"} <= set(all_methods())
    with pytest.raises(KeyError):
        get("nothing of this name")


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, mergekit_lite.methods; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

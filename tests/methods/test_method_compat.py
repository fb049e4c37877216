"""`compat`: mergekit's numbers where they differ, against its rules written out entry by entry."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from method_cases import around_base
from numpy.typing import NDArray
from torch import Tensor

from mergekit_lite.methods import get
from mergekit_lite.methods.whole import apply, evaluate

Array = NDArray[np.float64]
F64 = torch.float64


def draw(count: int, shape: tuple[int, ...] = (10, 10), size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [size * torch.randn(shape, generator=generator, dtype=F64) for _ in range(count)]


def run(name: str, xs: list[Tensor], **params: Any) -> Tensor:
    return apply(get(name), xs, {"compat": True, **params}, compute=F64, grain=7)


def same(got: Tensor, expected: Array | Tensor) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected), rtol=1e-11, atol=1e-13)


def kept(x: Tensor, top: int, last: int) -> Array:
    flat = x.numpy().ravel()
    order = np.argsort(-np.abs(flat), kind="stable")[top:last]
    result = np.zeros_like(flat)
    result[order] = flat[order]
    return result.reshape(x.shape)


def consensus(deltas: list[Array], weight: list[float]) -> Array:
    """The sum of the weighted deltas that have the sign of their sum, divided by the sum of their signed weights."""
    result = np.zeros_like(deltas[0])
    for at in np.ndindex(*result.shape):
        terms = [(w, w * d[at]) for w, d in zip(weight, deltas, strict=True)]
        sign = 1 if sum(term for _, term in terms) >= 0 else -1
        agreed = [(w, term) for w, term in terms if term * sign > 0]
        result[at] = sum(term for _, term in agreed) / (sum(w for w, _ in agreed) or 1)
    return result


@pytest.mark.parametrize("density, count", [(0.29, 28), (0.003, 1), (0.5, 50)])
def test_counts_round_plainly(density: float, count: int) -> None:
    (x,) = draw(1)
    same(run("sparsify", [x], density=density), kept(x, 0, count))
    cut = 0 if density == 0.003 else count
    same(run("sparsify", [x], density=density, keep="middle", gamma=0.29), kept(x, 28, 28 + cut))
    assert int((run("sparsify", [x], density=0.29, compat=False) != 0).sum()) == 29


@pytest.mark.parametrize("weight", [(0.8, -0.5, 0.3), (1.0, -1.0, 0.0), (-0.2, 0.0, 0.0), (-0.5, -0.25, -1.0)], ids=str)
@pytest.mark.parametrize("name", ["ties", "dare_ties", "della", "breadcrumbs_ties"])
def test_votes_are_divided_by_signed_weights(name: str, weight: tuple[float, ...]) -> None:
    deltas = draw(3)
    cuts: dict[str, Any] = {
        "ties": {"density": 0.29, "scope": "tensor"},
        "dare_ties": {"drop_rate": 0.0},
        "della": {"density": 1.0, "epsilon": 0.0},
        "breadcrumbs_ties": {"density": 0.29, "gamma": 0.29, "aggregate": "mean"},
    }
    window = {"ties": (0, 28), "breadcrumbs_ties": (28, 56)}.get(name, (0, 100))
    expected = consensus([kept(x, *window) for x in deltas], list(weight))
    same(run(name, deltas, weight=weight, **cuts[name], **{"lambda": 1.0}), expected)


@pytest.mark.parametrize("aggregate", ["mean", "sum", "max"])
def test_without_it_a_negative_weight_makes_the_opposite(aggregate: str) -> None:
    a, b, c = draw(3)
    settings = {"aggregate": aggregate, "compat": False}
    turned = run("elect", [a, -b, c], weight=(0.5, 0.7, 0.2), **settings)
    assert torch.equal(run("elect", [a, b, c], weight=(0.5, -0.7, 0.2), **settings), turned)
    lone = run("elect", [a, b], weight=(0.0, -1.0), **settings)
    assert torch.equal(lone, -b)


@pytest.mark.parametrize("name", ["task_arithmetic", "dare_linear", "della_linear", "breadcrumbs"])
def test_weights_that_add_up_to_nothing_are_not_normalised(name: str) -> None:
    deltas = draw(3)
    cuts = {"dare_linear": {"drop_rate": 0.0}, "della_linear": {"density": 1.0, "epsilon": 0.0}}
    settings = {"weight": (0.3, 0.5, -0.8), "normalize": True, "lambda": 2.0, **cuts.get(name, {})}
    settings |= {"density": 1.0} if name == "breadcrumbs" else {}
    same(run(name, deltas, **settings), 2 * (0.3 * deltas[0] + 0.5 * deltas[1] - 0.8 * deltas[2]))
    method = get(name)
    params = {p.name: p.default for p in method.params} | settings
    params |= {p.name: (params[p.name],) * 3 for p in method.per_input if not isinstance(params[p.name], tuple)}
    params["weight"] = (0.5, 0.5, -1.0)
    assert method.check is not None
    assert "add up to 0" in (method.check(params | {"compat": False}, 3) or "")
    params |= {"rescale": False}
    assert method.check(params | {"compat": True}, 3) is None


@pytest.mark.parametrize("size", [1.0, 1e-4])
@pytest.mark.parametrize("topk", [1.0, 0.29, 0.005])
def test_sce_gives_small_changes_one_weight(size: float, topk: float) -> None:
    deltas = [size * factor * x for factor, x in zip((1, 3, 0.5), draw(3), strict=True)]
    stack = np.stack([x.numpy() for x in deltas])
    # 0.29 of 100 is 29 in float32; nothing is kept of a count below 1.
    chosen = kept(torch.from_numpy(stack.var(axis=0)), 0, {1.0: 100, 0.29: 29, 0.005: 0}[topk]) != 0
    stack = stack * chosen
    squares = (stack**2).mean(axis=(1, 2))
    weights = squares / squares.sum() if squares.sum() >= 1e-6 else np.full(3, 1 / 3)
    assert (squares.sum() < 1e-6) == (size < 1 or topk < 0.01)
    sign = np.where(stack.sum(axis=0) >= 0, 1, -1)
    share = weights[:, None, None] * (np.sign(stack) == sign)
    same(run("sce", deltas, select_topk=topk), (stack * share).sum(axis=0) / np.maximum(share.sum(axis=0), 1e-6))


def test_a_tensor_of_zeros_is_orthogonal() -> None:
    (x,) = draw(1)
    zero = torch.zeros_like(x)
    factor = math.sin(0.3 * math.pi / 2)
    for xs, expected in (([zero, x], factor * x), ([x, zero], math.cos(0.3 * math.pi / 2) * x), ([zero, zero], zero)):
        same(run("slerp", xs, t=0.3), expected)
        same(run("slerp", xs, t=0.3, mode="row"), expected)
        for mode in ("tensor", "row", "column"):
            same(run("nuslerp", xs, weight=(0.7, 0.3), mode=mode), expected)
    rows = torch.cat([x[:5], zero[5:]])
    arcs, plain = (run("slerp", [rows, x], t=0.3, mode="row", compat=c) for c in (True, False))
    same(arcs[5:], factor * x[5:])
    assert torch.equal(arcs[:5], plain[:5])
    same(plain[5:], 0.3 * x[5:])


def test_nuslerp_of_weights_that_add_up_to_nothing_is_the_middle() -> None:
    xs = draw(2)
    same(run("nuslerp", xs, weight=(0.5, -0.5)), run("nuslerp", xs, weight=(1.0, 1.0)))


def test_nothing_changes_elsewhere() -> None:
    *models, base = draw(4)
    for name in ("ties", "task_arithmetic", "sce", "breadcrumbs", "breadcrumbs_ties"):
        settings: dict[str, Any] = {"lambda": 0.5} if name != "sce" else {"select_topk": 0.5}
        settings |= {"density": 0.5} if "crumbs" in name or name == "ties" else {}
        found = [
            evaluate(around_base(get(name), 3, compat=flag, **settings), [[*models, base]], compute=F64)[0]
            for flag in (False, True)
        ]
        torch.testing.assert_close(*found, rtol=1e-14, atol=1e-14)
    same(run("slerp", models[:2], t=0.3), run("slerp", models[:2], t=0.3, compat=False))

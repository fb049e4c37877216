"""The auction against SciPy, and its prices against what prices must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from digits_nets import one_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from mergekit_lite.align.assign import Costs
from mergekit_lite.align.auction import auction, prices, reduced

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")),
]


def least(cost: Costs) -> float:
    return float(cost[linear_sum_assignment(cost)].sum())


def problem(kind: str, count: int, seed: int) -> Costs:
    random = np.random.default_rng(seed)
    if kind == "even":
        return random.standard_normal((count, count))
    if kind == "whole":
        return random.integers(0, 5, (count, count)).astype(np.float64)
    if kind == "skewed":
        return random.standard_normal((count, count)) ** 9 * 1e6
    if kind == "twins":
        return np.repeat(random.standard_normal((count, (count + 1) // 2)), 2, axis=1)[:, :count]
    units = random.standard_normal((count, 20))
    return -(units[random.permutation(count)] + random.standard_normal((count, 20))) @ units.T


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["even", "whole", "skewed", "twins", "planted"])
@given(count=st.integers(1, 60), seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_the_objective_is_that_of_scipy(device: str, kind: str, count: int, seed: int) -> None:
    cost = problem(kind, count, seed)
    kept = cost.copy()
    with one_thread():
        order = auction(device, smallest=2)(cost)
    assert (cost == kept).all()
    assert sorted(order) == list(range(count))
    assert cost[np.arange(count), order].sum() == pytest.approx(least(cost), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["even", "planted"])
def test_prices_prove_that_little_is_missing(kind: str, device: str) -> None:
    """Whatever the prices, no assignment costs less than the sum of the rows' least costs at them less the prices. At
    zero prices that bound is far from the optimum."""
    cost = problem(kind, 500, 0)
    with one_thread():
        price = prices(torch.from_numpy(cost).to(device, torch.float32))
        order = auction(device, smallest=500)(cost)
    best = least(cost)
    assert cost[np.arange(500), order].sum() == pytest.approx(best, rel=1e-12)

    def missing(price: np.ndarray) -> float:
        return (best - float((cost + price).min(axis=1).sum() - price.sum())) / abs(best)

    assert -1e-9 <= missing(price) < 0.01
    assert missing(price) < 0.1 * missing(np.zeros(500))
    assert reduced(cost, price).min() == 0
    assert (prices(torch.from_numpy(cost).to(device, torch.float32)) == price).all()


@pytest.mark.parametrize("value", [0.0, 3.5])
def test_equal_costs_leave_everything_in_place(value: float) -> None:
    assert auction("cpu", smallest=2)(np.full((6, 6), value)).tolist() == list(range(6))


def test_costs_beyond_float32_are_solved_too_and_nan_is_refused() -> None:
    cost = problem("even", 12, 0) * 1e60
    order = auction("cpu", smallest=2)(cost)
    assert cost[np.arange(12), order].sum() == pytest.approx(least(cost))
    cost[3, 3] = np.nan
    with pytest.raises(ValueError, match="invalid"):
        auction("cpu", smallest=2)(cost)


def test_a_run_can_be_stopped() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        auction("cpu", smallest=2, check=stop)(problem("even", 20, 0))

"""Assignments of large matrices with most of the work on a GPU, exact all the same.

Bertsekas' auction (Annals of Operations Research 1988) in its Jacobi form with a falling epsilon: all rows without a
column bid at once, each for the column that is worth most to it at present prices, by as much as that is worth more to
it than its second best, and epsilon. Its last few bidders take many rounds of hardly any work each, so it is not
carried to the end: prices of columns are all that is wanted. SciPy's exact solver then starts from costs and prices
together, whose optimum is the same, and has little left to do: on 4096 structureless rows a tenth of its time. So the
result is exact however good the prices are. Without a GPU the auction takes longer than SciPy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from mergekit_lite.align.apply import Order
from mergekit_lite.align.assign import Assign, Costs, assignment
from mergekit_lite.lazy import Tensor, torch

SMALL = 1024  # below, SciPy alone takes a moment
FALL = 5.0  # epsilon is divided by this from one phase to the next
IDLE = 0.005  # share of rows that may stay without a column
ROUNDS = 200  # of bidding in one phase at most
BLOCK = 1 << 24  # elements whose worth is worked out at once


def auction(device: str, *, smallest: int = SMALL, check: Callable[[], None] = lambda: None) -> Assign:
    """An exact solver of n × n assignment problems that takes float64 costs to be minimised and gives p with the least
    sum of cost[i, p[i]], as `assignment` does. Matrices of fewer than `smallest` rows go to that at once.

    Memory: another 8 n² bytes here, and on `device` 4 n² bytes and a block. `check` is called once a round and raises
    to stop. Raises ValueError for costs with NaN, as SciPy does.
    """

    def solve(cost: Costs) -> Order:
        if len(cost) < smallest:
            return assignment(cost)
        price = prices(torch.from_numpy(cost).to(device, torch.float32), check=check)
        return assignment(reduced(cost, price) if np.isfinite(price).all() else cost)

    return solve


def reduced(cost: Costs, price: NDArray[np.float64]) -> Costs:
    """The costs with what each column and then each row costs at least taken off: nowhere below 0, with the same
    optimum."""
    found = cost + price
    found -= found.min(axis=1, keepdims=True)
    return found


def prices(cost: Tensor, *, check: Callable[[], None] = lambda: None) -> NDArray[np.float64]:
    """A price for every column of an n × n matrix at which nearly every row can have to itself a column that costs it
    least, the price included. Not finite if the costs are not."""
    count = len(cost)
    least, most = torch.aminmax(cost)
    spread = float(most) - float(least)
    price = torch.zeros(count, dtype=cost.dtype, device=cost.device)
    if not 0 < spread < float("inf"):
        return np.full(count, spread)
    for epsilon in _epsilons(spread, count):
        holder = torch.full((count,), count, device=cost.device)  # the row that has each column, or none
        holding = torch.zeros(count, dtype=torch.bool, device=cost.device)
        for _ in range(ROUNDS):
            check()
            free = (~holding).nonzero()[:, 0]
            if len(free) <= IDLE * count:
                break
            column, bid = _bids(cost, price, free, epsilon)
            highest = torch.full_like(price, -torch.inf).scatter_reduce(0, column, bid, "amax")
            won = bid == highest[column]
            # Of equal bids the lowest row's counts, so that every run goes the same way.
            winner = torch.full_like(holder, count).scatter_reduce(0, column[won], free[won], "amin")
            sold = (winner < count).nonzero()[:, 0]
            before = holder[sold]
            holding[before[before < count]] = False
            holding[winner[sold]] = True
            holder[sold] = winner[sold]
            price[sold] = highest[sold]
    found: NDArray[np.float64] = price.double().cpu().numpy()
    return found


def _epsilons(spread: float, count: int) -> Iterator[float]:
    epsilon = spread / 8
    while epsilon > spread / (16 * count):
        yield epsilon
        epsilon /= FALL


def _bids(cost: Tensor, price: Tensor, free: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The column that each free row bids for, and its bid."""
    columns, bids = [], []
    for rows in free.split(max(1, BLOCK // len(price))):
        worth = cost[rows].add_(price).neg_()
        best, column = worth.max(dim=1)
        worth.scatter_(1, column[:, None], -torch.inf)
        columns.append(column)
        bids.append(price[column] + (best - worth.amax(dim=1)) + epsilon)
    return torch.cat(columns), torch.cat(bids)

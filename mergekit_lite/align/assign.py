"""The linear assignment problem: a column for every row, so that the chosen entries add up to the least."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mergekit_lite.align.apply import Order

Costs = NDArray[np.float64]
Assign = Callable[[Costs], Order]


def assignment(cost: Costs) -> Order:
    """The exact solution by SciPy: p with the least sum of cost[i, p[i]]; `cost` is n × n.

    SciPy negates a copy to maximise and converts a copy of any other type, so large problems come as float64 costs to
    be minimised: then it needs 8 n² bytes, those of `cost` itself.
    """
    from scipy.optimize import linear_sum_assignment

    if len(cost) == 1:
        return np.zeros(1, dtype=np.int64)
    return np.asarray(linear_sum_assignment(cost)[1], dtype=np.int64)


def value(cost: Costs, p: Order) -> float:
    """What an assignment gains: minus the sum of its costs."""
    return -float(cost[np.arange(len(p)), p].sum())

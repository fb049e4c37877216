"""The merged delta that interferes least with each model in the directions which this model uses."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Param, Report
from mergekit_lite.methods.spectral import mean, on_matrices, wide

DECAY, SQUARE_DECAY, EPSILON = 0.9, 0.999, 1e-8  # Adam's settings


def normal_equations(deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """G = sum_t G_t (n, n) and B = sum_t D_t G_t (m, n) with G_t = D_t^T D_t / |D_t|^2, in double precision.

    The loss sum_t |(D - D_t) D_t^T|^2 / |D_t|^2 has the gradient 2 (D G - B). Zero matrices take no part.
    """
    columns = deltas[0].shape[1]
    gram = deltas[0].new_zeros(columns, columns, dtype=torch.float64)
    pull = torch.zeros_like(deltas[0], dtype=torch.float64)
    for delta in map(wide, deltas):
        size = delta.square().sum()
        if size > 0:
            own = delta.T @ delta / size
            gram += own
            pull += delta @ own
    return gram, pull


def solve(gram: Tensor, pull: Tensor, ridge: float) -> Tensor:
    """D with D (G + e I) = B, where e is `ridge` times the mean of G's eigenvalues."""
    damped = gram.clone()
    damped.diagonal().add_(ridge * float(gram.trace()) / len(gram))
    return torch.cholesky_solve(pull.T, torch.linalg.cholesky(damped)).T


def descend(start: Tensor, gram: Tensor, pull: Tensor, steps: int, rate: float, report: Report) -> Tensor:
    """`steps` steps of Adam from `start` down the loss of `normal_equations`, in the dtype of the arguments. `report`
    is told of each."""
    delta = start.clone()
    first, second = torch.zeros_like(delta), torch.zeros_like(delta)
    for step in range(1, steps + 1):
        gradient = (delta @ gram).sub_(pull).mul_(2)
        first.mul_(DECAY).add_(gradient, alpha=1 - DECAY)
        second.mul_(SQUARE_DECAY).addcmul_(gradient, gradient, value=1 - SQUARE_DECAY)
        length = (second.sqrt() / math.sqrt(1 - SQUARE_DECAY**step)).add_(EPSILON)
        delta.addcdiv_(first, length, value=-rate / (1 - DECAY**step))
        report(step, steps)
    return delta


def _merged(deltas: Sequence[Tensor], solver: str, steps: int, rate: float, ridge: float, report: Report) -> Tensor:
    gram, pull = normal_equations(deltas)
    if solver == "closed":
        return solve(gram, pull, ridge)
    start = mean(deltas) * len(deltas)
    dtype = deltas[0].dtype
    return descend(start.to(dtype), gram.to(dtype), pull.to(dtype), steps, rate, report)


@method(
    Param("solver", "choice", "adam", "Adam as published, or the minimum from a formula", choices=("adam", "closed")),
    Param("steps", "integer", 300, "steps of Adam", 0),
    Param("rate", "number", 1e-5, "step size of Adam: how far an entry moves in a step, at most", 0, open_low=True),
    Param("ridge", "number", 1e-6, "`closed`: added to G, as a part of its mean eigenvalue", 1e-10),
    Param("lambda", "number", 1.0, "factor of the merged delta"),
    takes="delta",
    gives="delta",
    base="required",
    reach="matrix",
    reports=True,
    paper="WUDI-Merging, ICML 2025, arXiv 2503.08099",
)
def wudi(
    xs: Sequence[Tensor], solver: str, steps: int, rate: float, ridge: float, lambda_: float, report: Report
) -> Tensor:
    """Find the delta that interferes least with each model in the directions which this model uses.

    out = lambda D, with D where this loss is small:

        sum_t |(D - D_t) D_t^T|^2 / |D_t|^2.

    Its gradient is 2 (D G - B) with G = sum_t G_t, B = sum_t D_t G_t and G_t = D_t^T D_t / |D_t|^2.

    - `solver: adam`: `steps` steps of Adam of size `rate` from D = sum_t D_t, as published.
    - `solver: closed`: the minimum D = B (G + e I)^-1, e = ridge trace(G) / n. Adam as published stops far from it, so
      the two give different models.

    Takes one or more deltas of one shape and gives that shape, in the dtype of the arithmetic; G and B are formed and
    solved in double precision, Adam runs in the dtype of the arithmetic. A step costs one product (m, n) by (n, n)
    whatever the number of models. Tensors of three or more axes count as matrices (first axis, the rest); vectors,
    scalars and matrices with a side of 1 are averaged, times lambda. A model without a change takes no part.

    Source: Cheng et al., Whoever Started the Interference Should End It, ICML 2025, arXiv 2503.08099 (300 steps, 1e-5).
    """
    return on_matrices(
        xs,
        lambda deltas: lambda_ * _merged(deltas, solver, steps, rate, ridge, report),
        lambda deltas: lambda_ * mean(deltas),
    )

"""Averages weighted by the diagonal Fisher information of every model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.linear import linear
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import REQUIRED, Call, Param, Params, Reach, Slot


class _NormPart:
    def __init__(self, inputs: int):
        self.squares: list[list[float]] = [[] for _ in range(inputs // 2)]

    def add(self, xs: Sequence[Tensor], start: int) -> bool:
        for sums, information in zip(self.squares, xs[len(xs) // 2 :], strict=True):
            sums.append(float(information.double().square().sum()))
        return False


class FisherNorms:
    """A `Measure`: the L2 norm of every model's Fisher information over all tensors of the step."""

    def __init__(self, inputs: int):
        self._inputs = inputs
        self._norms: tuple[float, ...] = ()

    def part(self, tensor: int) -> _NormPart:
        return _NormPart(self._inputs)

    def close(self, parts: Sequence[_NormPart | None]) -> bool:
        found = [part.squares for part in parts if part is not None]
        self._norms = tuple(
            math.sqrt(math.fsum(math.fsum(squares[i]) for squares in found)) for i in range(self._inputs // 2)
        )
        return False

    def result(self, tensor: int) -> tuple[float, ...]:
        return self._norms


def _reach(params: Params) -> Reach:
    return "pooled" if params["normalize"] else "element"


def _measure(params: Params, inputs: int, numels: Sequence[int]) -> FisherNorms:
    return FisherNorms(inputs)


def _without(*slots: Call | Slot, weight: Sequence[float], eps: float, smoothing: str, normalize: bool) -> Call:
    return linear(*slots, weight=tuple(weight))


def _fits(shapes: Sequence[tuple[int, ...]]) -> str | None:
    return None if len(set(shapes)) == 1 else "the Fisher information has another shape than the weights"


def _check(params: Params, inputs: int) -> str | None:
    return "every weight is 0: nothing is left to average" if not any(params["weight"]) else None


@method(
    Param("fisher", "reference", REQUIRED, "checkpoint with this model's diagonal Fisher information", per_input=True),
    Param("weight", "number", 1.0, "share of this model beside its Fisher information", low=0, per_input=True),
    Param("eps", "number", 1e-6, "least importance of an entry", low=0, open_low=True),
    Param(
        "smoothing", "choice", "add", "`eps` is added to the Fisher information, or its floor", choices=("add", "floor")
    ),
    Param("normalize", "flag", True, "divide a model's share by the norm of its Fisher information"),
    reach=_reach,
    measure=_measure,
    without=_without,
    fits=_fits,
    check=_check,
    paper="Merging Models with Fisher-Weighted Averaging, NeurIPS 2022, arXiv 2111.09832",
)
def fisher(
    xs: Sequence[Tensor],
    weight: Sequence[float],
    eps: float,
    smoothing: str,
    normalize: bool,
    stat: tuple[float, ...] | None = None,
) -> Tensor:
    """Mean of the models, entry by entry weighted by how much each depends on that entry (its Fisher information).

    out = sum_t w_t (F_t + eps) x_t / sum_t w_t (F_t + eps) entry by entry, with w_t = weight_t, or
    weight_t / (||F_t|| + eps) where `normalize` is true: the norm runs over all tensors of the model, so that no model
    wins by the scale of its gradients alone.

    With `smoothing: floor` it is max(F_t, eps) in place of F_t + eps. With `normalize: false` and the weights 1 - alpha
    and alpha that is the Fisher-weighted form of WiSE-FT.

    `fisher` names, for every model, a checkpoint whose tensors have the names and shapes of the model's and hold the
    mean squared gradient of the log-likelihood, squared example by example; `merge stats --collect fisher` writes such
    files. Tensors that it lacks take the mean weighted by `weight`. Takes models of one shape and gives that shape, in
    the dtype of the arithmetic. Equal Fisher information everywhere gives the weighted mean, and so does none.

    Sources: Matena and Raffel, NeurIPS 2022, arXiv 2111.09832; Wortsman et al., WiSE-FT, CVPR 2022, arXiv 2109.01903.
    """
    count = len(xs) // 2
    shares = [w / (norm + eps) for w, norm in zip(weight, stat, strict=True)] if stat is not None else list(weight)
    total = torch.zeros_like(xs[0])
    over = torch.zeros_like(xs[0])
    for x, information, share in zip(xs[:count], xs[count:], shares, strict=True):
        if share:
            term = (information.clamp(min=eps) if smoothing == "floor" else information + eps).mul_(share)
            over.add_(term)
            total.add_(term.mul_(x))
    return total.div_(over)

"""Tucker's decomposition of deltas of any order: a small core, and a factor for each axis. FLoRA adapters are such."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.delta import add
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Method, Param, Params
from mergekit_lite.methods.spectral import wide

PAPER = "FLoRA, arXiv 2405.14739"


class Tucker(NamedTuple):
    """A core (r_1 x ... x r_N) and a factor (I_i x r_i) for each axis, with orthonormal columns; of `left` (by axis)
    the squared singular values of the unfoldings that the ranks leave out, summed."""

    core: Tensor
    factors: tuple[Tensor, ...]
    left: tuple[float, ...]

    def whole(self) -> Tensor:
        return fold(self.core, self.factors)


def fold(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """G x_1 A_1 ... x_N A_N, (I_1 x ... x I_N), of a core G (r_1 x ... x r_N) and factors A_i (I_i x r_i)."""
    for factor in factors:
        # The axis in front is contracted and comes back as the last one: after all of them they stand in order.
        core = torch.tensordot(core, factor, dims=([0], [1]))
    return core


def decomposed(x: Tensor, most: Sequence[int | None], energy: float | None = None, sweeps: int = 0) -> Tucker:
    """Tucker's decomposition of `x` (N axes, N > 0) in double precision: the HOSVD, then `sweeps` sweeps of HOOI.

    A_i holds the leading left singular vectors of the unfolding along axis i, `most[i]` at most (None: all). With
    `energy` as few as lose a share of at most (1 - energy) / N of the squared norm. A sweep finds each A_i again, of
    what the other factors leave: the error never rises.
    """
    x = wide(x)
    factors, left = [], []
    for axis, bound in enumerate(most):
        squares, vectors = _directions(_unfolded(x, axis))
        # Summed from the smallest up, so that shares near 1 keep their digits; by r: with r directions.
        beyond = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        rank = vectors.shape[1] if bound is None else min(vectors.shape[1], bound)
        if energy is not None:
            enough = (beyond <= (1 - energy) / x.ndim * beyond[0]).nonzero()
            rank = max(1, min(rank, int(enough[0])))
        factors.append(vectors[:, :rank])
        left.append(float(beyond[rank]))
    for _ in range(sweeps):
        for axis, factor in enumerate(factors):
            rest = x
            for other, along in enumerate(factors):
                if other != axis:
                    rest = _times(rest, along.T, other)
            factors[axis] = _directions(_unfolded(rest, axis))[1][:, : factor.shape[1]]
    core = x
    for axis, factor in enumerate(factors):
        core = _times(core, factor.T, axis)
    return Tucker(core, tuple(factors), tuple(left))


def _unfolded(x: Tensor, axis: int) -> Tensor:
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)


def _times(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    product: Tensor = torch.tensordot(matrix, x, dims=([1], [axis]))
    return product.movedim(0, axis)


def _directions(unfolding: Tensor) -> tuple[Tensor, Tensor]:
    """The squared singular values, the largest first, and as many left singular vectors."""
    if unfolding.shape[0] > unfolding.shape[1]:
        u, s, _ = torch.linalg.svd(unfolding, full_matrices=False)
        return s * s, u
    values, vectors = torch.linalg.eigh(unfolding @ unfolding.T)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def bounds(ndim: int, rank: int | None, kernel_rank: int | None) -> list[int | None]:
    """The largest rank of each axis: that of the first two, and that of a kernel's axes behind them."""
    return [rank if axis < 2 else kernel_rank for axis in range(ndim)]


def _check(params: Params, inputs: int) -> str | None:
    if params["rank"] is None and params["energy"] is None:
        return "`tucker` needs `rank` or `energy`: without a bound nothing is made smaller"
    return None


@method(
    Param("rank", "integer", None, "the largest rank along each of the first two axes", 1),
    Param("kernel_rank", "integer", None, "the same along the axes of a kernel; by default they are kept whole", 1),
    Param("energy", "number", None, "the share of the squared norm that the ranks keep at least", 0, 1, open_low=True),
    Param("sweeps", "integer", 0, "sweeps of HOOI, each of which can only lower the error", 0, 100),
    inputs=(1, 1),
    takes="delta",
    gives="delta",
    base="required",
    reach="matrix",
    check=_check,
    paper=PAPER,
)
def tucker(
    xs: Sequence[Tensor], rank: int | None, kernel_rank: int | None, energy: float | None, sweeps: int
) -> Tensor:
    """Compress a delta of any order to a small core and a factor for each axis, and put it together again.

    With A_i the r_i leading left singular vectors of the unfolding of the delta D along axis i (HOSVD),

        out = G x_1 A_1 x_2 A_2 ... x_N A_N,   G = D x_1 A_1^T x_2 A_2^T ... x_N A_N^T.

    r_i is `rank` for the first two axes, out and in, and `kernel_rank` for those of a kernel. With `energy` it is the
    least rank, within these bounds, that discards at most the share (1 - energy) / N of the squared norm, so that where
    no bound is met all ranks together keep the share `energy`: |D - out|^2 <= sum_i sum_(j > r_i) s_ij^2, the squared
    singular values that are left out along all axes. `sweeps` of HOOI find each A_i again, of D projected on the other
    factors.

    Takes one delta and gives its shape, in the dtype of the arithmetic; decompositions are in double precision. Of a
    matrix it is the truncated singular value decomposition. Vectors and scalars are given back as they are, deltas of
    zeros as zeros, and NaN throughout where there is a NaN or infinity. `save: {as: lora}` and `save: {as: lokr}` store
    factors; this method stores none, but its result can be merged further.

    Source: Si et al., FLoRA: Low-Rank Core Space for N-dimension, 2024, arXiv 2405.14739; De Lathauwer et al., A
    multilinear singular value decomposition, 2000, and On the best rank-1 and rank-(R1, ..., RN) approximation, 2000.
    """
    x = xs[0]
    if not bool(x.isfinite().all()):
        return torch.full_like(x, torch.nan)
    if x.ndim < 2 or not bool(x.any()):
        return x.clone()
    return decomposed(x, bounds(x.ndim, rank, kernel_rank), energy, sweeps).whole().to(x.dtype)


def flora(xs: Sequence[Tensor], scale: float) -> Tensor:
    """The base's weight with a FLoRA adapter folded in, W + scale (G x_1 A_1 ... x_N A_N).

    `xs` are the whole weight (out x in, and a kernel), the core G and the factors A_i. The axes of G and of the list of
    factors are in x out, and the kernel's, as in the published layers.

    Source: Si et al., FLoRA, 2024, arXiv 2405.14739.
    """
    weight, core, *factors = xs
    change = fold(wide(core), [wide(factor) for factor in factors]).transpose(0, 1)
    folded: Tensor = add.fn([change.to(weight.dtype), weight], [scale])
    return folded


@functools.cache
def folding() -> Method:
    """`flora` as a method of the plan, which has no name that recipes could find."""
    return method(
        Param("scale", "number", 1.0, "factor of what is added"),
        inputs=(4, None),
        reach="matrix",
        public=False,
        paper=PAPER,
    )(flora)

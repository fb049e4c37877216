"""Singular value decompositions, exact and randomised, as the methods on whole matrices share them.

All of it is computed in double precision. A tensor of three or more axes is taken as the matrix (first axis, all
others). Directions whose singular value is next to nothing are left out: which ones a decomposition finds there is
chance, and a method that flattens a spectrum would make something of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.random import derive_key, uniform_words
from mergekit_lite.methods.spec import Param

NEGLIGIBLE = 1e-6  # a singular value up to this part of the largest is rounding noise of float32
OVERSAMPLE = 10  # directions that the randomised search follows beyond those asked for
POWER = 4  # how often it multiplies by the matrix and its transpose to sharpen them

SVD = Param(
    "svd",
    "choice",
    "exact",
    "`randomised` finds the largest singular values by random projection: faster where few are needed",
    choices=("exact", "randomised"),
)


class Triplets(NamedTuple):
    """Singular triplets, the largest first: `u` (m, r) and `v` (n, r) with orthonormal columns, `s` (r,)."""

    u: Tensor
    s: Tensor
    v: Tensor

    def matrix(self) -> Tensor:
        """u diag(s) v^T, (m, n)."""
        return (self.u * self.s) @ self.v.T


def on_matrices(
    xs: Sequence[Tensor], matrices: Callable[[list[Tensor]], Tensor], vectors: Callable[[list[Tensor]], Tensor]
) -> Tensor:
    """`matrices` on tensors that are matrices, (m, n) with m, n > 1 once flattened; `vectors` on all others.

    Both get the tensors in their own dtype, as (m, n) or 1-D, and give one of that shape. The result has the shape and
    dtype of the inputs. It is 0 where all of them are, and NaN throughout where one of them holds a NaN or infinity,
    since a decomposition would spread it anyway.
    """
    first = xs[0]
    if not all(bool(x.isfinite().all()) for x in xs):
        return torch.full_like(first, torch.nan)
    if not any(bool(x.any()) for x in xs):
        return torch.zeros_like(first)
    rows = first.shape[0] if first.ndim > 1 else 1
    columns = first.numel() // rows
    if min(rows, columns) > 1:
        result = matrices([x.reshape(rows, columns) for x in xs])
    else:
        result = vectors([x.reshape(-1) for x in xs])
    return result.reshape(first.shape).to(first.dtype)


def mean(xs: Sequence[Tensor]) -> Tensor:
    """The mean of the inputs, in double precision."""
    total = wide(xs[0]).clone()
    for x in xs[1:]:
        total += wide(x)
    return total / len(xs)


def wide(x: Tensor) -> Tensor:
    """`x` in double precision."""
    return x.to(torch.float64)


def triplets(x: Tensor, count: int, svd: str, key: int, floor: float | None = None) -> Triplets:
    """The `count` largest singular triplets of `x` (m, n), in double precision.

    Fewer where the others' singular values are at most `floor`, by default a millionth of the largest. Of every u the
    first entry of the largest magnitude is positive. `svd` is `exact` or `randomised`; the random search is Halko,
    Martinsson and Tropp's with signs drawn from `key`, so it gives the same on any device and in any order of work. It
    gives way to the exact decomposition where it would be no cheaper.
    """
    x = wide(x)
    if svd == "randomised" and count + OVERSAMPLE < min(x.shape):
        u, s, v = _randomised(x, count + OVERSAMPLE, key)
    else:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        v = vh.T
    if floor is None:
        floor = NEGLIGIBLE * float(s[0])
    kept = min(count, int((s > floor).sum()))
    u, s, v = u[:, :kept], s[:kept], v[:, :kept]
    signs = leading_signs(u)
    return Triplets(u * signs, s, v * signs)


def left_basis(blocks: Sequence[Tensor], count: int, svd: str, key: int, least: float) -> tuple[Tensor, Tensor]:
    """The left singular vectors (m, r) and singular values (r,) of the blocks (m, n_i) side by side, the largest first.

    At most `count`, and only those above `least` times the largest. They are found from the sum of block block^T, so
    that the blocks are never put together, or where they are narrower than high from the inner products of all columns;
    this resolves singular values down to some 1e-8 of the largest.
    """
    rows, columns = blocks[0].shape[0], sum(b.shape[1] for b in blocks)
    if rows > columns and svd == "exact":
        joined = torch.cat([wide(b) for b in blocks], dim=1)
        values, vectors = torch.linalg.eigh(joined.T @ joined)
        s = values.flip(0).clamp_(min=0).sqrt_()
        kept = min(count, int((s > least * s[0]).sum()))
        # Small singular values leave their vectors less than orthogonal.
        u, r = torch.linalg.qr(joined @ (vectors.flip(1)[:, :kept] / s[:kept]))
        u = u * r.diagonal().sign()
        return u * leading_signs(u), s[:kept]
    if svd == "randomised" and count + OVERSAMPLE < rows:
        q = _signs(rows, count + OVERSAMPLE, key, blocks[0].device)
        for _ in range(POWER + 1):
            q = torch.linalg.qr(_sum(wide(b) @ (wide(b).T @ q) for b in blocks)).Q
        small = _sum((c := wide(b).T @ q).T @ c for b in blocks)
        values, vectors = torch.linalg.eigh(small)
        vectors = q @ vectors
    else:
        values, vectors = torch.linalg.eigh(_sum(wide(b) @ wide(b).T for b in blocks))
    s = values.flip(0).clamp_(min=0).sqrt_()
    kept = min(count, int((s > least * s[0]).sum()))
    u = vectors.flip(1)[:, :kept]
    return u * leading_signs(u), s[:kept]


def polar(x: Tensor) -> Tensor:
    """The matrix with orthonormal columns (rows, where there are fewer) that is nearest to `x`: P Q^T of P S Q^T.

    Directions that `x` does not have, up to rounding, stay out of it.
    """
    found = triplets(x, min(x.shape), "exact", 0)
    return found.u @ found.v.T


def _randomised(x: Tensor, count: int, key: int) -> tuple[Tensor, Tensor, Tensor]:
    if x.shape[0] < x.shape[1]:
        v, s, u = _randomised(x.T, count, key)
        return u, s, v
    q = torch.linalg.qr(x @ _signs(x.shape[1], count, key, x.device)).Q
    for _ in range(POWER):
        q = torch.linalg.qr(x.T @ q).Q
        q = torch.linalg.qr(x @ q).Q
    u, s, vh = torch.linalg.svd(q.T @ x, full_matrices=False)
    return q @ u, s, vh.T


def _signs(rows: int, columns: int, key: int, device: torch.device) -> Tensor:
    """Random signs (rows, columns). Unlike Gaussian numbers they need no function that differs between processors."""
    words = uniform_words(derive_key(key, "signs"), 0, rows * columns)
    signs = np.where(words < 2**31, 1.0, -1.0)
    return torch.from_numpy(signs).reshape(rows, columns).to(device)


def leading_signs(u: Tensor) -> Tensor:
    """The sign of the first entry of the largest magnitude in every column."""
    size = u.abs()
    # Rounding must not decide between entries that mirror each other.
    top = (size >= size.amax(dim=0) * (1 - 1e-9)).to(torch.uint8).argmax(dim=0)
    return u.gather(0, top.unsqueeze(0)).squeeze(0).sign()


def _sum(terms: Iterator[Tensor]) -> Tensor:
    total = next(terms)
    for term in terms:
        total += term
    return total

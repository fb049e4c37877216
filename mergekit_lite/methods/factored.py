"""Deltas of adapters as sums of products of factors, s L R, which no step here multiplies out.

All of it is computed in double precision. The factors are thin, so their QR decompositions reduce every singular value
decomposition of a delta, or of deltas side by side, to one of a matrix with as many rows and columns as all factors
together have columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import REQUIRED, Method, Param
from mergekit_lite.methods.spectral import Triplets, leading_signs, wide

SCALE = Param("scale", "number", 1.0, "factor of each product", per_input=True)
TURNED = Param("turned", "flag", False, "whether the delta is the transpose of the product", per_input=True)
MODEL = Param("model", "integer", 0, "whose delta each product belongs to", 0, per_input=True)
MODELS = Param("models", "integer", 1, "how many deltas there are", 1)
ROWS = 1 << 10  # of a product at once
Shape = tuple[int, ...]


class Pair(NamedTuple):
    """A delta L R: `left` (m, r) and `right` (r, n), in double precision."""

    left: Tensor
    right: Tensor

    @property
    def turned(self) -> Pair:
        """The delta's transpose."""
        return Pair(self.right.T, self.left.T)


def pairs_of(
    xs: Sequence[Tensor], scale: Sequence[float], turned: Sequence[bool], model: Sequence[int], models: int
) -> list[Pair]:
    """The deltas of `models` by the factors A_1, B_1, A_2, B_2, ... as adapters hold them: each the sum of the products
    scale_i B_i A_i, or their transposes where `turned`, that `model` gives it; without any it is 0.

    A is r x in, with a kernel's axes behind, and B out x r, with axes of length 1 behind.
    """
    terms: list[list[Pair]] = [[] for _ in range(models)]
    for a, b, factor, turn, owner in zip(xs[::2], xs[1::2], scale, turned, model, strict=True):
        pair = Pair(wide(b.flatten(1)) * factor, wide(a.flatten(1)))
        terms[owner].append(pair.turned if turn else pair)
    some = next(pair for found in terms for pair in found)
    return [sum_of(found) if found else Pair(some.left[:, :0], some.right[:0]) for found in terms]


def all_finite(xs: Sequence[Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in xs)


def left_directions(pairs: Sequence[Pair], count: int, least: float) -> tuple[Tensor, list[Tensor]]:
    """The left singular vectors U (m, k) of the deltas side by side, the largest first, and U^T L_t (k, r_t) of each.

    At most `count`, and only those whose singular value is above `least` times the largest.
    """
    q, corners = _orthogonal([pair.left for pair in pairs])
    # [D_1 ... D_T] = Q [T_1 R_1 ... T_T R_T], and R_t = S_t P_t^T with orthonormal columns P_t.
    small = torch.cat(
        [t @ torch.linalg.qr(p.right.T, mode="r").R.T for t, p in zip(corners, pairs, strict=True)], dim=1
    )
    u, s, _ = torch.linalg.svd(small, full_matrices=False)
    kept = min(count, int((s > least * s[0]).sum()))
    vectors = q @ u[:, :kept]
    signs = leading_signs(vectors) if kept else vectors.new_ones(0)
    return vectors * signs, [(u[:, :kept] * signs).T @ t for t in corners]


def _orthogonal(blocks: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Q with orthonormal columns and T_t such that each block is Q T_t."""
    q, r = torch.linalg.qr(torch.cat(list(blocks), dim=1))
    return q, list(r.split([block.shape[1] for block in blocks], dim=1))


def sum_of(pairs: Sequence[Pair]) -> Pair:
    """The sum of deltas as one product."""
    if len(pairs) == 1:
        return pairs[0]
    return Pair(torch.cat([p.left for p in pairs], dim=1), torch.cat([p.right for p in pairs]))


def singular(pair: Pair) -> Triplets:
    """All singular triplets of a delta, its product's rank many at most. Of every u the first entry of the largest
    magnitude is positive."""
    q, left = torch.linalg.qr(pair.left)
    p, right = torch.linalg.qr(pair.right.T)
    u, s, vh = torch.linalg.svd(left @ right.T, full_matrices=False)
    u, v = q @ u, p @ vh.T
    signs = leading_signs(u)
    return Triplets(u * signs, s, v * signs)


def norm(pair: Pair) -> Tensor:
    """The Frobenius norm of a delta."""
    left, right = (torch.linalg.qr(x, mode="r").R for x in (pair.left, pair.right.T))
    found: Tensor = torch.linalg.vector_norm(left @ right.T)
    return found


def columns(shapes: Sequence[Shape]) -> int:
    """How many columns all factors A_1, B_1, A_2, B_2, ... of these shapes have together."""
    return sum(a[0] for a in shapes[::2])


def result_shape(shapes: Sequence[Shape], turned: bool) -> Shape:
    """The shape of the delta of a pair of factors A and B."""
    a, b = shapes[:2]
    return (a[1], b[0]) if turned else (b[0], *a[1:])


def packed(left: Tensor, right: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """The factors of a result, L (m, k) and R (k, n), as one vector: R before L, with zeros up to `rank` columns."""
    whole_right = right.new_zeros(rank, right.shape[1])
    whole_left = left.new_zeros(left.shape[0], rank)
    whole_right[: len(right)], whole_left[:, : left.shape[1]] = right, left
    return torch.cat([whole_right.reshape(-1), whole_left.reshape(-1)]).to(dtype)


def packed_rank(shape: Shape, count: int) -> int:
    """The columns of a packed result for a delta of `shape` from factors with `count` columns together."""
    return min(shape[0], count)


def packed_shape(shape: Shape, rank: int) -> Shape:
    return (rank * (shape[0] + math.prod(shape[1:])),)


def _part(xs: Sequence[Tensor], start: int, size: tuple[int, ...]) -> Tensor:
    """A part of a vector, in the shape `size`."""
    return xs[0][start : start + math.prod(size)].clone().view(size)


@functools.cache
def parting(size: Shape) -> Method:
    """`_part` as a method of the plan, for parts of one shape."""
    return method(
        Param("start", "integer", REQUIRED, "where the part begins", 0),
        Param("size", "words", REQUIRED, "its shape"),
        name="part",
        inputs=(1, 1),
        takes="delta",
        reach="matrix",
        shape=lambda shapes: size,
        public=False,
    )(_part)


def widen(xs: Sequence[Tensor]) -> Tensor:
    """B A of factors A (r x in, with a kernel's axes behind) and B (out x r), multiplied in double precision."""
    a, b = xs
    right, left = wide(a.flatten(1)), b.flatten(1)
    product = torch.empty(len(left), right.shape[1], dtype=a.dtype, device=a.device)
    for top in range(0, len(left), ROWS):
        product[top : top + ROWS] = wide(left[top : top + ROWS]) @ right
    return product


@functools.cache
def widening() -> Method:
    """`widen` as a method of the plan."""
    return method(
        inputs=(2, 2),
        takes="delta",
        reach="matrix",
        shape=lambda shapes: result_shape(shapes, False),
        public=False,
    )(widen)


@functools.cache
def merging(fn: Callable[..., Tensor], keyed: str, shape: Shape, *params: Param) -> Method:
    """A merge `fn(xs, scale, turned, model, models, ...)` of deltas of `shape`, whose settings but the first are
    `params`, as a method of the plan on their factors; its random numbers are those of the method `keyed`."""

    def size(shapes: Sequence[Shape]) -> Shape:
        return packed_shape(shape, packed_rank(shape, columns(shapes)))

    return method(
        SCALE,
        TURNED,
        MODEL,
        MODELS,
        *params,
        takes="delta",
        reach="matrix",
        shape=size,
        positioned=True,
        keyed=keyed,
        public=False,
    )(fn)

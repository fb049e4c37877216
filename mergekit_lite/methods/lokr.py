"""A delta as a LoKr adapter whose left half is 1: Tucker's form for kernels, two factors for matrices. No recipe names
these methods: the plan uses them for `as: lokr`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.low_rank import FIGURES, full_rank
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import REQUIRED, Method, Param
from mergekit_lite.methods.spectral import triplets, wide
from mergekit_lite.methods.tucker import bounds, decomposed

SWEEPS = 2  # of HOOI
Shape = tuple[int, ...]


def part_shapes(delta: Shape, rank: int) -> Mapping[str, Shape]:
    """The tensors of a module with a delta of this shape as peft has them with `decompose_factor: 1`, in order: the
    right half whole where the rank is at least half of the larger side, of kernels larger than 1 with a core."""
    out, inputs, *kernel = delta
    if 2 * rank >= max(out, inputs):
        return {"lokr_w1": (1, 1), "lokr_w2": delta}
    if math.prod(kernel) == 1:
        return {"lokr_w1": (1, 1), "lokr_w2_a": (out, rank), "lokr_w2_b": (rank, inputs)}
    core = (rank, rank, *kernel, *(1 for _ in range(2 - len(kernel))))
    return {"lokr_w1": (1, 1), "lokr_t2": core, "lokr_w2_a": (rank, out), "lokr_w2_b": (rank, inputs)}


def most_rank(delta: Shape) -> int:
    """The largest rank that a delta of this shape can need."""
    return full_rank(delta) if math.prod(delta[2:]) == 1 else max(delta[:2])


def lokr_parts(xs: Sequence[Tensor], rank: int, dtype: str) -> Tensor:
    """The tensors that `part_shapes` tells for a delta D, one behind the other, and behind them |D| and the norm of
    what they leave of it.

    Of kernels it is Tucker's decomposition with rank `rank` along out and in, HOSVD and two sweeps of HOOI; of matrices
    the truncated singular value decomposition. In double precision, rounded to `dtype` before what they leave is
    measured. All are NaN where D holds a NaN or infinity.
    """
    delta = xs[0]
    shapes = part_shapes(tuple(delta.shape), rank)
    if not bool(delta.isfinite().all()):
        return delta.new_full(_shape(rank)([tuple(delta.shape)]), torch.nan)
    exact = wide(delta)
    made = {name: exact.new_zeros(shape) for name, shape in shapes.items()}
    made["lokr_w1"].fill_(1)
    if "lokr_w2" in made:
        made["lokr_w2"].copy_(exact)
    elif "lokr_t2" in made:
        found = decomposed(exact, bounds(delta.ndim, rank, None), sweeps=SWEEPS)
        u, v, *rest = found.factors
        core = found.core
        for axis, factor in enumerate(rest, 2):  # a kernel's own factors are square
            core = torch.tensordot(core, factor, dims=([axis], [1])).movedim(-1, axis)
        made["lokr_w2_a"][: u.shape[1]], made["lokr_w2_b"][: v.shape[1]] = u.T, v.T
        made["lokr_t2"][: u.shape[1], : v.shape[1]] = core.reshape(*core.shape[:2], *shapes["lokr_t2"][2:])
    else:
        three = triplets(exact.flatten(1), rank, "exact", 0, floor=0.0)
        root, kept = three.s.sqrt(), len(three.s)
        made["lokr_w2_a"][:, :kept], made["lokr_w2_b"][:kept] = three.u * root, (three.v * root).T
    stored = {name: part.to(delta.dtype).to(getattr(torch, dtype)) for name, part in made.items()}
    again = _whole({name: wide(part) for name, part in stored.items()})
    left = torch.linalg.vector_norm(exact - again.reshape(exact.shape))
    figures = torch.stack([torch.linalg.vector_norm(exact), left])
    return torch.cat([part.reshape(-1).to(delta.dtype) for part in (*stored.values(), figures)])


def _whole(parts: Mapping[str, Tensor]) -> Tensor:
    if "lokr_w2" in parts:
        return parts["lokr_w2"]
    if "lokr_t2" in parts:
        return torch.einsum("ijkl,ip,jr->prkl", parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    return parts["lokr_w2_a"] @ parts["lokr_w2_b"]


def lokr_rank(xs: Sequence[Tensor], rank: int, energy: float) -> Tensor:
    """The rank, up to `rank`, with which a kernel's decomposition keeps the share `energy` of |D|^2, as a vector of one
    number: the larger of the two that `decomposed` needs."""
    delta = xs[0]
    if not bool(delta.isfinite().all()):
        return delta.new_full((1,), rank)
    if not bool(delta.any()):
        return delta.new_ones(1)
    found = decomposed(delta, [None] * delta.ndim, energy)
    return delta.new_full((1,), min(rank, max(found.core.shape[:2])))


def _shape(rank: int) -> Callable[[Sequence[Shape]], Shape]:
    return lambda shapes: (sum(map(math.prod, part_shapes(shapes[0], rank).values())) + FIGURES,)


@functools.cache
def halving(rank: int) -> Method:
    """`lokr_parts` as a method of the plan for one rank, which decides the shape of its result."""
    return method(
        Param("rank", "integer", rank, "of the core along out and in", 1),
        Param("dtype", "choice", REQUIRED, "of the stored parts", choices=()),
        takes="delta",
        inputs=(1, 1),
        reach="matrix",
        shape=_shape(rank),
        figures=FIGURES,
        public=False,
    )(lokr_parts)


@functools.cache
def measuring_kernels() -> Method:
    """`lokr_rank` as a method of the plan."""
    return method(
        Param("rank", "integer", REQUIRED, "the largest rank to give", 1),
        Param("energy", "number", REQUIRED, "the share of the squared norm to keep", 0, 1, open_low=True),
        takes="delta",
        inputs=(1, 1),
        reach="matrix",
        shape=lambda shapes: (1,),
        public=False,
    )(lokr_rank)

"""An adapter folded into its base's weight. No recipe names this method: the plan uses it where a model has one."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.delta import add
from mergekit_lite.methods.gram import fold
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Beside, Method, Param, Params, Reach


def lora(xs: Sequence[Tensor], scale: float, transposed: bool, dora: bool) -> Tensor:
    """The base's weight with a low-rank adapter folded in.

    out = W + scale B A, with DoRA m (W + scale B A) / |W + scale B A|, the norm that of what leads to one output.

    `xs` are rows of W (out x in, for convolutions with the kernel's axes behind), the factors A (r x in) and B (out x
    r, the same rows as of W) and, with `dora`, the magnitudes m of these rows. `transposed` is for W stored as in x
    out: then the rows are those of W and the columns of A, with all of B. The product is summed over r in order, one
    multiplication and one addition at a time, so that the bits depend neither on the rows beside nor on the machine.

    Source: Hu et al., LoRA, ICLR 2022, arXiv 2106.09685; Liu et al., DoRA, ICML 2024, arXiv 2402.09353.
    """
    weight, a, b = xs[0].flatten(1), xs[1].flatten(1), xs[2].flatten(1)
    left, right = (a.T, b.T.contiguous()) if transposed else (b, a)
    folded: Tensor = add.fn([summed(left, right), weight], [scale])
    if not dora:
        return folded
    axis = 0 if transposed else 1
    wide = folded.movedim(axis, -1).to(torch.float64)
    norm = fold(wide * wide, 1).sqrt_()
    # A row of zeros has no direction and stays one.
    factor = torch.where(norm > 0, xs[3].reshape(-1, 1) / norm, 1.0).to(folded)
    return folded.mul_(factor.movedim(-1, axis))


def summed(left: Tensor, right: Tensor) -> Tensor:
    """The product of (m, r) and (r, n), summed over r in order: no entry depends on the others."""
    product = torch.zeros(len(left), right.shape[1], dtype=left.dtype, device=left.device)
    term = torch.empty_like(product)
    for column, row in zip(left.unbind(1), right.unbind(0), strict=True):
        torch.mul(column.unsqueeze(1), row, out=term)
        product.add_(term)
    return product


def _reach(params: Params) -> Reach:
    return "matrix" if params["dora"] and params["transposed"] else "row"


def _beside(params: Params) -> tuple[Beside, ...]:
    factors: tuple[Beside, ...] = ("columns", "whole") if params["transposed"] else ("whole", "rows")
    return (*factors, "rows") if params["dora"] else factors


@functools.cache
def folding() -> Method:
    """`lora` as a method of the plan. It is no name of this module, so that recipes do not find it: its inputs have
    shapes of their own."""
    return method(
        Param("scale", "number", 1.0, "factor of the product"),
        Param("transposed", "flag", False, "the weight is stored as in x out"),
        Param("dora", "flag", False, "rows get the lengths that DoRA has learned"),
        inputs=(3, 4),
        reach=_reach,
        row_axis="first",
        beside=_beside,
        public=False,
        paper="LoRA, ICLR 2022, arXiv 2106.09685",
    )(lora)


def multiply(xs: Sequence[Tensor], scale: float) -> Tensor:
    """scale B A, of the factors A (r x in, with a kernel's axes behind) and B (out x r): the delta of an adapter."""
    return summed(xs[1].flatten(1), xs[0].flatten(1)).mul_(scale)


def multiply_turned(xs: Sequence[Tensor], scale: float) -> Tensor:
    """scale (B A)^T, for weights that are stored as in x out."""
    return summed(xs[0].T, xs[1].T).mul_(scale)


@functools.cache
def multiplying(transposed: bool) -> Method:
    """`multiply`, or `multiply_turned`, as a method of the plan."""

    def shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        a, b = shapes
        return (a[1], b[0]) if transposed else (b[0], *a[1:])

    return method(
        Param("scale", "number", 1.0, "factor of the product"),
        takes="delta",
        inputs=(2, 2),
        reach="matrix",
        shape=shape,
        public=False,
    )(multiply_turned if transposed else multiply)

"""Tensors taken over as they are: layers put one above the other, one model passed on."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor
from mergekit_lite.methods.linear import weighted_sum
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Param, Params


@method(
    Param("layers", "layers", None, "the layers taken, counted from 0, the end not included", per_input=True),
    reach="structure",
    paper="mergekit, EMNLP 2024, arXiv 2403.13257",
)
def stack(xs: Sequence[Tensor], layers: Sequence[tuple[int, int] | None]) -> Tensor:
    """Put layers of several models one above the other: a deeper or shallower model.

    Layer k of the result is the k-th of the layers named, in the order of `of`; without `layers` an input gives all of
    its own. Tensors outside the layers come from `rest`, or from the first input; config.json follows the new depth.

    Works on names, not on numbers: each tensor is copied as it is, in its stored dtype, whatever its shape. The plan
    carries it out, so there is nothing to compute here; calling it raises TypeError.

    Source: Goddard et al., Arcee's MergeKit, EMNLP 2024 (industry track), arXiv 2403.13257 (its passthrough method).
    """
    raise TypeError("`stack` is carried out by the plan, tensor by tensor there is nothing to compute")


def _pick(params: Params, inputs: int) -> int | None:
    return 0 if params["scale"] == 1 else None


@method(
    Param("scale", "number", 1.0, "factor of every tensor"),
    inputs=(1, 1),
    paper="mergekit, EMNLP 2024, arXiv 2403.13257",
    pick=_pick,
)
def passthrough(xs: Sequence[Tensor], scale: float) -> Tensor:
    """Pass one model on as it is, or scaled.

    out = scale x.

    Takes a tensor of any shape and gives that shape. With a scale of 1 it is copied bit for bit; otherwise it is
    multiplied in the dtype of the arithmetic.

    Source: Goddard et al., Arcee's MergeKit, EMNLP 2024 (industry track), arXiv 2403.13257.
    """
    return weighted_sum(xs, (scale,))

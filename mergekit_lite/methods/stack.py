"""Tensors taken over as they are: layers put one above the other, some shared with other models, one passed on."""

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


def _check(params: Params, inputs: int) -> str | None:
    if params["layers"] is None and params["tensors"] is None:
        return "`share` needs one of `layers` and `tensors`: what is taken from the first input."
    return None


@method(
    Param(
        "layers",
        "spans",
        None,
        "layers taken from the first input, counted from 0; both ends of a range included",
        choices=("below", "above"),
    ),
    Param("tensors", "globs", None, "further tensors taken from the first input, by name"),
    reach="structure",
    inputs=(2, 2),
    check=_check,
    paper="NEAS, CVPR 2021, arXiv 2104.00597",
)
def share(xs: Sequence[Tensor], layers: object, tensors: object) -> Tensor:
    """Share some layers with other models and keep the rest: a partial merge.

    out = x_1 for the tensors that `layers` or `tensors` name, out = x_2 for all others. The first input is a merged
    model, the second that of one task; a step for each task, and a save for each of these steps, give as many
    checkpoints, in which what is shared is the same.

    - Shared tensors are stored in files of their own. What several saves share is computed and written once: one file
      has a name in each of their folders (a hard link), so it takes its bytes on the disk once. A folder may be removed
      or moved, and the others stay whole. The file is read-only: a program that wrote into it would change all of them.
      Where folders lie on different disks, or a file system has no such links, the run writes copies and says so.
    - `below` are the embeddings, `above` the other tensors outside the layers: the last norm, the head.
    - `merge diff A B --base BASE --split 0.2` names the layers in which the tasks agree, in the form that stands here.

    Works on names, not on numbers: each tensor is copied as it is, in its stored dtype, or computed as its step says.
    Names, configuration and tokenizer are those of the second input; what is shared must have one shape in both. The
    plan carries it out, so there is nothing to compute here; calling it raises TypeError.

    Sources: Chen et al., One-Shot Neural Ensemble Architecture Search by Diversity-Guided Search Space Shrinking, CVPR
    2021, arXiv 2104.00597 (networks that share their first layers).
    """
    raise TypeError("`share` is carried out by the plan, tensor by tensor there is nothing to compute")


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

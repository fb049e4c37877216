"""Linear layers merged so that the outputs, not the weights, come closest: RegMean."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.linear import linear
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import REQUIRED, Call, Param, Slot


def _without(*slots: Call | Slot, alpha: float, ridge: float) -> Call:
    return linear(*slots)


def _fits(shapes: Sequence[tuple[int, ...]]) -> str | None:
    grams = shapes[len(shapes) // 2 :]
    if len(shapes[0]) != 2:
        return "a Gram matrix belongs to the weight of a linear layer (out, in)"
    turned = all(len(shape) == 3 for shape in grams)
    inner = shapes[0][0 if turned else 1]
    wanted = (1, inner, inner) if turned else (inner, inner)
    if any(shape != wanted for shape in grams):
        return f"a Gram matrix has another shape than ({inner}, {inner})"
    return None


@method(
    Param("gram", "reference", REQUIRED, "checkpoint with the Gram matrices of this model's inputs", per_input=True),
    Param("alpha", "number", 0.9, "factor of the Gram matrices' entries off the diagonal", 0, 1),
    Param("ridge", "number", 0.0, "pull towards the mean, as a share of the mean eigenvalue", low=0),
    takes="weight",
    gives="weight",
    reach="matrix",
    without=_without,
    fits=_fits,
    paper="Dataless Knowledge Fusion (RegMean), ICLR 2023, arXiv 2212.09849",
)
def regmean(xs: Sequence[Tensor], alpha: float, ridge: float) -> Tensor:
    """Merge linear layers by least squares: the outputs of the merged layer come closest to those of its parents.

    out = (sum_t W_t G_t) (sum_t G_t)^-1, with G_t = alpha G + (1 - alpha) diag(G) of the inputs' Gram matrix
    G = X_t^T X_t / n_t. With `ridge` r, S = sum_t G_t gets r tr(S) / d I and the right side as much of the mean weight,
    so that it pulls towards the mean. Directions that no model's inputs have take the mean.

    `gram` names, for every model, a checkpoint that holds, under the name of each linear weight (out, in), the matrix
    (in, in). Where the weight is stored as (in, out), as GPT-2's are, the matrix has the shape (1, in, in), which tells
    the two apart when the weight is square. Tensors that it lacks take the plain mean. `merge stats` writes such files.
    Takes models of one shape and gives that shape; solved in float64. The memory of one layer is its weights and Gram
    matrices in float64.

    RegMean++ is this method with other statistics: the Gram matrices of a layer are those of its inputs when each
    model's data goes through the merged layers before it, not through the model's own. So they are gathered layer by
    layer, in turn with the merges.

    Sources: Jin et al., ICLR 2023, arXiv 2212.09849; RegMean++, 2025, arXiv 2508.03121.
    """
    count = len(xs) // 2
    if xs[count].dim() == 3:
        return _solved([x.T for x in xs[:count]], [gram[0] for gram in xs[count:]], alpha, ridge).T.contiguous()
    return _solved(xs[:count], xs[count:], alpha, ridge)


def _solved(parents: Sequence[Tensor], grams: Sequence[Tensor], alpha: float, ridge: float) -> Tensor:
    """Weights (out, in) and their Gram matrices (in, in) to one weight."""
    mean = sum(x.double() for x in parents[1:]) + parents[0].double()
    mean = mean / len(parents)
    summed = torch.zeros(mean.shape[1], mean.shape[1], dtype=torch.float64, device=mean.device)
    right = torch.zeros_like(mean)
    for weights, gram in zip(parents, grams, strict=True):
        shrunk = gram.double() * alpha
        shrunk.diagonal().copy_(gram.diagonal())
        summed += shrunk
        right += weights.double() @ shrunk
    if ridge:
        pull = ridge * summed.diagonal().mean()
        summed.diagonal().add_(pull)
        right += pull * mean
    # Solved for the distance from the mean: where the sum is singular, the pseudo-inverse leaves the mean in place.
    distance = right - mean @ summed
    factor, failed = torch.linalg.cholesky_ex(summed)
    solution = (
        torch.linalg.lstsq(summed, distance.T, driver="gelsd").solution
        if bool(failed) or _singular(factor)
        else torch.cholesky_solve(distance.T, factor)
    )
    return (mean + solution.T).to(parents[0].dtype)


def _singular(factor: Tensor) -> bool:
    """Whether a Cholesky factor belongs to a matrix that is singular to working precision."""
    diagonal = factor.diagonal().abs()
    if not diagonal.numel():
        return False
    return bool(diagonal.min() <= diagonal.max() * torch.finfo(factor.dtype).eps ** 0.5)

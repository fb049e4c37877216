"""Masks of n in every m entries, laid one beside the other."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.keys import keys_of
from mergekit_lite.methods.linear import weighted_sum
from mergekit_lite.methods.mask import masked
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.select import keep_count
from mergekit_lite.methods.spec import Param, Params


def _check(params: Params, inputs: int) -> str | None:
    n, m = params["n"], params["m"]
    return f"`n: {n}` is more than `m: {m}`: n entries of every m are kept" if n > m else None


def _remark(params: Params, inputs: int) -> str | None:
    n, m = params["n"], params["m"]
    if n * inputs <= m:
        return None
    return f"{inputs} models want {n} each of {m} entries: the later ones get what is left, lower `n`"


@method(
    Param("weight", "number", 1.0, "factor of this model's delta", per_input=True),
    Param("n", "integer", 64, "how many of `m` neighbouring entries each model keeps", low=1),
    Param("m", "integer", 256, "how many neighbouring entries of a row make a group", low=1),
    Param("lambda", "number", 1.0, "factor of the merged delta"),
    takes="delta",
    gives="delta",
    base="required",
    reach="row",
    paper="CABS, ICML 2025, arXiv 2503.01874",
    check=_check,
    remark=_remark,
)
def cabs(xs: Sequence[Tensor], weight: Sequence[float], n: int, m: int, lambda_: float) -> Tensor:
    """Keep n of every m neighbouring changes of each model, and none that an earlier model keeps.

    out = base + lambda sum_t weight_t m_t d_t, with d_t = x_t - base. Models are taken in the order of `of`: in each
    group of `m` neighbouring entries the mask m_t has the `n` largest |d_t| among those that no earlier mask has.

    Takes one or more models fine-tuned from the base, of one shape, and gives that shape, in the dtype of the
    arithmetic. Groups lie along the last axis; a shorter group at the end of a row of length l keeps
    max(1, floor(l n / m)). Equal magnitudes rank by index; entries of 0 are left to later models.

    Source: Yang et al., CABS: Conflict-aware and balanced sparsification for enhancing model merging, ICML 2025, arXiv
    2503.01874.
    """
    length = xs[0].shape[1]
    full = length // m * m
    ends = [(0, full, m), (full, length, length - full)]
    free = torch.ones_like(xs[0], dtype=torch.bool)
    kept = []
    for x in xs:
        keys = torch.from_numpy(keys_of(x.contiguous())).to(x.device)
        keys = torch.where(free, keys, 0)
        mask = torch.zeros_like(free)
        for start, stop, size in ends:
            if stop > start:
                groups = keys[:, start:stop].reshape(-1, size)
                count = n if size == m else keep_count(size, n / m)
                # A stable sort of descending keys: the first of equals comes first.
                order = groups.argsort(dim=1, descending=True, stable=True)[:, :count]
                chosen = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)
                mask[:, start:stop] = chosen.reshape(len(x), stop - start)
        mask &= keys > 0
        free &= ~mask
        kept.append(masked(x, mask))
    return weighted_sum(kept, [w * lambda_ for w in weight])

"""Changes of one model alone kept whole, shared ones averaged."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.derived import Sums
from mergekit_lite.methods.mask import masked
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Param, Params, Reach

EPSILON = Param("epsilon", "number", 1e-5, "a change up to this size counts as none, in units of the weights", low=0)
PAPER = "RAM, 2026, arXiv 2601.13572"


def _changed(xs: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Which entries of each input count as changed, and by how many inputs each entry is."""
    # Written so that NaN counts as a change, and shows.
    masks = [~(x.abs() <= epsilon) for x in xs]
    count = torch.zeros_like(xs[0])
    for mask in masks:
        count.add_(mask)
    return masks, count


def _merge(xs: Sequence[Tensor], epsilon: float, boost: Sequence[float]) -> Tensor:
    masks, count = _changed(xs, epsilon)
    alone = count == 1
    result = torch.zeros_like(count)
    for x, mask, factor in zip(xs, masks, boost, strict=True):
        changed = masked(x, mask)
        result.add_(changed if factor == 1 else torch.where(alone, changed * factor, changed))
    return result.div_(count.clamp_(min=1))


@method(
    EPSILON,
    takes="delta",
    gives="delta",
    base="required",
    paper=PAPER,
)
def ram(xs: Sequence[Tensor], epsilon: float) -> Tensor:
    """Keep what one model alone has changed, average what several have.

    out = base + sum_t m_t d_t / max(1, sum_t m_t), with d_t = x_t - base and m_t = 1 where |d_t| > epsilon, else 0.

    Takes one or more models trained from the base, of one shape, and gives that shape, in the dtype of the arithmetic.
    Meant for agents trained by reinforcement learning, whose changes are sparse and lie in different places.

    Source: Yuan et al., Behavior Knowledge Merge in Reinforced Agentic Models (RAM), 2026, arXiv 2601.13572.
    """
    return _merge(xs, epsilon, [1.0] * len(xs))


def _reach(params: Params) -> Reach:
    return "pooled" if params["scope"] == "global" else "measured"


def _measure(params: Params, inputs: int, numels: Sequence[int]) -> Sums:
    def counts(tensor: int, xs: Sequence[Tensor], start: int) -> list[Tensor]:
        masks, count = _changed(xs, params["epsilon"])
        return [chosen for mask in masks for chosen in (mask & (count > 1), mask & (count == 1))]

    return Sums(2 * inputs, counts)


@method(
    Param("r", "number", 0.1, "how strongly the share of common changes raises those of one model alone", low=0),
    Param("alpha", "number", 0.2, "the most that this share counts for", low=0),
    EPSILON,
    Param("scope", "choice", "tensor", "where shared and lone changes are counted", choices=("tensor", "global")),
    takes="delta",
    gives="delta",
    base="required",
    reach=_reach,
    paper=PAPER,
    measure=_measure,
)
def ramplus_tl(
    xs: Sequence[Tensor], r: float, alpha: float, epsilon: float, scope: str, stat: tuple[float, ...] | None = None
) -> Tensor:
    """Keep what one model alone has changed, raised by how much it shares; average what several have.

    out = base + sum_t b_t m_t d_t / max(1, sum_t m_t), with d_t and m_t as in `ram`; b_t = 1 where several models have
    changed the entry, and where t alone has,

        b_t = 1 + r min(alpha, shared_t / alone_t),

    shared_t and alone_t being the numbers of entries that t has changed with others and alone: of this tensor (`scope:
    tensor`, the default, the paper's RAM+-TL), or of the whole model (`scope: global`, its RAM+; the settings must be
    the same for all tensors then).

    Takes one or more models trained from the base, of one shape, and gives that shape, in the dtype of the arithmetic.

    Source: Yuan et al., Behavior Knowledge Merge in Reinforced Agentic Models (RAM), 2026, arXiv 2601.13572.
    """
    assert stat is not None
    boost = []
    for shared, alone in zip(stat[::2], stat[1::2], strict=True):
        boost.append(1 + r * min(alpha, shared / alone) if alone else 1.0)
    return _merge(xs, epsilon, boost)

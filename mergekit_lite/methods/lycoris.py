"""LoHa, LoKr and (IA)^3 adapters folded into their base's weight. No recipe names these methods: the plan uses them
where a model has such an adapter."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.delta import add
from mergekit_lite.methods.lora import summed
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import REQUIRED, Beside, Method, Param, Params

_PARTS = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)


def lycoris(xs: Sequence[Tensor], scale: float, parts: tuple[str, ...]) -> Tensor:
    """The base's weight with LoHa, W + scale (A_1 B_1) * (A_2 B_2), or LoKr, W + scale kron(C_1, C_2), folded in.

    `xs` are the whole weight and the adapter's tensors, which `parts` names as peft does. Each of the halves C of LoKr
    is whole or a product A B. With a core t (r x r x kernel) a product is sum_ij t_ij a_i b_j, A and B being r x out
    and r x in. The result takes the weight's shape as it lies in memory, as in peft: kernels may be flattened.

    Source: Hyeon-Woo et al., FedPara, ICLR 2022, arXiv 2108.06098; Yeh et al., LyCORIS, ICLR 2024, arXiv 2309.14859.
    """
    found = dict(zip(parts, xs[1:], strict=True))
    if "hada_w1_a" in found:
        change = _half(found, "hada_w1", "hada_t1") * _half(found, "hada_w2", "hada_t2")
    else:
        left, right = _half(found, "lokr_w1", ""), _half(found, "lokr_w2", "lokr_t2")
        if right.ndim == 4:
            left = left[:, :, None, None]
        change = torch.kron(left, right.contiguous())
    folded: Tensor = add.fn([change.reshape(xs[0].shape), xs[0]], [scale])
    return folded


def _half(found: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    if name in found:
        return found[name]
    a, b = found[f"{name}_a"], found[f"{name}_b"]
    if core not in found:
        return summed(a, b)
    rank, _, *kernel = found[core].shape
    rows = summed(a.T, found[core].reshape(rank, -1)).view(a.shape[1], len(b), *kernel)
    both = summed(rows.movedim(1, -1).reshape(-1, len(b)), b)
    return both.view(a.shape[1], *kernel, b.shape[1]).movedim(-1, 1)


def scaled(xs: Sequence[Tensor], axis: int) -> Tensor:
    """The base's weight, or bias, with (IA)^3 folded in: each row (`axis` 0) or column (1) times its number.

    `xs` are rows of the weight, and the numbers of these rows or of all columns. A column of a convolution is a kernel,
    whose numbers lie side by side.

    Source: Liu et al., Few-Shot Parameter-Efficient Fine-Tuning, NeurIPS 2022, arXiv 2205.05638.
    """
    rows, numbers = xs
    if axis == 0:
        return rows * numbers.reshape(-1, 1)
    along = numbers.reshape(1, -1)
    return rows * along.repeat_interleave(rows.shape[1] // along.shape[1], dim=1)


def scaled_groups(xs: Sequence[Tensor]) -> Tensor:
    """The weight of a convolution in groups with (IA)^3 of its inputs folded in.

    `xs` are the whole weight (out x in / groups, and a kernel) and a number for each of the inputs, group by group.
    """
    weight, numbers = xs
    of_groups = numbers.reshape(-1, 1, weight.shape[1], 1)
    return (weight.reshape(len(of_groups), -1, weight.shape[1], weight[0, 0].numel()) * of_groups).view(weight.shape)


@functools.cache
def grouped() -> Method:
    """`scaled_groups` as a method of the plan."""
    return method(inputs=(2, 2), reach="matrix", public=False, paper="(IA)^3, NeurIPS 2022, arXiv 2205.05638")(
        scaled_groups
    )


def _beside(params: Params) -> tuple[Beside, ...]:
    return ("rows",) if params["axis"] == 0 else ("whole",)


@functools.cache
def folding() -> Method:
    """`lycoris` as a method of the plan, which has no name that recipes could find."""
    return method(
        Param("scale", "number", 1.0, "factor of what is added"),
        Param("parts", "words", REQUIRED, "what the inputs behind the weight are", choices=_PARTS),
        inputs=(3, 7),
        reach="matrix",
        public=False,
        paper="LyCORIS, ICLR 2024, arXiv 2309.14859",
    )(lycoris)


@functools.cache
def scaling() -> Method:
    """`scaled` as a method of the plan, which has no name that recipes could find."""
    return method(
        Param("axis", "integer", 0, "what a number belongs to: a row (0) or a column (1)", 0, 1),
        inputs=(2, 2),
        reach="row",
        row_axis="first",
        beside=_beside,
        public=False,
        paper="(IA)^3, NeurIPS 2022, arXiv 2205.05638",
    )(scaled)

"""The straight line between two models whose answers are made equally sure first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_lite.lazy import Tensor
from mergekit_lite.methods.interpolate import pick_end, remark_outside
from mergekit_lite.methods.linear import weighted_sum
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import REQUIRED, Param, Params


def _pick(params: Params, inputs: int) -> int | None:
    end = pick_end(params, inputs)
    return end if end is None or params["head"] == "none" or params["temperature"][end] == 1 else None


@method(
    Param("t", "number", 0.5, "place on the way from the first input (0) to the second (1)"),
    Param(
        "head",
        "choice",
        REQUIRED,
        "by tensor: a linear layer that gives the logits, a logarithm of their scale, or neither",
        choices=("linear", "logit_scale", "none"),
    ),
    Param("confidence", "reference", None, "file of this model's confidence, with a temperature", per_input=True),
    Param("temperature", "number", 1.0, "what divides this model's logits", low=0, open_low=True, per_input=True),
    takes="weight",
    gives="weight",
    inputs=(2, 2),
    paper="BANG, ICLR 2024, arXiv 2309.17230",
    pick=_pick,
    remark=remark_outside,
)
def bang(xs: Sequence[Tensor], t: float, head: str, temperature: Sequence[float]) -> Tensor:
    """Linear interpolation of two models after temperatures have balanced how sure they are: BANG.

    out = (1 - t) a / T_a + t b / T_b for a tensor of the head, (1 - t) a + t b for others.

    A fine-tune that is surer of its answers than its base outweighs it in their mean. Dividing all logits of a model by
    its temperature T changes none of its answers, and makes it as sure as it is right: T is where the loss on held-out
    data is least. `head` says by name which tensors that goes into: `{"head.*": linear, else: none}` divides a last
    linear layer, weight and bias; `logit_scale` takes log T off the logarithm of a scale, as CLIP has it.

    `confidence` names the file of a model that `merge stats --collect confidence` has written for data with labels; its
    temperature is read when the plan is made. `temperature` gives the number itself. A head that is tied to embeddings
    cannot be divided. Takes two whole models. With `t: 0` and `t: 1` tensors outside of the head are copied bit for
    bit.

    The method of the paper is the plain mean of the base and a fine-tune that was trained with label smoothing or Mixup
    (`interpolate` with `t: 0.5`); temperatures do for other fine-tunes what these do in training.

    Source: Lin et al., Spurious feature diversification improves out-of-distribution generalization, ICLR 2024,
    arXiv 2309.17230.
    """
    shares = (1 - t, t)
    if head == "linear":
        return weighted_sum(xs, [share / number for share, number in zip(shares, temperature, strict=True)])
    mixed = weighted_sum(xs, shares)
    if head == "logit_scale":
        mixed.sub_(math.fsum(share * math.log(number) for share, number in zip(shares, temperature, strict=True)))
    return mixed

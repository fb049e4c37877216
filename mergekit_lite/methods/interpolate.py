"""The straight line between two models."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor
from mergekit_lite.methods.linear import weighted_sum
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import REQUIRED, Param, Params


def pick_end(params: Params, inputs: int) -> int | None:
    """The input that `t` = 0 or 1 stands for."""
    t: float = params["t"]
    return int(t) if t in (0, 1) else None


def remark_outside(params: Params, inputs: int) -> str | None:
    """A warning where `t` leaves the way between the two inputs."""
    t: float = params["t"]
    return None if 0 <= t <= 1 else f"`t: {t:g}` lies outside [0, 1]: this extrapolates beyond one of the inputs"


@method(
    Param("t", "number", REQUIRED, "place on the way from the first input (0) to the second (1)"),
    inputs=(2, 2),
    paper="WiSE-FT, CVPR 2022, arXiv 2109.01903",
    pick=pick_end,
    remark=remark_outside,
    plain=True,
)
def interpolate(xs: Sequence[Tensor], t: float) -> Tensor:
    """Linear interpolation between two inputs: WiSE-FT.

    out = (1 - t) a + t b.

    Takes two tensors of one shape and gives that shape, in the dtype of the arithmetic. t = 0 and t = 1 copy the first
    and the second input bit for bit; t outside [0, 1] extrapolates, with a warning.

    Source: Wortsman et al., Robust fine-tuning of zero-shot models (WiSE-FT), CVPR 2022, arXiv 2109.01903; with 0.5
    also SALSA (arXiv 2411.01798) and the average of BANG (arXiv 2309.17230).
    """
    return weighted_sum(xs, (1 - t, t))

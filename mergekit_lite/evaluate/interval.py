"""What small fully connected networks can give whose weights lie in a box: certified bounds (HyperInterval).

Bounds grow with every layer, by a factor of about the width of the box times that of the layer: they are of use for two
or three layers, or for boxes that are narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mergekit_lite.errors import UsageError
from mergekit_lite.lazy import Tensor, torch

Bounds = tuple[Tensor, Tensor]
# All of them grow with their argument, so an interval goes to the interval of its ends.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp_min(0.0),
    "tanh": lambda x: x.tanh(),
    "sigmoid": lambda x: x.sigmoid(),
    "identity": lambda x: x,
}
ROUNDING = 2.0**-52  # at least the error of a float64 operation, relative to its result


def linear_bounds(w: Bounds, b: Bounds | None, x: Bounds) -> Bounds:
    """The ends (n, out) of W x + b over all W (out, in), b (out) and inputs x (n, in) in the boxes given by their ends.

    For one x this is y_lo = W_lo x+ - W_hi x- + b_lo with x = x+ - x-, and y_hi = W_hi x+ - W_lo x- + b_hi. In float64;
    the ends are moved outwards by what its rounding may have cost. Memory: 4 n out in numbers.
    """
    (w_lo, w_hi), (x_lo, x_hi) = [[end.double() for end in ends] for ends in (w, x)]
    corners = [a * b[:, None, :] for a in (w_lo, w_hi) for b in (x_lo, x_hi)]
    least = torch.minimum(torch.minimum(corners[0], corners[1]), torch.minimum(corners[2], corners[3]))
    most = torch.maximum(torch.maximum(corners[0], corners[1]), torch.maximum(corners[2], corners[3]))
    b_lo, b_hi = (end.double() for end in b) if b is not None else (w_lo.new_zeros(()), w_lo.new_zeros(()))
    size = torch.maximum(least.abs(), most.abs()).sum(dim=-1) + torch.maximum(b_lo.abs(), b_hi.abs())
    # Of a sum of n products in any order each operation rounds at most once.
    slack = size * (ROUNDING * (w_lo.shape[1] + 2)) + torch.finfo(torch.float64).tiny
    return least.sum(dim=-1) + b_lo - slack, most.sum(dim=-1) + b_hi + slack


def network_bounds(
    lo: Mapping[str, Tensor],
    hi: Mapping[str, Tensor],
    layers: Sequence[str],
    x: Tensor,
    activation: str = "relu",
) -> Bounds:
    """The ends (n, out) of what the network gives for the inputs `x` (n, in) over all weights between `lo` and `hi`.

    `layers` name its linear layers in order: NAME.weight (out, in) and, where there is one, NAME.bias (out). Between
    them stands `activation`, one of `ACTIVATIONS`. The hull of models holds every convex combination of them, so what
    is certain for its box is certain for every soup. Certain in exact arithmetic: a network that is evaluated in
    float32 may leave the bounds by its own rounding. NaN anywhere gives NaN.

    Raises UsageError where a layer is lacking, where an end is above the other, and for an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise UsageError(f"there is no activation `{activation}`", hint=f"known are {', '.join(sorted(ACTIVATIONS))}")
    ends = (x.double(), x.double())
    for number, layer in enumerate(layers):
        weight, bias = f"{layer}.weight", f"{layer}.bias"
        if weight not in lo or weight not in hi:
            known = ", ".join(sorted(name.removesuffix(".weight") for name in lo if name.endswith(".weight")))
            raise UsageError(f"the box has no `{weight}`", hint=f"its layers are {known}")
        for name in (weight, bias):
            if name in lo and bool((lo[name] > hi[name]).any()):
                raise UsageError(f"the box is empty: the lower end of `{name}` is above the upper one")
        if number:
            # A tanh or a sigmoid is off by a few units in its last place.
            ends = tuple(ACTIVATIONS[activation](end) for end in ends)  # type: ignore[assignment]
            if activation in ("tanh", "sigmoid"):
                ends = (ends[0] - 4 * ROUNDING, ends[1] + 4 * ROUNDING)
        ends = linear_bounds((lo[weight], hi[weight]), (lo[bias], hi[bias]) if bias in lo else None, ends)
    return ends


def certified(bounds: Bounds, labels: Tensor) -> Tensor:
    """For every input (n) whether all networks of the box give its label the largest score: bool."""
    lo, hi = bounds
    others = hi.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return lo.gather(1, labels[:, None])[:, 0] > others

"""How sharp the loss is in each layer: the adaptive sharpness by which straggler layers are found."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mergekit_lite.calibrate.collect import evaluating
from mergekit_lite.calibrate.examples import Batch
from mergekit_lite.errors import InputError, UsageError, suggest
from mergekit_lite.lazy import Tensor, torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.nn import Module, Parameter

RHO, STEPS = 0.01, 20
_STRIDE = 2.5  # the steps together, in radii: from anywhere in the box every corner can be reached


def sharpness(
    network: Module,
    batches: Iterable[Batch],
    loss: Callable[[Module, Any], Tensor],
    groups: Mapping[str, Collection[str]],
    *,
    rho: float = RHO,
    steps: int = STEPS,
    progress: Callable[[int], object] = lambda batches: None,
) -> dict[str, float]:
    """Of each group g of parameters, such as a layer, the layer-wise adaptive sharpness

        S_g = E_batch [ max over delta, |delta| <= rho |theta_g| entry by entry, of L(theta + delta) - L(theta) ],

    the others staying where they are (Kwon et al., ICML 2021, arXiv 2102.11600, in the form of In search of the
    successful interpolation, arXiv 2410.16476). The maximum is the largest loss that `steps` of signed gradient ascent
    come by, delta <- clip(delta + eta |theta| sign(gradient), -rho |theta|, rho |theta|) from 0 with eta =
    2.5 rho / steps; so S_g is never below 0, and infinite where the loss ceases to be finite.

    `loss(network, batch)` gives a scalar that the parameters lead to by differentiable steps; `groups` are names as in
    `network.named_parameters()`. The network is in evaluation mode meanwhile; weights, modes and gradients are as they
    were afterwards. Takes len(groups) x (steps + 1) forward and len(groups) x steps backward passes for each batch.
    Raises UsageError for unknown parameters and for a rho or steps that are not above 0; InputError without data, where
    the loss is not finite to begin with, and where no parameter leads to it.
    """
    if not (rho > 0 and math.isfinite(rho)) or steps < 1:
        raise UsageError(f"rho {rho:g} and {steps} steps measure nothing", hint="both are above 0")
    known = dict(network.named_parameters(remove_duplicate=False))
    for name in (name for names in groups.values() for name in names):
        if name not in known:
            raise UsageError(f"the network has no parameter `{name}`", hint=suggest(name, known))
    parts = {group: _distinct([known[name] for name in names]) for group, names in groups.items()}
    found: dict[str, list[float]] = {group: [] for group in groups}
    with evaluating(network):
        for batch in batches:
            with torch.no_grad():
                start = _number(loss(network, batch))
            if not math.isfinite(start):
                raise InputError(f"the loss of a batch is {start}", hint="sharpness needs a model whose loss is finite")
            for group, parameters in parts.items():
                with _only(network, parameters):
                    highest = _ascend(lambda batch=batch: loss(network, batch), parameters, rho, steps)  # type: ignore[misc]
                found[group].append(highest - start)
                progress(1)
    if not all(found.values()):
        raise InputError("sharpness cannot be measured without data", hint="give at least one batch")
    return {group: math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf
            for group, values in found.items()}  # fmt: skip


def _ascend(loss: Callable[[], Tensor], parameters: Sequence[Parameter], rho: float, steps: int) -> float:
    """The largest loss on the way; the parameters are put back, whatever happens."""
    before = [p.detach().clone() for p in parameters]
    radius = [p.abs() * rho for p in before]
    stride = _STRIDE / steps
    delta = [torch.zeros_like(p) for p in before]
    highest = -math.inf
    try:
        for _ in range(steps):
            value = loss()
            highest = _higher(highest, _number(value))
            if not math.isfinite(highest):
                return highest
            slopes = _slopes(value, parameters)
            with torch.no_grad():
                for p, start, most, moved, slope in zip(parameters, before, radius, delta, slopes, strict=True):
                    if slope is not None:
                        moved.add_(most * slope.sign(), alpha=stride).clamp_(-most, most)
                        p.copy_(start + moved)
        with torch.no_grad():
            return _higher(highest, _number(loss()))
    finally:
        with torch.no_grad():
            for p, start in zip(parameters, before, strict=True):
                p.copy_(start)


def _slopes(value: Tensor, parameters: Sequence[Parameter]) -> Sequence[Tensor | None]:
    if not value.requires_grad:
        return [None] * len(parameters)  # the loss does not depend on them
    return torch.autograd.grad(value, list(parameters), allow_unused=True)


def _higher(highest: float, value: float) -> float:
    return math.inf if math.isnan(value) else max(highest, value)


def _number(value: Tensor) -> float:
    if value.numel() != 1:
        raise UsageError(f"a loss is one number, not {tuple(value.shape)}", hint="its mean, for example")
    return float(value.detach())


def _distinct(parameters: Sequence[Parameter]) -> list[Parameter]:
    """Each parameter once, under however many names it was given; those that hold no floating numbers stay."""
    return list({id(p): p for p in parameters if p.is_floating_point()}.values())


@contextmanager
def _only(network: Module, parameters: Sequence[Parameter]) -> Iterator[None]:
    """Meanwhile these parameters alone take gradients, so that a backward pass ends where they are."""
    before = [(p, p.requires_grad) for p in network.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p, required in before:
            p.requires_grad_(required)

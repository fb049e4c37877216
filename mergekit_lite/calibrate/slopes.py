"""Gradients of every parameter, taken as they are finished: beside the sums there is about one gradient in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from mergekit_lite.errors import UsageError
from mergekit_lite.lazy import Tensor, torch

if TYPE_CHECKING:
    from torch.nn import Module, Parameter


class Slopes:
    """A sum for every floating parameter, by the name it has first, in float32 or the parameter's float64. What a
    gradient adds to it, `_add_to` says. Raises UsageError where a weight is not in memory."""

    def __init__(self, network: Module):
        self._parameters = {name: p for name, p in network.named_parameters() if p.is_floating_point()}
        away = [name for name, p in self._parameters.items() if p.is_meta]
        if away:
            hint = "leave out `--device-map`, or give it more memory: gradients need all weights at hand"
            raise UsageError(f"{len(away)} tensors are not in memory, such as `{away[0]}`", hint=hint)
        self._sums: dict[str, Tensor] = {}

    @contextmanager
    def _taken(self) -> Iterator[None]:
        """Meanwhile every gradient of a backward pass goes into its sum and is given up."""
        with _gradients(self._parameters), ExitStack() as stack:
            for name, parameter in self._parameters.items():
                stack.callback(parameter.register_post_accumulate_grad_hook(self._finished(name)).remove)
            yield

    def _finished(self, name: str) -> Callable[[Tensor], None]:
        """Called when the gradient of this parameter is whole, that of a tied one with all its uses."""

        def hook(parameter: Tensor) -> None:
            slope = parameter.grad
            assert slope is not None
            parameter.grad = None
            slope = slope.to(self._dtype(parameter))
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(slope)
            self._add_to(self._sums[name], slope)

        return hook

    def _add_to(self, total: Tensor, slope: Tensor) -> None:
        raise NotImplementedError

    @staticmethod
    def _dtype(parameter: Tensor) -> torch.dtype:
        return torch.float64 if parameter.dtype == torch.float64 else torch.float32

    def _means(self, count: int) -> tuple[dict[str, Tensor], list[str]]:
        """The sums divided by `count`, by parameter, on the CPU, and the names of those that are 0; the sums are given
        up."""
        found = {}
        for name, parameter in self._parameters.items():
            total = self._sums.pop(name, None)
            zero = torch.zeros(parameter.shape, dtype=self._dtype(parameter))
            found[name] = zero if total is None else (total / count).cpu()
        return found, [name for name, value in found.items() if not value.any()]


@contextmanager
def _gradients(parameters: Mapping[str, Parameter]) -> Iterator[None]:
    """Every parameter takes a gradient meanwhile, which starts from none; afterwards all is as before."""
    before = {name: (p.requires_grad, p.grad) for name, p in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for name, (required, grad) in before.items():
            parameters[name].requires_grad_(required)
            parameters[name].grad = grad

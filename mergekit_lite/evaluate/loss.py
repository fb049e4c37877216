"""What weights are learned by: a loss of the merged tensors and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from mergekit_lite.errors import UsageError
from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.plan.words import few

# Of the merged tensors, or of these and a batch: the loss, or the loss and its gradients by tensor.
LossFunction = Callable[..., Any]
_HINT = "give a scalar of torch, or a number and its gradients by tensor"


class Objective(Protocol):
    """A loss over `units` of data. `tensors` are where the merge is put before it is asked for; `also` are further
    numbers that are learned, and hold their gradients after `slopes`."""

    units: int

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    @property
    def also(self) -> Sequence[Tensor]: ...

    def slopes(self, units: Sequence[int]) -> tuple[float, Mapping[str, Tensor]]:
        """The loss over these units, and its gradient by tensor; those that it does not depend on may be left out."""
        ...

    def loss(self, units: Sequence[int]) -> float:
        """The loss alone."""
        ...


class FunctionLoss:
    """The mean of a function over batches. It gets the merged state dict and, where there are `batches`, one of them,
    and gives a scalar of torch to be differentiated, or a number and its gradients by name."""

    def __init__(
        self,
        function: LossFunction,
        batches: Sequence[Any] | None,
        tensors: Mapping[str, Tensor],
        others: Mapping[str, Tensor],
        also: Sequence[Tensor],
    ):
        """`tensors` have memory of their own; `others` are given to the function as they are. Raises UsageError where
        there are no batches in a list of them, or a further number takes no gradient."""
        if batches is not None and not len(batches):
            raise UsageError("there are no data to learn from", hint="give at least one batch")
        if any(not (one.requires_grad and one.is_leaf) for one in also):
            hint = "`torch.ones((), requires_grad=True)`, for example"
            raise UsageError("what is learned beside the weights must take gradients", hint=hint)
        self._function, self._batches, self._others = function, batches, others
        self.tensors, self.also = tensors, tuple(also)
        self.units = 1 if batches is None else len(batches)

    def slopes(self, units: Sequence[int]) -> tuple[float, Mapping[str, Tensor]]:
        """Raises UsageError where the function gives something else, or gradients that do not fit."""
        sums: dict[str, Tensor] = {}
        whole = 0.0
        for one in self.also:
            one.grad = None
        for unit in units:
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.tensors.items()}
            with torch.enable_grad():
                value, given = self._value(leaves, unit)
                if given is None:
                    _check(value)
                    (value / len(units)).backward()
                    given = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
                else:
                    self._fits(given)
                    given = {name: slope.detach() / len(units) for name, slope in given.items()}
            for name, slope in given.items():
                sums[name] = sums[name].add_(slope) if name in sums else slope
            whole += _number(value) / len(units)
        return whole, sums

    def loss(self, units: Sequence[int]) -> float:
        with torch.no_grad():
            return sum(_number(self._value(dict(self.tensors), unit)[0]) for unit in units) / len(units)

    def _value(self, tensors: dict[str, Tensor], unit: int) -> tuple[Any, Mapping[str, Tensor] | None]:
        state = {**tensors, **self._others}
        found = self._function(state) if self._batches is None else self._function(state, self._batches[unit])
        if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping):
            return found[0], found[1]
        return found, None

    def _fits(self, slopes: Mapping[str, Tensor]) -> None:
        wrong = [n for n, slope in slopes.items() if n not in self.tensors or slope.shape != self.tensors[n].shape]
        if wrong:
            hint = "each has the name and the shape of a tensor of the merge"
            raise UsageError(f"the loss gives gradients that do not fit: {few(wrong)}", hint=hint)


def _number(value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value.detach())
    if isinstance(value, int | float):
        return float(value)
    said = f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
    raise UsageError(f"the loss gives {said}, of which there is no gradient", hint=_HINT)


def _check(value: Any) -> None:
    _number(value)
    if not isinstance(value, torch.Tensor):
        raise UsageError(f"the loss gives a {type(value).__name__}, of which there is no gradient", hint=_HINT)
    if not value.requires_grad:
        hint = "work out the scalar from the tensors that the function is given, without `.item()` or `detach`"
        raise UsageError("the loss does not depend on the merged tensors", hint=hint)

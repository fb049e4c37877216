"""The diagonal Fisher information, squared example by example."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal

from mergekit_lite.calibrate.examples import Batch, forward, labels, paired, predictions, singly, uniform
from mergekit_lite.errors import InputError, UsageError
from mergekit_lite.lazy import Tensor, torch

if TYPE_CHECKING:
    from torch.nn import Module, Parameter

Labels = Literal["auto", "expected", "sampled"]
FEW = 64  # classes up to which `auto` takes the expectation over all labels


class Fisher:
    """F = E_x E_{y ~ p(y|x)} (d log p(y|x) / d theta)^2 for every floating parameter, by the name it has first.

    An example is one index of axis 0, and its gradient is squared by itself: the square of a batch's gradient is
    another quantity. `expected` goes through all labels and weighs their squares with p(y|x); `sampled` draws one from
    p(y|x), for a sequence one at every position, where the gradient is that of their summed log-likelihood; since
    the gradients of different positions are uncorrelated under the model, its square has the mean of the sum of
    theirs. `auto` is `expected` where an example has one distribution over at most 64 classes. Draws depend on the
    seed and the number of the example alone.
    """

    def __init__(self, network: Module, how: Labels = "auto", seed: int = 0, shift: bool = False):
        self._network, self._how, self._seed, self._shift = network, how, seed, shift
        self._parameters = {name: p for name, p in network.named_parameters() if p.is_floating_point()}
        away = [name for name, p in self._parameters.items() if p.is_meta]
        if away:
            hint = "leave out `--device-map`, or give it more memory: gradients need all weights at hand"
            raise UsageError(f"{len(away)} tensors are not in memory, such as `{away[0]}`", hint=hint)
        self._sums: dict[str, Tensor] = {}
        self._share = 1.0
        self.examples = 0

    def add(self, batch: Batch) -> None:
        with _gradients(self._parameters), ExitStack() as stack:
            for name, parameter in self._parameters.items():
                stack.callback(parameter.register_post_accumulate_grad_hook(self._finished(name)).remove)
            for example in singly(batch):
                self._add(example)
                self.examples += 1

    def _add(self, example: Batch) -> None:
        logits = predictions(forward(self._network, example), self._network)
        known = labels(example)
        rows, _ = paired(logits, known, self._shift) if logits.dim() == 3 else (logits, None)
        if not len(rows):
            return
        scores = torch.log_softmax(rows.float() if rows.dtype != torch.float64 else rows, dim=-1)
        shares = scores.detach().exp()
        if self._expects(logits):
            classes = scores.shape[1]
            for label in range(classes):
                self._square(scores[0, label], float(shares[0, label]), keep=label + 1 < classes)
            return
        sums = shares.double().cpu().cumsum(dim=1)
        chance = uniform(self._seed, self.examples, len(sums))[:, None] * sums[:, -1:]
        drawn = torch.searchsorted(sums, chance, right=True).clamp(max=sums.shape[1] - 1).to(scores.device)
        self._square(scores.gather(1, drawn).sum(), 1.0, keep=False)

    def _expects(self, logits: Tensor) -> bool:
        if self._how == "expected" and logits.dim() == 3:
            hint = "take `sampled`, which draws a label at each position"
            raise UsageError("an expectation over all sequences of labels cannot be formed", hint=hint)
        return self._how == "expected" or (self._how == "auto" and logits.dim() == 2 and logits.shape[1] <= FEW)

    def _square(self, score: Tensor, share: float, keep: bool) -> None:
        """Add `share` times the square of the gradient of `score`."""
        self._share = share
        score.backward(retain_graph=keep)

    def _finished(self, name: str) -> Callable[[Tensor], None]:
        """Called when the gradient of this parameter is whole: it is squared and given up before the next one's."""

        def hook(parameter: Tensor) -> None:
            slope = parameter.grad
            assert slope is not None
            parameter.grad = None
            slope = slope.to(self._dtype(parameter))
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(slope)
            self._sums[name].addcmul_(slope, slope, value=self._share)

        return hook

    @staticmethod
    def _dtype(parameter: Tensor) -> torch.dtype:
        return torch.float64 if parameter.dtype == torch.float64 else torch.float32

    def result(self) -> tuple[dict[str, Tensor], list[str]]:
        """The information by parameter, in float32 or the parameter's float64 on the CPU, and the names of those that
        no example's likelihood depends on: theirs is 0."""
        found = {}
        for name, parameter in self._parameters.items():
            total = self._sums.pop(name, None)
            zero = torch.zeros(parameter.shape, dtype=self._dtype(parameter))
            found[name] = zero if total is None else (total / self.examples).cpu()
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


def check_labels(how: str) -> Labels:
    """`how` as one of the ways. Raises UsageError for another word."""
    for known in ("auto", "expected", "sampled"):
        if how == known:
            return known
    raise InputError(f"there are no labels `{how}`", hint="`auto`, `expected` or `sampled`")

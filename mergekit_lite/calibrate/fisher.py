"""The diagonal Fisher information, squared example by example."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mergekit_lite.calibrate.examples import Batch, forward, labels, paired, predictions, singly, uniform
from mergekit_lite.calibrate.slopes import Slopes
from mergekit_lite.errors import InputError, UsageError
from mergekit_lite.lazy import Tensor, torch

if TYPE_CHECKING:
    from torch.nn import Module

Labels = Literal["auto", "expected", "sampled"]
FEW = 64  # classes up to which `auto` takes the expectation over all labels


class Fisher(Slopes):
    """F = E_x E_{y ~ p(y|x)} (d log p(y|x) / d theta)^2 for every floating parameter, by the name it has first.

    An example is one index of axis 0, and its gradient is squared by itself: the square of a batch's gradient is
    another quantity. `expected` goes through all labels and weighs their squares with p(y|x); `sampled` draws one from
    p(y|x), for a sequence one at every position, where the gradient is that of their summed log-likelihood; since
    the gradients of different positions are uncorrelated under the model, its square has the mean of the sum of
    theirs. `auto` is `expected` where an example has one distribution over at most 64 classes. Draws depend on the
    seed and the number of the example alone.
    """

    def __init__(self, network: Module, how: Labels = "auto", seed: int = 0, shift: bool = False):
        super().__init__(network)
        self._network, self._how, self._seed, self._shift = network, how, seed, shift
        self._share = 1.0
        self.examples = 0

    def add(self, batch: Batch) -> None:
        with self._taken():
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

    def _add_to(self, total: Tensor, slope: Tensor) -> None:
        total.addcmul_(slope, slope, value=self._share)

    def result(self) -> tuple[dict[str, Tensor], list[str]]:
        """The information by parameter, in float32 or the parameter's float64 on the CPU, and the names of those that
        no example's likelihood depends on: theirs is 0."""
        return self._means(self.examples)


def check_labels(how: str) -> Labels:
    """`how` as one of the ways. Raises UsageError for another word."""
    for known in ("auto", "expected", "sampled"):
        if how == known:
            return known
    raise InputError(f"there are no labels `{how}`", hint="`auto`, `expected` or `sampled`")

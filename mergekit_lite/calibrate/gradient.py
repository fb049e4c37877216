"""The gradient of the task's loss: where several tasks pull one model, layer by layer (arXiv 2203.15207)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lite.calibrate.examples import LABELS, Batch, forward, labels, paired, predictions, singly
from mergekit_lite.calibrate.slopes import Slopes
from mergekit_lite.errors import InputError
from mergekit_lite.lazy import Tensor, torch

if TYPE_CHECKING:
    from torch.nn import Module

_HINT = "give `labels` in `--data`, or a text to a language model; -100 stands for none"


class Gradient(Slopes):
    """d L / d theta of every floating parameter, L the mean negative log-likelihood of the data's labels over all
    predictions that have one, however they are divided into batches."""

    def __init__(self, network: Module, shift: bool = False):
        super().__init__(network)
        self._network, self._shift = network, shift
        self.predictions = 0

    def add(self, batch: Batch) -> None:
        """Example by example, since a backward pass holds what all of its examples have left in every layer. Raises
        InputError where a batch has no labels, or labels that are no classes of the network."""
        if labels(batch) is None:
            raise InputError("the gradient of a loss needs labels", hint=_HINT)
        with self._taken():
            for example in singly(batch):
                self._add(example)

    def _add(self, example: Batch) -> None:
        logits = predictions(forward(self._network, example), self._network)
        logits, right = paired(logits, labels(example), self._shift)
        assert right is not None
        if not len(right):
            return
        right = right.long()
        classes = logits.shape[-1]
        wrong = right[(right < 0) | (right >= classes)]
        if len(wrong):
            raise InputError(f"`{LABELS}` hold {int(wrong[0])}, the network knows {classes} classes from 0", hint=_HINT)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        torch.nn.functional.cross_entropy(logits, right, reduction="sum").backward()
        self.predictions += len(right)

    def _add_to(self, total: Tensor, slope: Tensor) -> None:
        total.add_(slope)

    def result(self) -> tuple[dict[str, Tensor], list[str]]:
        """The gradient by parameter, in float32 or the parameter's float64 on the CPU, and the names of those that the
        loss does not depend on. Raises InputError where nothing had a label."""
        if not self.predictions:
            raise InputError("no prediction has a label, so there is no loss", hint=_HINT)
        return self._means(self.predictions)

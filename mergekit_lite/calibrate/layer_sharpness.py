"""The sharpness of each layer of a checkpoint, by a text or a file of model inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lite.calibrate.data import Data, from_file, from_text, read_tensors, read_text
from mergekit_lite.calibrate.examples import LABELS, Batch, forward, labels, paired, predictions
from mergekit_lite.calibrate.measure import limited_threads
from mergekit_lite.calibrate.model import Loaded, check_loadable, check_predicts, load, skeleton
from mergekit_lite.calibrate.names import stored_names
from mergekit_lite.calibrate.sharpness import RHO, STEPS, sharpness
from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.errors import InputError, UsageError
from mergekit_lite.lazy import Tensor, torch

if TYPE_CHECKING:
    from torch.nn import Module

_HINT = "give `labels` in `--data`, or a text to a language model; -100 stands for none"


@dataclass(frozen=True, slots=True)
class Examples:
    """A `text`, or a `data` file of model inputs by name; `limit` drawn examples at most."""

    text: Path | None = None
    data: Path | None = None
    limit: int | None = None

    def __bool__(self) -> bool:
        return self.text is not None or self.data is not None

    def check(self, checkpoint: Checkpoint, location: str) -> None:
        """Find before a score is run what cannot be measured: raises UsageError, and InputError for models that
        transformers cannot build or that predict nothing, and for files that cannot be read."""
        if self.text is not None and self.data is not None:
            raise UsageError("data come from `--text` or from `--data`", hint="give one of the two")
        check_loadable(checkpoint, location)
        check_predicts(skeleton(checkpoint, location))
        if self.text is not None:
            read_text(self.text)
        elif self.data is not None and LABELS not in read_tensors(self.data):
            raise InputError(f"`{self.data}` holds no `{LABELS}`, so there is no loss", hint=_HINT)

    def of(self, loaded: Loaded, folder: Path) -> Data:
        """The examples for a network whose tokenizer lies in `folder`."""
        if self.data is not None:
            return from_file(loaded, self.data, self.limit, 0)
        assert self.text is not None
        return from_text(loaded, str(folder), folder, self.text, None, False, self.limit, 0)


def mean_loss(shift: bool) -> Callable[[Module, Batch], Tensor]:
    """The mean negative log-likelihood of a batch's labels, in nats; 0 where none has one. With `shift` position t
    predicts the label of t + 1."""

    def loss(network: Module, batch: Batch) -> Tensor:
        if labels(batch) is None:
            raise InputError("the loss of a batch needs labels", hint=_HINT)
        logits, right = paired(predictions(forward(network, batch), network), labels(batch), shift)
        assert right is not None
        if not len(right):
            return logits.sum() * 0.0
        if int(right.min()) < 0 or int(right.max()) >= logits.shape[-1]:
            raise InputError(f"`{LABELS}` are no classes of the network, from 0 to {logits.shape[-1] - 1}", hint=_HINT)
        return torch.nn.functional.cross_entropy(logits.float(), right.long())

    return loss


def layer_sharpness(
    checkpoint: Checkpoint,
    layers: Mapping[str, Sequence[str]],
    examples: Examples,
    *,
    rho: float = RHO,
    steps: int = STEPS,
    threads: int = 1,
    progress: Callable[[int], object] = lambda count: None,
) -> dict[str, float]:
    """The sharpness, as `sharpness` defines it, of the layers of a checkpoint, given by the stored tensors of each, on
    the CPU in float32. Those are left out of which no tensor is a parameter of transformers' network. The loss is the
    mean negative log-likelihood of the labels, of a text that of its tokens.

    Raises InputError for models and files that cannot be used, UsageError for a rho that is not above 0.
    """
    assert checkpoint.folder is not None
    location = checkpoint.location
    with limited_threads(threads):
        loaded = load(checkpoint, location, torch.device("cpu"), None)
        network = loaded.network.float()  # steps of a hundredth are lost in bfloat16
        found = stored_names(network, {name: meta.shape for name, meta in checkpoint.tensors.items()})
        home = {name: layer for layer, names in layers.items() for name in names}
        groups: dict[str, list[str]] = {layer: [] for layer in layers}
        for (parameter, _), names in found.of.items():
            for layer in dict.fromkeys(home[name] for name in names if name in home):
                groups[layer].append(parameter)
        known = dict(network.named_parameters(remove_duplicate=False))
        parts = {layer: [n for n in dict.fromkeys(names) if n in known] for layer, names in groups.items()}
        parts = {layer: names for layer, names in parts.items() if names}
        data = examples.of(loaded, checkpoint.folder)
        return sharpness(
            network, data.batches, mean_loss(loaded.causal), parts, rho=rho, steps=steps, progress=progress
        )

"""What weights and permutations are learned by: the loss of a model of transformers on a text or a file of inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergekit_lite.calibrate.collect import evaluating
from mergekit_lite.calibrate.data import BATCH, Data
from mergekit_lite.calibrate.examples import Batch, forward, labels, paired, predictions, singly
from mergekit_lite.calibrate.measure import Settings, check_given, read_data
from mergekit_lite.calibrate.model import check_loadable, check_predicts, load, skeleton
from mergekit_lite.calibrate.names import places
from mergekit_lite.calibrate.slopes import Slopes
from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.errors import InputError
from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.plan.words import few

if TYPE_CHECKING:
    from torch.nn import Module

    from mergekit_lite.evaluate.ingredients import Ingredients
    from mergekit_lite.evaluate.weights import Open

_OWN = "in Python, `mergekit_lite.learn` takes a loss of your own"
_HINT = "give `labels` in `--data`, or a text to a language model; without labels take `loss: entropy`"


class NetworkLoss(Slopes):
    """The mean over predictions of the cross-entropy of their labels (`loss` is `labels`), or of their own entropy
    (`entropy`, whatever labels there are). The merged tensors are the network's own, by the names that `shapes` gives
    them in its checkpoint.

    `temperature` adds the factor beta of the logits that a learned soup learns beside its weights, and then forgets.
    Raises InputError where the network holds numbers that none of these tensors are.
    """

    def __init__(
        self,
        network: Module,
        data: Data,
        shapes: Mapping[str, tuple[int, ...]],
        loss: str,
        shift: bool,
        temperature: bool,
    ):
        super().__init__(network)
        self._network, self._batches, self._loss, self._shift = network, data.batches, loss, shift
        state = network.state_dict()
        self._places = {name: place for name, place in places(network, shapes).items() if name in shapes}
        self.tensors = {name: place.of(state[place.tensor]) for name, place in self._places.items()}
        self._check(shapes)
        # A parameter under several names has its gradient under the first.
        first = {id(parameter): name for name, parameter in self._parameters.items()}
        self._first = {
            name: first[id(parameter)]
            for name, parameter in network.named_parameters(remove_duplicate=False)
            if id(parameter) in first
        }
        device = next(iter(self._parameters.values())).device
        self.also: tuple[Tensor, ...] = (torch.ones((), device=device, requires_grad=True),) if temperature else ()
        self.units = len(self._batches)
        self.per_step = max(1, BATCH * len(self._batches) // max(1, data.examples))
        self._count = 0
        if loss == "labels" and not any(labels(batch) is not None for batch in self._batches):
            raise InputError("the cross-entropy of labels needs labels", hint=_HINT)

    def slopes(self, units: Sequence[int]) -> tuple[float, Mapping[str, Tensor]]:
        """Raises InputError where the data have no prediction with a label, or labels that are no classes."""
        for one in self.also:
            one.grad = None
        with self._taken():
            whole = self._over(units, backward=True)
        count = self._count
        found, _ = self._means(max(1, count))
        for one in self.also:
            if one.grad is not None and count:
                one.grad /= count
        slopes = {
            name: place.of(found[self._first[place.tensor]])
            for name, place in self._places.items()
            if place.tensor in self._first
        }
        return whole, slopes

    def loss(self, units: Sequence[int]) -> float:
        with torch.no_grad():
            return self._over(units, backward=False)

    def _over(self, units: Sequence[int], backward: bool) -> float:
        """The mean over all predictions of these batches, example by example, as a backward pass holds what every
        layer has left."""
        whole, self._count = 0.0, 0
        with evaluating(self._network):
            for unit in units:
                for example in singly(self._batches[unit]):
                    value, count = self._one(example)
                    if not count:
                        continue
                    if backward:
                        value.backward()
                    whole += float(value.detach())
                    self._count += count
        if not self._count and not backward:
            raise InputError("no prediction has a label, so there is no loss", hint=_HINT)
        return whole / max(1, self._count)

    def _one(self, example: Batch) -> tuple[Tensor, int]:
        known = labels(example) if self._loss == "labels" else None
        logits = predictions(forward(self._network, example), self._network)
        logits, right = paired(logits, known, self._shift)
        for beta in self.also:
            logits = logits * beta
        if self._loss == "entropy":
            log = logits.log_softmax(dim=-1)
            return -(log.exp() * log).sum(), len(logits)
        if right is None:
            raise InputError("a batch has no labels", hint=_HINT)
        right = right.long()
        wrong = right[(right < 0) | (right >= logits.shape[-1])]
        if len(wrong):
            message = f"`labels` hold {int(wrong[0])}, the network knows {logits.shape[-1]} classes from 0"
            raise InputError(message, hint=_HINT)
        return torch.nn.functional.cross_entropy(logits, right, reduction="sum"), len(right)

    def _add_to(self, total: Tensor, slope: Tensor) -> None:
        total.add_(slope)

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Every parameter is made of the merge's tensors, each in its shape."""
        covered: dict[int, int] = {}
        state = self._network.state_dict(keep_vars=True)
        for name, place in self._places.items():
            wanted, found = tuple(shapes[name]), tuple(self.tensors[name].shape)
            if found != wanted:
                message = f"`{name}` has the shape {wanted}, in the network {found}"
                raise InputError(message, hint=_OWN)
            key = id(state[place.tensor])
            covered[key] = covered.get(key, 0) + math.prod(shapes[name])
        left = [name for name, p in self._parameters.items() if covered.get(id(state[name]), 0) < p.numel()]
        if left:
            raise InputError(f"the network has parameters that are not tensors of the merge: {few(left)}", hint=_OWN)


def network_loss(ingredients: Ingredients, opened: Open, settings: Settings) -> NetworkLoss:
    """The loss that the weights of `opened` are learned by. Raises as `loss_of`."""
    kind = opened.learning.loss
    return loss_of(ingredients, kind, settings, temperature=kind == "labels" and opened.factor is None)


def loss_of(ingredients: Ingredients, kind: str, settings: Settings, *, temperature: bool = False) -> NetworkLoss:
    """The loss of the model that gives the merge its configuration, loaded in the dtype of the recipe's arithmetic.

    Raises UsageError and InputError for data and models that cannot be used, before the weights are read where that
    can be told.
    """
    from mergekit_lite.checkpoint.find import open_checkpoint
    from mergekit_lite.run.device import find_device

    check_given(settings)
    device = find_device(settings.device)
    model = ingredients.plan.recipe.models[ingredients.plan.outputs[0].donor]
    checkpoint = open_checkpoint(model.location, model.revision, mark=model.mark, offline=settings.offline)
    check_loadable(checkpoint, model.location)
    check_predicts(skeleton(checkpoint, model.location))
    loaded = load(checkpoint, model.location, device, None)
    loaded.network.to(ingredients.dtype)
    assert checkpoint.folder is not None
    data = read_data(loaded, model.location, checkpoint.folder, settings)
    shift = loaded.causal and kind == "labels"
    loss = NetworkLoss(loaded.network, data, ingredients.shapes, kind, shift, temperature)
    _check_names(loss, checkpoint)
    return loss


def _check_names(loss: NetworkLoss, checkpoint: Checkpoint) -> None:
    """The network holds the numbers of its checkpoint where the merge will be put, which proves that tensors go where
    they belong. Raises InputError."""
    from mergekit_lite.report.stream import blocks, opened

    with opened(checkpoint.shards, 1) as reader:
        for name, tensor in loss.tensors.items():
            meta = checkpoint.tensors.get(name)
            if meta is None:
                continue
            start, flat = 0, tensor.reshape(-1)
            for values in blocks(reader, meta):
                mine, theirs = flat[start : start + len(values)].cpu(), values.to(tensor.dtype)
                start += len(values)
                if not bool(((mine == theirs) | (mine.isnan() & theirs.isnan())).all()):
                    message = f"transformers holds `{name}` in a form that is not the checkpoint's"
                    raise InputError(message, hint=_OWN)

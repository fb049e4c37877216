"""Data through a network once, and all statistics that were asked for: for networks of any kind, in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergekit_lite.calibrate.confidence import Confidence
from mergekit_lite.calibrate.examples import Batch, forward, labels, paired, predictions, size, tokens
from mergekit_lite.calibrate.fisher import Fisher, check_labels
from mergekit_lite.calibrate.gradient import Gradient
from mergekit_lite.calibrate.layers import Key, Layers, find_layers
from mergekit_lite.calibrate.sums import Grams, Moments, Scores
from mergekit_lite.calibrate.watch import watched
from mergekit_lite.errors import InputError, UsageError, suggest
from mergekit_lite.lazy import Tensor, torch

if TYPE_CHECKING:
    from torch.nn import Module

KINDS = ("gram", "fisher", "gradient", "router", "activations", "hidden", "confidence")


@dataclass
class Statistics:
    """What was gathered: `tensors` by kind and name. `examples` and `tokens` went through; `rows` says for every Gram
    matrix of how many inputs it is. `unused` names, by kind, what no example reached, whose statistics are zeros;
    `skipped` says of names why there is nothing for them."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    examples: int = 0
    tokens: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def collect(
    network: Module,
    batches: Iterable[Batch],
    what: str | Collection[str] = "gram",
    *,
    labels: str = "auto",
    seed: int = 0,
    shift: bool = False,
    progress: Callable[[int], object] = lambda examples: None,
) -> Statistics:
    """Statistics of a network on batches (a tensor, a sequence of arguments, or a mapping of keywords; examples along
    axis 0). The network is in evaluation mode meanwhile and as it was afterwards.

    `what` names any of these, each with tensors by the names of the state dict:

    gram         X^T X / n of the inputs of every linear layer, (in, in), under the name of its weight
    fisher       the diagonal Fisher information of every parameter; `labels` is `expected` (over all classes),
                 `sampled` or `auto`
    gradient     the gradient of the loss, the mean negative log-likelihood of the labels, of every parameter
    router       `NAME.logits_gram` (E, E) float64, `NAME.usage` (E) and `NAME.tokens` int64 of every router of experts
    activations  `NAME.mean` and `NAME.variance` (channels) float64 of every linear or convolutional layer's outputs
    hidden       `hidden_states` (examples, layers, width): the mean over positions of each layer's input, and `mean`
                 over the examples; the network must give hidden states as transformers' models do
    confidence   `confidence`, the mean largest probability, and with labels `temperature`, `accuracy`, `loss`

    A mapping's `labels` are not given to the network. They are what `confidence` and `gradient` compare with, and
    -100 leaves a position out. `shift`: position t predicts the label of t + 1. Raises InputError without data, where
    the network gives no predictions or no hidden states, and where `gradient` lacks labels; UsageError for an unknown
    kind.
    """
    kinds = check_kinds(what)
    pass_ = Pass(network, find_layers(network), kinds, how=labels, seed=seed, shift=shift)
    pass_.run(batches, progress)
    return pass_.statistics()


def check_kinds(what: str | Collection[str]) -> tuple[str, ...]:
    """The kinds in their fixed order. Raises UsageError for unknown ones and for none."""
    words = [word.strip() for word in what.split(",")] if isinstance(what, str) else list(what)
    words = [word for word in words if word]
    for word in words:
        if word not in KINDS:
            raise UsageError(f"there are no statistics `{word}`", hint=suggest(word, KINDS))
    if not words:
        raise UsageError("no statistics are asked for", hint=f"known here: {', '.join(f'`{k}`' for k in KINDS)}")
    return tuple(kind for kind in KINDS if kind in words)


class Pass:
    """One pass of data: what is summed and what becomes of it. `wanted` limits the Gram matrices."""

    def __init__(
        self,
        network: Module,
        layers: Layers,
        kinds: Collection[str],
        *,
        how: str = "auto",
        seed: int = 0,
        shift: bool = False,
        wanted: Collection[Key] | None = None,
    ):
        if "router" in kinds and not layers.routers:
            hint = "routers are found as `gate` or `router` beside `experts`; leave out `router`"
            raise InputError(f"`{type(network).__name__}` has no routers of experts", hint=hint)
        self.network, self.layers, self.kinds = network, layers, kinds
        self._shift = shift
        self.grams = Grams(wanted) if "gram" in kinds else None
        self.scores = {r.module: Scores() for r in layers.routers} if "router" in kinds else None
        self.moments = {n: Moments(a) for n, a in layers.channels.items()} if "activations" in kinds else None
        self.fisher = Fisher(network, check_labels(how), seed, shift) if "fisher" in kinds else None
        self.gradient = Gradient(network, shift) if "gradient" in kinds else None
        self.confidence = Confidence() if "confidence" in kinds else None
        self.hidden: list[Tensor] = []
        self.examples = self.tokens = 0

    def run(self, batches: Iterable[Batch], progress: Callable[[int], object] = lambda examples: None) -> None:
        """Put all batches through. Raises as `collect`."""
        plain = any(kind not in ("fisher", "gradient") for kind in self.kinds)
        with evaluating(self.network):
            for batch in batches:
                number = size(batch)
                if plain:
                    self._forward(batch)
                if self.fisher is not None:
                    self.fisher.add(batch)
                if self.gradient is not None:
                    self.gradient.add(batch)
                self.examples += number
                self.tokens += tokens(batch)
                progress(number)
        if not self.examples:
            raise InputError("statistics cannot be gathered without data", hint="give at least one example")

    def _forward(self, batch: Batch) -> None:
        more = {"output_hidden_states": True} if "hidden" in self.kinds else {}
        with torch.no_grad(), watched(self.network, self.layers, self.grams, self.scores, self.moments):
            output = forward(self.network, batch, **more)
        if self.grams is not None:
            self.grams.rest()
        if more:
            self.hidden.append(_hidden(output, self.network))
        if self.confidence is not None:
            self.confidence.add(*paired(predictions(output, self.network), labels(batch), self._shift))

    def statistics(self) -> Statistics:
        """What was gathered, Gram matrices included; sums are given up as they are divided."""
        made = Statistics(examples=self.examples, tokens=self.tokens)
        if self.grams is not None:
            self._put_grams(made, self.grams)
        if self.fisher is not None:
            made.tensors["fisher"], made.unused["fisher"] = self.fisher.result()
        if self.gradient is not None:
            made.tensors["gradient"], made.unused["gradient"] = self.gradient.result()
        if self.scores is not None:
            put_scores(made, self.scores)
        if self.moments is not None:
            found = made.tensors["activations"] = {}
            for name, moments in self.moments.items():
                if moments.mean is None or moments.variance is None:
                    made.unused.setdefault("activations", []).append(name)
                else:
                    found |= {f"{name}.mean": moments.mean, f"{name}.variance": moments.variance}
        if self.hidden:
            states = torch.cat(self.hidden)
            made.tensors["hidden"] = {"hidden_states": states, "mean": states.double().mean(dim=0).float()}
        if self.confidence is not None:
            made.tensors["confidence"] = self.confidence.result()
        return made

    def _put_grams(self, made: Statistics, grams: Grams) -> None:
        found = made.tensors["gram"] = {}
        turned = {layer.weight for layer in self.layers.linear if layer.transposed}
        for (weight, expert), inner in self.layers.grams():
            if expert >= 0:
                made.skipped[weight] = "the weights of all experts in one tensor: RegMean merges one matrix at a time"
                continue
            if not grams.rows.get((weight, expert)):
                made.unused.setdefault("gram", []).append(weight)
            made.rows[weight] = grams.rows.get((weight, expert), 0)
            gram = grams.take((weight, expert), inner)
            found[weight] = gram[None] if weight in turned else gram
        made.skipped |= self.layers.skipped


def put_scores(made: Statistics, scores: dict[str, Scores]) -> None:
    """The tensors of routers, in float64 and int64; a router without a choice counts as unused."""
    found = made.tensors["router"] = {}
    for name, one in scores.items():
        if one.gram is None or one.usage is None:
            made.unused.setdefault("router", []).append(name)
            continue
        found |= {f"{name}.logits_gram": one.gram, f"{name}.usage": one.usage}
        found[f"{name}.tokens"] = torch.tensor(one.tokens)
        idle = (one.usage == 0).nonzero().flatten().tolist()
        made.unused.setdefault("router", []).extend(f"{name}: expert {number}" for number in idle)


def _hidden(output: Any, network: Module) -> Tensor:
    """(examples, layers, width): the mean over positions of the input of each layer, in float32."""
    states = getattr(output, "hidden_states", None)
    if not states or any(state.dim() != 3 for state in states):
        message = f"`{type(network).__name__}` gives no hidden states (examples, positions, width)"
        raise InputError(message, hint="`hidden` is for transformers' models of text")
    # The last one has left the last layer.
    return torch.stack([state.float().mean(dim=1).cpu() for state in states[:-1]], dim=1)


@contextmanager
def evaluating(network: Module) -> Iterator[None]:
    """Evaluation mode; afterwards every part is in the mode that it was in."""
    modes = [(part, part.training) for part in network.modules()]
    try:
        network.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training

"""Batches, what a network makes of them, and which of it is a prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_lite.errors import InputError
from mergekit_lite.lazy import Tensor, torch

if TYPE_CHECKING:
    from torch.nn import Module

Batch = Any  # a network's input: a tensor, a sequence of arguments or a mapping of keywords, examples along axis 0
LABELS = "labels"  # the key of a mapping that no network is given
IGNORED = -100  # a label that stands for none, as in torch's cross_entropy


def size(batch: Batch) -> int:
    """How many examples a batch holds. Raises InputError where its tensors disagree."""
    sizes = {len(tensor) for tensor in _tensors(batch) if tensor.dim()}
    if len(sizes) != 1:
        said = "no tensor" if not sizes else "tensors of " + " and ".join(map(str, sorted(sizes))) + " examples"
        raise InputError(f"a batch holds {said}", hint="examples lie along axis 0 of every tensor")
    return sizes.pop()


def tokens(batch: Batch) -> int:
    """How many tokens it holds: the entries of `input_ids`, 0 where there are none."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return 0 if ids is None else ids.numel()


def singly(batch: Batch) -> Iterator[Batch]:
    """Its examples, each as a batch of one."""
    for i in range(size(batch)):
        if isinstance(batch, Mapping):
            yield {key: value[i : i + 1] if _is_tensor(value) else value for key, value in batch.items()}
        elif isinstance(batch, Sequence):
            yield [value[i : i + 1] if _is_tensor(value) else value for value in batch]
        else:
            yield batch[i : i + 1]


def labels(batch: Batch) -> Tensor | None:
    found: Tensor | None = batch.get(LABELS) if isinstance(batch, Mapping) else None
    return found


def forward(network: Module, batch: Batch, **more: Any) -> Any:
    """What the network makes of a batch; it does not see the labels."""
    if isinstance(batch, Mapping):
        return network(**{key: value for key, value in batch.items() if key != LABELS}, **more)
    return network(*batch, **more) if isinstance(batch, Sequence) else network(batch, **more)


def predictions(output: Any, network: Module) -> Tensor:
    """The scores before the softmax, (examples, classes) or (examples, positions, classes). Raises InputError where the
    network gives none."""
    found: Any = output
    if not _is_tensor(output):
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    name = type(network).__name__
    if not _is_tensor(found):
        raise no_head(name)
    if found.dim() not in (2, 3) or found.shape[-1] < 2:
        shape = "×".join(map(str, found.shape))
        hint = "Fisher information and confidence are those of one class out of several"
        raise InputError(f"`{name}` gives logits {shape}, which is no distribution over classes", hint=hint)
    logits: Tensor = found
    return logits


def no_head(name: str) -> InputError:
    hint = "take a model with a head, such as ...ForCausalLM; `gram`, `router` and `activations` need none"
    return InputError(f"`{name}` gives no logits: it has no head", hint=hint)


def paired(logits: Tensor, known: Tensor | None, shift: bool) -> tuple[Tensor, Tensor | None]:
    """Logits (n, classes) and their labels (n). With `shift` a position's label is the next position's, as in causal
    language models. Positions whose label is -100 are left out; without labels all remain."""
    if known is None:
        return logits.reshape(-1, logits.shape[-1]), None
    if shift and logits.dim() == 3 and known.dim() == 2:
        logits, known = logits[:, :-1], known[:, 1:]
    if logits.shape[:-1] != known.shape:
        raise InputError(
            f"labels {tuple(known.shape)} do not fit logits {tuple(logits.shape)}",
            hint="give one label for each example, or one for each position",
        )
    known = known.reshape(-1).to(logits.device)
    kept = known != IGNORED
    return logits.reshape(-1, logits.shape[-1])[kept], known[kept]


def uniform(seed: int, number: int, count: int) -> Tensor:
    """Random numbers in [0, 1), float64, that depend on the seed and the number of the example alone."""
    import numpy as np

    # torch's generators on the CPU use 32 bits of their seed.
    return torch.from_numpy(np.random.default_rng([seed, number]).random(count))


def _tensors(batch: Batch) -> Iterator[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, Sequence) else [batch]
    return (value for value in values if _is_tensor(value))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)

"""What the tensors of a network are called in its checkpoint, and which part of which they are there.

transformers may hold the weights of all experts in one tensor where the checkpoint has one for each, and it renames
modules. Its own way back, which `save_pretrained` takes, is asked here with small tensors whose entries say where they
come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_lite.calibrate.layers import Key, Layers
from mergekit_lite.lazy import Tensor, torch

if TYPE_CHECKING:
    from torch.nn import Module

Shapes = Mapping[str, tuple[int, ...]]
_EXPERT, _TENSOR = 1 << 24, 1 << 40  # an entry is tensor × 2^40 + expert × 2^24 + row


@dataclass(frozen=True, slots=True)
class Origin:
    """A stored tensor is rows of one parameter, or of one expert of it; `whole`: all of them in order."""

    key: Key
    whole: bool


@dataclass(frozen=True, slots=True)
class Names:
    """`origins`: for each tensor of the checkpoint that is rows of one parameter, which. `tied`: the names that the
    network's state dict has for each parameter, by the first."""

    origins: Mapping[str, Origin]
    tied: Mapping[str, tuple[str, ...]]

    def stored(self, parameter: str, expert: int = -1, whole: bool = False) -> list[str]:
        """The stored tensors made of a parameter, or one expert of it; with `whole` just those that are all of it."""
        known = self._by_key().get((parameter, expert), [])
        return [name for name in known if self.origins[name].whole] if whole else known

    def module(self, name: str, parameter: str | None = None) -> str | None:
        """What a module is called in the checkpoint, by its weight; None where that is not stored as one tensor."""
        held = f"{name}.weight" if name else "weight"
        stored = self.stored(parameter or held, whole=True)
        named = [one for one in stored if one.endswith(".weight")]
        # A tied weight has several names; the module's own is the one that ends alike.
        named.sort(key=lambda one: -_alike(one, held))
        return named[0].removesuffix(".weight") if named else None

    def _by_key(self) -> dict[Key, list[str]]:
        found: dict[Key, list[str]] = {}
        for name, origin in self.origins.items():
            for alias in (origin.key[0], *self.tied.get(origin.key[0], ())):
                found.setdefault((alias, origin.key[1]), []).append(name)
        return found


def stored_names(network: Module, stored: Shapes) -> Names:
    """The names of a network of transformers whose checkpoint holds tensors of these shapes."""
    state = network.state_dict()
    first: dict[int, str] = {}
    tied: dict[str, tuple[str, ...]] = {}
    firsts = {name: first.setdefault(id(p), name) for name, p in network.named_parameters(remove_duplicate=False)}
    for name, own in firsts.items():
        tied[own] = (*tied.get(own, ()), *([name] if name != own else []))
    numbered = list(state)
    probes = {name: _probe(tuple(state[name].shape), number) for number, name in enumerate(numbered)}
    origins: dict[str, Origin] = {}
    for name, probe in renamed(network, probes, stored).items():
        origin = _origin(probe, numbered, {n: tuple(state[n].shape) for n in numbered})
        if origin is not None:
            key = (firsts.get(origin.key[0], origin.key[0]), origin.key[1])
            origins[name] = Origin(key, origin.whole)
    return Names(origins, tied)


def renamed(network: Any, tensors: Mapping[str, Tensor], stored: Shapes) -> dict[str, Tensor]:
    """Tensors by the network's names as tensors by the checkpoint's, in its parts; those that it lacks are left out."""
    try:
        from transformers.core_model_loading import revert_weight_conversion

        found = revert_weight_conversion(network, dict(tensors))
    except Exception:  # conversions that need whole tensors raise whatever they raise
        found = dict(tensors)
    prefix = f"{getattr(network, 'base_model_prefix', '')}."
    made: dict[str, Tensor] = {}
    for name, tensor in found.items():
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in stored:
                made.setdefault(candidate, tensor)
                break
    return made


def _probe(shape: tuple[int, ...], number: int) -> Tensor:
    """A tensor with one entry for each row, and each expert's, that says where it comes from."""
    if len(shape) == 3:
        experts, rows = torch.arange(shape[0])[:, None, None], torch.arange(shape[1])[None, :, None]
        return number * _TENSOR + experts * _EXPERT + rows
    rows = torch.arange(shape[0] if shape else 1)
    return (number * _TENSOR + rows).reshape(-1, *[1] * (len(shape) - 1))


def _origin(probe: Tensor, numbered: list[str], shapes: Shapes) -> Origin | None:
    flat = probe.flatten()
    if not flat.numel():
        return None
    tensors = set((flat // _TENSOR).tolist()) if flat.numel() < 1 << 20 else {int(flat[0]) // _TENSOR}
    if len(tensors) != 1:
        return None
    name = numbered[tensors.pop()]
    shape = shapes[name]
    experts = (flat % _TENSOR) // _EXPERT
    several = len(shape) == 3 and int(experts.min()) != int(experts.max())
    expert = int(experts[0]) if len(shape) == 3 and not several else -1
    rows = flat % _EXPERT
    wanted = shape[1] if len(shape) == 3 else (shape[0] if shape else 1)
    whole = not several and len(rows) == wanted and bool((rows == torch.arange(wanted)).all())
    return Origin((name, expert), whole or (several and len(flat) == shape[0] * wanted))


def _alike(a: str, b: str) -> int:
    """How many parts two dotted names share at their ends."""
    count = 0
    for one, two in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if one != two:
            break
        count += 1
    return count


def gram_names(layers: Layers, names: Names, stored: Shapes) -> Iterator[tuple[str, Key, int, bool]]:
    """The Gram matrices of a checkpoint: the weight's name there, whose inputs they are of, their length, and whether
    the weight is stored as (in, out)."""
    turned = {layer.weight for layer in layers.linear if layer.transposed}
    for key, inner in layers.grams():
        for name in names.stored(*key):
            shape, transposed = stored[name], key[0] in turned
            if len(shape) == 2 and shape[0 if transposed else 1] == inner:
                yield name, key, inner, transposed

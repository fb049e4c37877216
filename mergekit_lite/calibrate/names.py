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
class Names:
    """`of`: the tensors of the checkpoint that are rows of one parameter, or of one expert of it, by each name that the
    network has for the parameter. `whole` are those that are all of it, in order."""

    of: Mapping[Key, tuple[str, ...]]
    whole: frozenset[str]

    def stored(self, parameter: str, expert: int = -1) -> tuple[str, ...]:
        """The stored tensors made of a parameter, or of one expert of it."""
        return self.of.get((parameter, expert), ())

    def module(self, name: str, parameter: str | None = None) -> str | None:
        """What a module is called in the checkpoint, by its weight; None where that is not stored as one tensor."""
        held = parameter or (f"{name}.weight" if name else "weight")
        named = [one for one in self.stored(held) if one in self.whole and one.endswith(".weight")]
        # A tied weight has several names; the module's own is the one that ends alike.
        named.sort(key=lambda one: -_alike(one, held))
        return named[0].removesuffix(".weight") if named else None


def stored_names(network: Module, stored: Shapes) -> Names:
    """The names of a network of transformers whose checkpoint holds tensors of these shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    numbered = list(shapes)
    probes = {name: _probe(shapes[name], number) for number, name in enumerate(numbered)}
    sharing: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        sharing.setdefault(id(parameter), []).append(name)
    alike = {name: names for names in sharing.values() for name in names}
    of: dict[Key, list[str]] = {}
    whole: set[str] = set()
    for name, probe in renamed(network, probes, stored).items():
        origin = _origin(probe, numbered, shapes)
        if origin is not None:
            (held, expert), complete = origin
            whole |= {name} if complete else set()
            for alias in alike.get(held, [held]):
                of.setdefault((alias, expert), []).append(name)
    return Names({key: tuple(names) for key, names in of.items()}, frozenset(whole))


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


def _origin(probe: Tensor, numbered: list[str], shapes: Shapes) -> tuple[Key, bool] | None:
    """The one parameter, or expert of it, that a stored tensor is rows of, and whether it is all of it, in order; None
    where it is made of several."""
    flat = probe.flatten()
    if not len(flat) or int(flat.min()) // _TENSOR != int(flat.max()) // _TENSOR:
        return None
    name = numbered[int(flat[0]) // _TENSOR]
    shape = shapes[name]
    rows = flat % _EXPERT
    if len(shape) != 3:
        return (name, -1), len(rows) == (shape[0] if shape else 1) and bool((rows == torch.arange(len(rows))).all())
    experts = (flat % _TENSOR) // _EXPERT
    if int(experts.min()) != int(experts.max()):
        return (name, -1), len(flat) == shape[0] * shape[1]
    return (name, int(experts[0])), len(rows) == shape[1] and bool((rows == torch.arange(shape[1])).all())


def _alike(a: str, b: str) -> int:
    """How many parts two dotted names share at their ends."""
    count = 0
    for one, two in zip(reversed(a.split(".")), reversed(b.split(".")), strict=False):
        if one != two:
            break
        count += 1
    return count


@dataclass(frozen=True, slots=True)
class Gram:
    """The Gram matrix for the stored weight `name`: of the inputs of `key`, `inner` long. `transposed`: the weight is
    stored as (in, out)."""

    name: str
    key: Key
    inner: int
    transposed: bool


def gram_names(layers: Layers, names: Names, stored: Shapes) -> Iterator[Gram]:
    """The Gram matrices that a checkpoint can use: those of weights that it stores as matrices of their own."""
    turned = {layer.weight for layer in layers.linear if layer.transposed}
    for key, inner in layers.grams():
        for name in names.stored(*key):
            shape, transposed = stored[name], key[0] in turned
            if len(shape) == 2 and shape[0 if transposed else 1] == inner:
                yield Gram(name, key, inner, transposed)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored tensor lies in a network: rows [start, stop) of one of its tensors, of the expert `expert` of it
    where that is not -1. `whole` where it is all of it."""

    tensor: str
    expert: int
    start: int
    stop: int
    whole: bool

    def of(self, tensor: Tensor) -> Tensor:
        """The part of `tensor`, in its memory."""
        if self.whole:
            return tensor
        return (tensor if self.expert < 0 else tensor[self.expert])[self.start : self.stop]


def places(network: Module, stored: Shapes) -> dict[str, Place]:
    """Where stored tensors lie in a network of transformers, as far as each is neighbouring rows of one tensor."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    numbered = list(shapes)
    probes = {name: _probe(shapes[name], number) for number, name in enumerate(numbered)}
    found = {}
    for name, probe in renamed(network, probes, stored).items():
        origin = _origin(probe, numbered, shapes)
        if origin is None:
            continue
        (held, expert), complete = origin
        rows = probe.flatten() % _EXPERT
        if complete and (expert < 0 or shapes[held][0] == 1):
            found[name] = Place(held, expert, 0, len(rows), True)
        elif int(rows[-1]) - int(rows[0]) == len(rows) - 1 and bool((rows.diff() == 1).all()):
            found[name] = Place(held, expert, int(rows[0]), int(rows[-1]) + 1, False)
    return found

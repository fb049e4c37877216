"""Which parts of a network statistics are taken of: linear layers, experts, their routers, convolutions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_lite.lazy import Tensor, torch

if TYPE_CHECKING:
    from torch.nn import Module

ROUTERS = ("gate", "router")  # names of a router beside `experts`
Key = tuple[str, int]  # a parameter's name, and the expert's number in it or -1


@dataclass(frozen=True, slots=True)
class Linear:
    """A layer of one matrix: `weight` is the parameter's name, `inner` the length of its inputs. `transposed`: stored
    as (in, out), as GPT-2's Conv1D does it."""

    module: str
    weight: str
    inner: int
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Experts:
    """A module that holds the weights of all experts of a layer, (experts, out, in) each: `weights` are their names
    with the number of experts and the length of inputs."""

    module: str
    weights: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Router:
    """A module that scores experts. `index`: which of its outputs are the scores before the softmax, where it has
    several. `experts`: the module that is told the choice, if one is; `top_k`: how many are chosen, else."""

    module: str
    weight: str | None
    index: int
    experts: str | None
    top_k: int | None


@dataclass(frozen=True, slots=True)
class Layers:
    """What was found in a network. `skipped` says of weights of linear layers why they have no Gram matrix; `channels`
    are the layers with outputs by channel, with the axis of the channels."""

    linear: tuple[Linear, ...]
    experts: tuple[Experts, ...]
    routers: tuple[Router, ...]
    channels: Mapping[str, int]
    skipped: Mapping[str, str]

    def grams(self) -> Iterator[tuple[Key, int]]:
        """Every Gram matrix that can be gathered, with the length of its inputs; a tied weight once."""
        seen: dict[Key, int] = {(layer.weight, -1): layer.inner for layer in self.linear}
        for group in self.experts:
            for name, (count, inner) in group.weights.items():
                seen |= {(name, expert): inner for expert in range(count)}
        yield from seen.items()


def find_layers(network: Module) -> Layers:
    """The layers of a network, in the order of its modules."""
    nn = torch.nn
    modules = dict(network.named_modules())
    first = {id(value): name for name, value in network.named_parameters()}
    embeddings = {id(m.weight): n for n, m in modules.items() if isinstance(m, nn.Embedding)}
    routers = tuple(_routers(modules))
    linear: list[Linear] = []
    skipped: dict[str, str] = {}
    channels: dict[str, int] = {}
    experts: list[Experts] = []
    scoring = {router.module for router in routers}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            channels[name] = 1
            skipped[_join(name, "weight")] = "a convolution: RegMean merges linear layers"
        elif weight is None or weight.dim() != 2:
            held = {
                _join(name, own): (value.shape[0], value.shape[2])
                for own, value in module._parameters.items()
                if value is not None and value.dim() == 3
            }
            if held and name.rpartition(".")[2] == "experts":
                experts.append(Experts(name, held))
        elif isinstance(module, nn.Linear) or _is_conv1d(module) or name in scoring:
            transposed = _is_conv1d(module)
            channels[name] = -1
            if id(weight) in embeddings:
                tied = _join(embeddings[id(weight)], "weight")
                skipped[_join(name, "weight")] = f"tied to `{tied}`, whose rows are embeddings"
                continue
            stored = first.get(id(weight), _join(name, "weight"))
            linear.append(Linear(name, stored, weight.shape[0 if transposed else 1], transposed))
    for name in scoring:
        channels.pop(name, None)
    return Layers(tuple(linear), tuple(experts), routers, channels, skipped)


def _routers(modules: Mapping[str, Module]) -> Iterator[Router]:
    recorded = dict(_recorded(modules))
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        beside = modules.get(_join(parent, "experts")) if own in ROUTERS else None
        if beside is None and type(module) not in recorded:
            continue
        weight = module._parameters.get("weight")
        told = None if beside is None or isinstance(beside, torch.nn.ModuleList) else _join(parent, "experts")
        above = modules.get(parent)
        top_k = next((k for m in (module, above) for k in (_top_k(m),) if k is not None), None)
        stored = _join(name, "weight") if weight is not None else None
        yield Router(name, stored, recorded.get(type(module), 0), told, top_k)


def _recorded(modules: Mapping[str, Module]) -> Iterator[tuple[type, int]]:
    """The classes whose outputs transformers records as scores of experts, and which of their outputs these are."""
    for module in modules.values():
        found = getattr(type(module), "_can_record_outputs", None)
        recorder = found.get("router_logits") if isinstance(found, dict) else None
        for one in recorder if isinstance(recorder, list) else [recorder]:
            target, index = getattr(one, "target_class", None), getattr(one, "index", 0)
            # Where a layer's name picks out some modules of a class, its other modules are no routers.
            if isinstance(target, type) and getattr(one, "layer_name", None) is None:
                yield target, int(index)


def _top_k(module: Any) -> int | None:
    for name in ("top_k", "num_experts_per_tok"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None


def _is_conv1d(module: Module) -> bool:
    """transformers' linear layer with a weight (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def as_rows(x: Tensor) -> Tensor:
    """The vectors along the last axis, (n, length), in float32 or better."""
    x = x.detach().reshape(-1, x.shape[-1])
    return x if x.dtype in (torch.float32, torch.float64) else x.float()

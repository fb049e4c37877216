"""Which family a checkpoint belongs to, and what follows: layers, their depth, tied tensors, experts. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit_lite.family.data import FamilyData, Prefix, TieRule, families
from mergekit_lite.family.restack import restacked_config
from mergekit_lite.family.section import lookup, section_of
from mergekit_lite.family.stack import Layer, Stack, counts, numbers, stacks_in

__all__ = ["Family", "Layer", "Stack", "family_of", "restacked_config"]


@dataclass(frozen=True)
class Family:
    """A checkpoint's family, fitted to its names. `tied` holds (alias, canonical) pairs that are one tensor under this
    configuration, whether or not the checkpoint stores either; `experts` where experts stand inside a layer;
    `vocabulary` the tensors that have a row for every token, none where that is not known."""

    name: str
    stacks: tuple[Stack, ...]
    tied: tuple[tuple[str, str], ...]
    experts: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    _by_prefix: Mapping[str, Stack] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_prefix", {stack.prefix: stack for stack in self.stacks})

    def layer(self, name: str) -> Layer | None:
        """Where the tensor stands among the layers, or None where it stands outside them."""
        for before, number, after in numbers(name):
            if before in self._by_prefix:
                return Layer(self._by_prefix[before].name, number, before, after)
        return None

    def depth(self, name: str) -> float | None:
        """0 in the first layer of a stack, 1 in the last, evenly in between; None outside the layers.

        The only layer of a stack has depth 0. A number beyond the stack, as another model's tensor may have, gives 1.
        """
        layer = self.layer(name)
        if layer is None:
            return None
        last = self._by_prefix[layer.prefix].count - 1
        return min(layer.index, last) / last if last > 0 else 0.0

    def renumbered(self, name: str, index: int) -> str:
        """The name of the same tensor in layer `index`; ValueError where `name` stands outside the layers."""
        layer = self.layer(name)
        if layer is None:
            raise ValueError(f"{name!r} stands outside the layers")
        return f"{layer.prefix}{index}.{layer.rest}"

    def expert(self, name: str) -> int | None:
        """The number of the expert that the tensor belongs to, or None."""
        layer = self.layer(name)
        if layer is not None:
            for before, number, _ in numbers(layer.rest):
                if before + "{e}." in self.experts:
                    return number
        return None


def family_of(
    config: Mapping[str, Any], names: Iterable[str], parts: Mapping[str, Mapping[str, Any]] | None = None
) -> Family:
    """The family of the checkpoint with this config.json and these tensor names.

    `parts` gives the configurations of those parts whose names begin with a prefix of their own, by the prefix.
    The model type decides, or that of the nested `text_config`. Where it is unknown, or no layer stands where the
    family has its layers, the family is `unknown` and its stacks are read off the numbers in the names.
    """
    if parts:
        return _joined(config, list(names), parts)
    names = list(names)
    model_type, section = section_of(config, families())
    data = families().get(model_type or "")
    if data is None:
        return _unknown(config, names)
    leads = [prefix.fill(rule.template).removesuffix("{i}.") for prefix in data.prefixes for rule in data.stacks]
    found = counts(names, leads)
    for prefix in data.prefixes:
        stacks = []
        for rule in data.stacks:
            template = prefix.fill(rule.template)
            count = found.get(template.removesuffix("{i}."))
            if count is not None:
                keys = [section + key for key in rule.count]
                key = next((key for key in keys if lookup(config, key) is not None), keys[0])
                stacks.append(Stack(rule.name, template, count, key))
        if stacks:
            tied = _tied(data, prefix, config, section)
            rows = tuple(prefix.fill(name) for name in data.vocabulary)
            return Family(data.name, tuple(stacks), tied, data.experts, rows)
    return _unknown(config, names)


def _joined(config: Mapping[str, Any], names: list[str], parts: Mapping[str, Mapping[str, Any]]) -> Family:
    """The layers and tied tensors of all parts."""
    groups: dict[str, list[str]] = {prefix: [] for prefix in ("", *parts)}
    for name in names:
        groups[max((prefix for prefix in parts if name.startswith(prefix)), key=len, default="")].append(name)
    own = family_of(config, groups.pop(""))
    stacks, tied = list(own.stacks), list(own.tied)
    for prefix, inner in groups.items():
        found = family_of(parts[prefix], [name.removeprefix(prefix) for name in inner])
        stacks += [Stack(prefix + one.name, prefix + one.template, one.count, None) for one in found.stacks]
        tied += [(prefix + alias, prefix + canonical) for alias, canonical in found.tied]
    return Family(own.name, tuple(stacks), tuple(tied), own.experts, own.vocabulary)


def _unknown(config: Mapping[str, Any], names: list[str]) -> Family:
    experts = dict.fromkeys(template for data in families().values() for template in data.experts)
    tied: tuple[tuple[str, str], ...] = ()
    embeddings = [name for name in names if name.split(".")[-2:] == ["embed_tokens", "weight"]]
    if len(embeddings) == 1 and _flag(config, "", "tie_word_embeddings") is True:
        tied = (("lm_head.weight", embeddings[0]),)
    return Family("unknown", stacks_in(names, config), tied, tuple(experts))


def _tied(data: FamilyData, prefix: Prefix, config: Mapping[str, Any], section: str) -> tuple[tuple[str, str], ...]:
    model_type = lookup(config, section + "model_type")
    return tuple(
        (prefix.fill(rule.alias), prefix.fill(rule.canonical))
        for rule in data.tied
        if _holds(rule, config, section, str(model_type))
    )


def _holds(rule: TieRule, config: Mapping[str, Any], section: str, model_type: str) -> bool:
    if rule.when is None or rule.default is None:
        return True
    stated = _flag(config, section, rule.when)
    return rule.default.get(model_type, rule.default.get("else", False)) if stated is None else stated


def _flag(config: Mapping[str, Any], section: str, key: str) -> bool | None:
    # transformers asks the outer configuration first.
    for place in (key, section + key):
        value = lookup(config, place)
        if isinstance(value, bool):
            return value
    return None

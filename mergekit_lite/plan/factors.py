"""Deltas in a plan that are products of an adapter's factors, and merges of such by their factors alone. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mergekit_lite.methods.delta import delta as difference
from mergekit_lite.methods.factored import columns, packed_rank, parting, widening
from mergekit_lite.methods.linear import linear
from mergekit_lite.methods.lora import folding, multiplying
from mergekit_lite.methods.spec import Call, Method, Params, Slot
from mergekit_lite.plan.graph import Builder, slots
from mergekit_lite.plan.model import Node


class NoFactors(Exception):
    """A method that works on factors alone is given something else; the message ends where a tensor's name follows."""


@dataclass(frozen=True, slots=True)
class Factors:
    """A delta scale B A, or its transpose where `turned`, by the nodes of its factors."""

    a: Node
    b: Node
    scale: float
    turned: bool


def factors_of(node: Node, base: Node | None) -> list[Factors] | None:
    """The products whose sum the delta `node` is, or the delta of the weight `node` from `base`; none for a delta of
    zeros. None where it is no such sum."""
    if node is base:
        return []
    method, inputs, params = node.method, node.inputs, dict(node.params)
    if method is multiplying(False) or method is multiplying(True):
        return [Factors(inputs[0], inputs[1], params["scale"], method is multiplying(True))]
    if method is widening():
        return [Factors(inputs[0], inputs[1], 1.0, False)]
    if method is folding() and inputs[0] is base and not params["dora"]:
        return [Factors(inputs[1], inputs[2], params["scale"], params["transposed"])]
    if method is difference and base is None and inputs[0] is inputs[1]:
        return []
    if method is linear and base is None:
        total = math.fsum(params["weight"]) if params["normalize"] else 1.0
        found: list[Factors] = []
        for below, weight in zip(inputs, params["weight"], strict=True):
            terms = factors_of(below, None) if weight else []
            if terms is None:
                return None
            found += [replace(term, scale=term.scale * weight / total) for term in terms]
        return found
    return None


def merged_factors(
    builder: Builder,
    method: Method,
    params: Params,
    call: Call | Slot,
    given: Sequence[Node],
    spaces: Sequence[str],
    labels: Sequence[str],
    place: tuple[str, str],
    add: Method,
) -> Node | None:
    """What `method` makes of `given`, the base last where there is one, by the factors of its inputs alone; None where
    they are no products of factors, or the settings need whole deltas.

    `spaces` are those of the inputs, `labels` the names of all that is given, `call` the use of the method on whole
    tensors, `place` the step and the tensor.
    """
    shape = given[0].shape
    if method.factored is None or len(shape) < 2 or min(shape[0], math.prod(shape[1:])) < 2:
        return None
    base = given[-1] if len(given) > len(spaces) else None
    found = [factors_of(n, base if s == "weight" else None) for n, s in zip(given, spaces, strict=False)]
    terms = [(i, term) for i, terms in enumerate(found) for term in terms or ()]
    made = method.factored(params, shape)
    if method.needs_factors is not None and method.needs_factors(params) and (terms or None in found):
        ranks = {term.a.shape[0] for _, term in terms}
        if None in found or any(len(terms or ()) > 1 for terms in found):
            raise NoFactors(f"`{method.name}` with these settings needs inputs that are LoRA adapters; they are not in")
        if len(ranks) > 1:
            raise NoFactors(f"`{method.name}` with these settings needs adapters of one rank; they have others in")
    if made is None or not terms or None in found:
        return None
    merge, settings = made
    inner = call.inputs[0] if base is not None and isinstance(call, Call) else call
    label = "+".join(labels[i] for i in slots(inner))  # so that random numbers are those of whole deltas
    use = merge(*map(Slot, range(2 * len(terms))), **settings, **_tuples(terms), models=len(spaces))
    inputs = [node for _, term in terms for node in (term.a, term.b)]
    packed = builder.call(use, inputs, [label, *[""] * (len(inputs) - 1)], *place)
    rank = packed_rank(shape, columns([node.shape for node in inputs]))
    a = _part(builder, packed, 0, (rank, *shape[1:]), place)
    b = _part(builder, packed, a.numel, (shape[0], rank), place)
    delta = builder.call(widening()(Slot(0), Slot(1)), [a, b], ["", ""], *place)
    return delta if base is None else builder.call(add(Slot(0), Slot(1)), [delta, base], ["", ""], *place)


def _tuples(terms: Sequence[tuple[int, Factors]]) -> dict[str, tuple[object, ...]]:
    return {
        "scale": tuple(term.scale for _, term in terms),
        "turned": tuple(term.turned for _, term in terms),
        "model": tuple(i for i, _ in terms),
    }


def _part(builder: Builder, packed: Node, start: int, size: tuple[int, ...], place: tuple[str, str]) -> Node:
    return builder.call(parting(size)(Slot(0), start=start, size=size), [packed], [""], *place)


@dataclass(frozen=True, slots=True)
class Summed:
    """A delta as a sum of products: the nodes of the factors A_1, B_1, A_2, B_2, ..., and the settings that methods on
    them take."""

    nodes: list[Node]
    settings: Mapping[str, object]

    @property
    def columns(self) -> int:
        """How many columns all factors have together: the largest rank there can be."""
        return columns([node.shape for node in self.nodes])


def summed_factors(node: Node, base: Node | None = None) -> Summed | None:
    """The delta `node`, or that of the weight `node` from `base`, as a sum of products; None where it is none, or 0."""
    terms = [(0, term) for term in factors_of(node, base) or ()]
    return Summed([n for _, t in terms for n in (t.a, t.b)], {**_tuples(terms), "models": 1}) if terms else None


def unfolded(builder: Builder, node: Node, base: Node, place: tuple[str, str]) -> Node:
    """The delta of a weight that is `base` with one product folded in."""
    terms = factors_of(node, base)
    assert terms is not None
    (term,) = terms
    call = multiplying(term.turned)(Slot(0), Slot(1), scale=term.scale)
    return builder.call(call, [term.a, term.b], ["", ""], *place)

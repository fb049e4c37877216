"""Nodes made once: equal computations become one node, and a call that changes nothing becomes its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.family.family import Family
from mergekit_lite.methods.permute import permuted
from mergekit_lite.methods.random import derive_key
from mergekit_lite.methods.spec import Call, Reach, Slot
from mergekit_lite.plan.model import Alignment, Node


@dataclass(frozen=True, slots=True)
class Table:
    """A model or the result of a step, tensor by tensor, in the order of the checkpoint it descends from.

    `space` is `weight` or `delta`; `dtypes` are the stored dtypes (safetensors codes) that a save without `dtype`
    keeps. `donor` is the model that gives configuration and tokenizer, `config` its config.json with a change of depth
    applied. `quantized` tells that the numbers are codes that need scales, fit for copying only.
    """

    space: str
    nodes: Mapping[str, Node]
    dtypes: Mapping[str, str]
    donor: str
    config: Mapping[str, Any]
    family: Family
    quantized: bool = False


class PoolConflict(Exception):
    """Tensors that share a statistic over the whole model have different settings."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """What is the same for every tensor that a call is used on. `call` is kept so that its id stays its own."""

    call: Call
    picked: int | None
    reach: Reach
    below: tuple[int, ...]  # the slots that it reads, each once


@dataclass
class Builder:
    """Makes the nodes of one plan."""

    seed: int
    pools: dict[str, list[Node]] = field(default_factory=dict)
    alignments: dict[str, Alignment] = field(default_factory=dict)
    _known: dict[Any, Node] = field(default_factory=dict)
    _shapes: dict[int, _Shape] = field(default_factory=dict)

    def load(self, meta: TensorMeta) -> Node:
        """The node that reads a tensor of a checkpoint."""
        return self._node(("load", meta.file, meta.name), shape=meta.shape, step="", load=meta)

    def gather(self, inputs: Sequence[Node], step: str, alignment: str, place: tuple[tuple[str, Any], ...]) -> Node:
        """The node that takes one of `inputs` in the order that `alignment` will give; `place` tells which part of it
        is meant."""
        return self._node(
            ("gather", alignment, place, tuple(node.id for node in inputs)),
            shape=inputs[0].shape,
            step=step,
            method=permuted,
            inputs=tuple(inputs),
            params=place,
            pool=alignment,
            reach="row",
        )

    def call(
        self, call: Call | Slot, inputs: Sequence[Node], names: Sequence[str], step: str, tensor: str, path: str = ""
    ) -> Node:
        """The node of a tree of calls over `inputs`, whose entries are called `names` (they key the randomness).

        `path` is the place in the tree: it tells the shared statistics of one step apart.
        """
        if isinstance(call, Slot):
            return inputs[call.index]
        shape = self._shapes.get(id(call)) or self._shape(call)
        method = call.method
        if shape.picked is not None:
            return self.call(call.inputs[shape.picked], inputs, names, step, tensor, f"{path}.{shape.picked}")
        below = tuple(
            inputs[c.index] if isinstance(c, Slot) else self.call(c, inputs, names, step, tensor, f"{path}.{i}")
            for i, c in enumerate(call.inputs)
        )
        pool = f"{step}:{method.name}{path}" if shape.reach == "pooled" else None
        key = 0
        if method.positioned:
            key = derive_key(self.seed, step, method.name, "+".join(names[i] for i in shape.below), tensor)
        identity = (method.name, call.params, tuple(n.id for n in below), key, pool)
        known = self._known.get(identity)
        if known is not None:
            return known
        members = self.pools.setdefault(pool, []) if pool else []
        if members and members[0].params != call.params:
            raise PoolConflict(f"`{method.name}`")
        node = self._node(
            identity,
            shape=method.shape([n.shape for n in below]) if method.shape else below[0].shape,
            step=step,
            method=method,
            inputs=below,
            params=call.params,
            key=key,
            pool=pool,
            pool_index=len(members),
            reach=shape.reach,
        )
        if pool:
            members.append(node)
        return node

    def _shape(self, call: Call) -> _Shape:
        params = dict(call.params)
        picked = call.method.pick(params, len(call.inputs)) if call.method.pick else None
        found = _Shape(call, picked, call.method.reach_of(params), tuple(slots(call)))
        self._shapes[id(call)] = found
        return found

    def _node(self, identity: Any, **fields: Any) -> Node:
        known = self._known.get(identity)
        if known is None:
            known = self._known[identity] = Node(id=len(self._known), **fields)
        return known


def slots(call: Call | Slot) -> list[int]:
    """Which inputs a tree of calls reads, each once, in order."""
    if isinstance(call, Slot):
        return [call.index]
    return list(dict.fromkeys(i for below in call.inputs for i in slots(below)))

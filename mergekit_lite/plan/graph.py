"""Nodes made once: equal computations become one node, and a call that changes nothing becomes its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.meta import Form, TensorMeta
from mergekit_lite.checkpoint.quantized import Codes
from mergekit_lite.errors import Problem
from mergekit_lite.family.family import Family
from mergekit_lite.methods.merge_experts import mixed
from mergekit_lite.methods.permute import permuted
from mergekit_lite.methods.random import Keys
from mergekit_lite.methods.remap import remapped
from mergekit_lite.methods.spec import Call, Method, Reach, Slot
from mergekit_lite.methods.transplant import transplanted
from mergekit_lite.plan.model import Alignment, Node
from mergekit_lite.vocabulary.graft import Graft
from mergekit_lite.vocabulary.rows import Rows


@dataclass(frozen=True, slots=True)
class Adopted:
    """The vocabulary that a step has brought a table to: `lead` is the model whose tokenizer it is, `files` those that
    the output has of it, by name, `rows` where those of the embedding come from."""

    lead: str
    files: Mapping[str, Path | bytes]
    rows: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Table:
    """A model or the result of a step, tensor by tensor, in the order of the checkpoint it descends from.

    `space` is `weight` or `delta`; `dtypes` are the stored dtypes (safetensors codes) that a save without `dtype`
    keeps. `donor` is the model that gives configuration and tokenizer, `config` its config.json with a change of depth
    applied, `form` how the files are laid out. `quantized` tells of numbers that are codes, fit for copying only;
    `adopted` is the vocabulary where it is not that of the donor.
    """

    space: str
    nodes: Mapping[str, Node]
    dtypes: Mapping[str, str]
    donor: str
    config: Mapping[str, Any]
    family: Family
    quantized: Codes | None = None
    form: Form | None = None
    adopted: Adopted | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """What a `share` takes from its first input: the model or step that a tensor is of, by the tensor's name. `recast`
    are those that the second input stores in another dtype."""

    names: Mapping[str, str]
    recast: tuple[str, ...] = ()


class PoolConflict(Exception):
    """Tensors that share a statistic over the whole model have different settings."""


@dataclass(frozen=True, slots=True)
class _Operation:
    """One method of a tree of calls. Its inputs stand at `places` among the tree's inputs and the results before it."""

    kind: int  # the same for operations that are the same computation
    method: Method
    params: tuple[tuple[str, Any], ...]
    places: tuple[int, ...]
    reach: Reach
    keys: Keys | None
    pool: str | None
    members: list[Node]


@dataclass(frozen=True, slots=True)
class _Program:
    """A tree of calls worked out once for all tensors that it is used on: its operations, inputs before users, and the
    place of its result. `call` is kept so that its id stays its own."""

    call: Call
    operations: tuple[_Operation, ...]
    result: int


@dataclass
class Builder:
    """Makes the nodes of one plan. `called` says what names of models that are paths stand for in what others see, and
    in what depends on names."""

    seed: int
    called: Mapping[str, str] = field(default_factory=dict)
    pools: dict[str, list[Node]] = field(default_factory=dict)
    alignments: dict[str, Alignment] = field(default_factory=dict)
    # By step: the alignment whose order its tensors have, and whether that is undone.
    orders: dict[str, tuple[Alignment, bool]] = field(default_factory=dict)
    taken: dict[str, Taken] = field(default_factory=dict)  # by step that is a `share`
    remarks: list[Problem] = field(default_factory=list)  # what deserves a warning
    _known: dict[Any, Node] = field(default_factory=dict)
    _kinds: dict[Any, int] = field(default_factory=dict)
    _programs: dict[tuple[int, str, tuple[str, ...]], _Program] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many nodes there are; their ids go from 0 to below it."""
        return len(self._known)

    def load(self, meta: TensorMeta) -> Node:
        """The node that reads a tensor of a checkpoint."""
        identity: tuple[Any, ...] = (meta.file, meta.name)
        if meta.coded is not None:  # masks of several tasks are one stored tensor
            identity = (*identity, meta.coded.place)
        known = self._known.get(identity)
        if known is None:
            known = self._known[identity] = Node(len(self._known), meta.shape, "", meta)
        return known

    def again(self, node: Node, method: Method) -> Node:
        """The node that does by `method` what `node` does, with its inputs, settings and random key."""
        identity = ("again", id(method), node.id)
        known = self._known.get(identity)
        if known is None:
            shape = method.shape([n.shape for n in node.inputs]) if method.shape is not None else node.shape
            known = self._known[identity] = replace(node, id=len(self._known), shape=shape, method=method)
        return known

    def gather(
        self,
        inputs: Sequence[Node],
        step: str,
        alignment: str,
        place: tuple[tuple[str, Any], ...],
        shape: tuple[int, ...] | None = None,
    ) -> Node:
        """The node that takes one of `inputs` in the order that `alignment` will give; `place` tells which part of it
        is meant. `shape` is that of the result where it takes fewer elements."""
        identity = ("gather", alignment, place, tuple(node.id for node in inputs))
        known = self._known.get(identity)
        if known is None:
            known = self._known[identity] = Node(
                id=len(self._known),
                shape=inputs[0].shape if shape is None else shape,
                step=step,
                method=permuted,
                inputs=tuple(inputs),
                params=place,
                pool=alignment,
                reach="row",
            )
        return known

    def mix(
        self, inputs: Sequence[Node], shape: tuple[int, ...], step: str, place: tuple[tuple[str, Any], ...]
    ) -> Node:
        """The node of `shape` that takes means of `inputs`, or of parts of one, as the search for groups of experts of
        `step` will tell; `place` says which of them is meant."""
        identity = ("mix", step, place, tuple(node.id for node in inputs))
        known = self._known.get(identity)
        if known is None:
            known = self._known[identity] = Node(
                id=len(self._known),
                shape=shape,
                step=step,
                method=mixed,
                inputs=tuple(inputs),
                params=place,
                pool=step,
                reach="row",
            )
        return known

    def remap(self, inputs: Sequence[Node], rows: Rows, own: int | None) -> Node:
        """The node whose rows are those of `inputs` that `rows` tells; `own` is the number of the model's own."""
        identity = ("remap", rows, own, tuple(node.id for node in inputs))
        known = self._known.get(identity)
        if known is None:
            known = self._known[identity] = Node(
                id=len(self._known),
                shape=(len(rows), *inputs[0].shape[1:]),
                step="",
                method=remapped,
                inputs=tuple(inputs),
                params=(("rows", rows), ("own", own)),
                reach="row",
            )
        return known

    def transplant(self, mine: Node, theirs: Node, graft: Graft, terms: int, step: str) -> Node:
        """The node whose rows are those of `mine` that `graft` tells, and sums of them, found in `theirs`."""
        identity = ("transplant", graft, terms, mine.id, theirs.id)
        known = self._known.get(identity)
        if known is None:
            known = self._known[identity] = Node(
                id=len(self._known),
                shape=(len(graft), *mine.shape[1:]),
                step=step,
                method=transplanted,
                inputs=(mine, theirs),
                params=(("graft", graft), ("k", terms)),
                reach="row",
            )
        return known

    def call(self, call: Call | Slot, inputs: Sequence[Node], names: Sequence[str], step: str, tensor: str) -> Node:
        """The node of a tree of calls over `inputs`, whose entries are called `names` (they key the randomness; what
        has an empty name does not). Raises PoolConflict."""
        if isinstance(call, Slot):
            return inputs[call.index]
        identity = (id(call), step, tuple(names))
        program = self._programs.get(identity)
        if program is None:
            operations: list[_Operation] = []
            result = self._add(call, names, step, "", operations)
            program = self._programs[identity] = _Program(call, tuple(operations), result)
        values = list(inputs)
        ending = Keys.ending(tensor)
        for operation in program.operations:
            values.append(self._apply(operation, values, step, ending))
        return values[program.result]

    def _add(self, call: Call | Slot, names: Sequence[str], step: str, path: str, operations: list[_Operation]) -> int:
        """Append what computes `call` to `operations`, and give the place of its result. `path` is the place in the
        tree: it tells the shared statistics of one step apart."""
        if isinstance(call, Slot):
            return call.index
        method, params = call.method, dict(call.params)
        picked = method.pick(params, len(call.inputs)) if method.pick else None
        if picked is not None:
            return self._add(call.inputs[picked], names, step, f"{path}.{picked}", operations)
        below = [self._add(c, names, step, f"{path}.{i}", operations) for i, c in enumerate(call.inputs)]
        reach = method.reach_of(params)
        pool = f"{step}:{method.name}{path}" if reach == "pooled" else None
        labels = "+".join(names[i] for i in slots(call) if names[i])
        operations.append(
            _Operation(
                kind=self._kinds.setdefault((method.name, call.params, pool), len(self._kinds)),
                method=method,
                params=call.params,
                places=tuple(below),
                reach=reach,
                keys=Keys(self.seed, step, method.keyed or method.name, labels) if method.positioned else None,
                pool=pool,
                members=self.pools.setdefault(pool, []) if pool else [],
            )
        )
        return len(names) + len(operations) - 1

    def _apply(self, operation: _Operation, values: Sequence[Node], step: str, ending: bytes) -> Node:
        below = tuple([values[i] for i in operation.places])
        key = operation.keys.of(ending) if operation.keys is not None else 0
        identity = (operation.kind, below, key)
        known = self._known.get(identity)
        if known is not None:
            return known
        pool, members, params, method = operation.pool, operation.members, operation.params, operation.method
        if method.name == "add" and (whole := _given_back(below, params)) is not None:
            return whole
        if members and members[0].params is not params and members[0].params != params:
            raise PoolConflict(f"`{method.name}`")
        shape = method.shape([n.shape for n in below]) if method.shape is not None else below[0].shape
        number, index = len(self._known), len(members)
        node = Node(number, shape, step, None, method, below, params, key, pool, index, operation.reach)
        self._known[identity] = node
        if pool is not None:
            members.append(node)
        return node


def _given_back(inputs: Sequence[Node], params: tuple[tuple[str, Any], ...]) -> Node | None:
    """The model whose whole change is added to the base that it was taken from: it comes back bit for bit, where
    base + (x - base) would be rounded. None where that is not so."""
    if len(inputs) != 2 or dict(params)["weight"] != (1.0,):
        return None
    change, base = inputs
    taken = change.method is not None and change.method.name == "delta" and change.inputs[1] is base
    return change.inputs[0] if taken else None


def slots(call: Call | Slot) -> list[int]:
    """Which inputs a tree of calls reads, each once, in order."""
    if isinstance(call, Slot):
        return [call.index]
    return list(dict.fromkeys(i for below in call.inputs for i in slots(below)))

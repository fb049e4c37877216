"""The plan as data: what a run needs to know, worked out from the recipe and the checkpoints' headers. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.meta import Checkpoint, TensorMeta
from mergekit_lite.errors import Problem
from mergekit_lite.family.moe import ExpertLayer
from mergekit_lite.family.spaces import Space
from mergekit_lite.methods.spec import Method, Reach
from mergekit_lite.recipe.model import Recipe


# Not frozen: a plan makes hundreds of thousands, and one that is frozen takes five times as long to make.
@dataclass(slots=True, eq=False)
class Node:
    """One tensor of the computation: a tensor read from a checkpoint (`load`) or a method's result (`method`).

    Nodes are compared by identity; equal computations are one node, so that a result used twice is computed once per
    block. `key` seeds the randomness of the node; `pool` names the statistic that all tensors of a step share. `reach`
    says how the node may be computed; a load is element-wise. Nobody changes a node.
    """

    id: int
    shape: tuple[int, ...]
    step: str
    load: TensorMeta | None = None
    method: Method | None = None
    inputs: tuple[Node, ...] = ()
    params: tuple[tuple[str, Any], ...] = ()
    key: int = 0
    pool: str | None = None
    pool_index: int = 0
    reach: Reach = "element"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


LEADING = "leading"  # what an alignment is called whose units keep their order, as a slice by leading units has it


@dataclass(frozen=True, slots=True)
class Alignment:
    """An order of units, or groups of experts, that the run finds before it computes tensors, for the steps that share
    it.

    `use` is the method (`permute`, `reorder`, `merge_many`, `slice`), `known` where a file holds the order, `leading`
    where units keep the one they have; `spaces` are all those of the model, of which those of `kinds` are put in order.
    `models` are the tensors that are looked at, by name: first the one to resemble, where there is one. `activations`
    are matrices by space, in the order of `models`.
    `digest` is that of the file, `labels` are the names of the models that are put in order. Of `merge_experts`,
    `layers` are those whose experts are grouped, and `section` is where config.json speaks of them.
    """

    name: str
    use: str
    labels: tuple[str, ...]
    spaces: tuple[Space, ...]
    kinds: tuple[str, ...]
    models: tuple[Mapping[str, Node], ...]
    activations: tuple[Mapping[str, Node], ...] = ()
    params: tuple[tuple[str, Any], ...] = ()
    digest: str | None = None
    layers: tuple[ExpertLayer, ...] = ()
    section: str = ""

    @property
    def searched(self) -> bool:
        """Whether the order is searched for in the models' numbers."""
        return self.use not in ("known", LEADING)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All that is looked at, model by model."""
        if not self.searched:
            return ()
        tables = self.activations or self.models
        return tuple(node for table in tables for node in table.values())


@dataclass(frozen=True, slots=True)
class OutTensor:
    """One tensor of an output shard: `start` is the absolute offset of its first byte in the file. With `scales`, a
    tensor of the same shard, it is stored in FP8."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    node: Node
    shard: int
    start: int
    nbytes: int
    scales: OutTensor | None = None

    @property
    def parts(self) -> tuple[OutTensor, ...]:
        """The tensor, and its scales."""
        return (self,) if self.scales is None else (self, self.scales)

    @property
    def copied(self) -> bool:
        """True where the stored bytes of an input are the output's bytes."""
        load = self.node.load
        return load is not None and load.dtype == self.dtype and load.packed is None


@dataclass(frozen=True, slots=True)
class OutShard:
    """One output file: its name, its header (length prefix included) and its size in bytes. `apart` says that a `share`
    keeps its tensors apart from the others, since more outputs may have them; `same` is the shard, by the numbers of
    its output and of its own, of which this one is a further name on the disk."""

    file: str
    header: bytes
    nbytes: int
    tensors: tuple[OutTensor, ...]
    apart: bool = False
    same: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """One `save`: a folder of shards with the configuration files of `donor`, or an adapter, whose configuration
    `adapter` is. Of an adapter's tensors those of a module lie together and are one tensor here. `tokenizer`, where it
    is given, holds the files that take the place of the donor's tokenizer, by name. `indices` say, by their own names,
    which file holds which tensor where weights are divided. `store` are the tasks of a mask store; with `compress`
    their masks, the last shards, are coded once all is written, and others take their place."""

    to: str
    step: str
    shards: tuple[OutShard, ...]
    indices: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, Any]
    donor: str
    adapter: Mapping[str, Any] | None = None
    tokenizer: Mapping[str, Path | bytes] | None = None
    store: tuple[str, ...] = ()
    compress: str | None = None

    @property
    def kept(self) -> int:
        """How many of the shards, the first ones, the finished output has."""
        return len(self.shards) - (len(self.store) if self.compress is not None else 0)

    @property
    def tensors(self) -> tuple[OutTensor, ...]:
        return tuple(t for shard in self.shards for t in shard.tensors)

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def linked(self) -> int:
        """Bytes of the shards that are further names of another output's."""
        return sum(shard.nbytes for shard in self.shards if shard.same is not None)


@dataclass(frozen=True, slots=True)
class Unit:
    """What one thread does in one go: elements [start, stop) of output tensors of one name and shape. `targets` are
    `(output, tensor)` pairs, without those of files that are further names of others; `nodes` all that leads to them,
    inputs before users."""

    id: int
    name: str
    start: int
    stop: int
    targets: tuple[tuple[int, OutTensor], ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The vocabulary that all models are brought to before they are merged.

    `source` is `base`, `union` or the model that the tokenizer is of, `lead` the model whose ids stay, `tokens` and
    `rows` how many the output has. `models` tells of each model how many rows come from where: `own`, another model's
    name, `mean`, `zero`, `padding`. `tensors` have a row for every token.
    """

    source: str
    lead: str
    tokens: int
    rows: int
    models: Mapping[str, Mapping[str, int]]
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepView:
    """A step as `merge plan` shows it. `rows` tells of a transplant how many rows of the embedding are `shared`,
    `approximated` by at most `k` others, and `zero`."""

    name: str
    use: str
    inputs: tuple[str, ...]
    base: str | None
    space: str
    tensors: int
    params: Mapping[str, str]
    reads: tuple[str, ...] = ()
    rows: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Memory:
    """A budget for the anonymous memory of the whole process, in bytes: `peak` is what the plan will take of it at
    most, `room` what all units at work may take together, `number` an element in the compute dtype."""

    budget: int
    peak: int
    room: int
    number: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a run does. `digest` names the bytes that come out: same digest, same bytes.

    `bytes_read` counts every pass over the inputs, `bytes_input` each input tensor once, `bytes_written` the shards,
    those that several outputs share once, `peak_bytes` the anonymous memory that blocks of `block` elements in
    `threads` threads need at most; where `memory` sets a budget, the run keeps to these two. `tied` are pairs of stored
    tensors (alias, canonical) that must hold the same numbers, since the configuration says that they are one: only the
    canonical one is merged. `ranks` are those of the changes in adapters saved with `energy`, by the number of the
    save; without them such an output is laid out for the largest ranks there can be.
    """

    recipe: Recipe
    checkpoints: Mapping[str, Checkpoint]
    steps: tuple[StepView, ...]
    outputs: tuple[Output, ...]
    units: tuple[Unit, ...]
    pools: Mapping[str, tuple[Node, ...]]
    alignments: Mapping[str, Alignment]
    bytes_read: int
    bytes_input: int
    bytes_written: int
    peak_bytes: int
    digest: str
    threads: int
    block: int
    memory: Memory | None = None
    vocabulary: Vocabulary | None = None
    tied: tuple[tuple[TensorMeta, TensorMeta], ...] = ()
    warnings: tuple[Problem, ...] = field(default=())
    ranks: Mapping[int, Mapping[str, int]] = field(default_factory=dict)

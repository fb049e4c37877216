"""What each output tensor is, apart from where it lies: equal digests, equal numbers, in one plan or in two."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from mergekit_lite.plan.digest import ARITHMETIC
from mergekit_lite.plan.model import Alignment, Node, Output, Plan
from mergekit_lite.plan.order import GRAIN, walk

Place = tuple[int, int, int]


class Identities:
    """Digests of the parts of one plan, each formed once.

    A tensor is its expression down to the tensors of the inputs, which are known by the path, size and time of their
    files: what changes of these files in between, changes the digest.
    """

    def __init__(self, plan: Plan):
        self._plan = plan
        self._head = repr((ARITHMETIC, GRAIN, plan.recipe.compute))
        self._files = {
            file.path: repr((file.path, file.nbytes, file.header_sha256, file.mtime_ns, checkpoint.revision))
            for checkpoint in plan.checkpoints.values()
            for file in checkpoint.shards
        }
        self._nodes: dict[int, str] = {}
        self._pools: dict[str, str] = {}

    def tensors(self) -> dict[Place, str]:
        """By the number of the output, that of the shard and the first byte, for all tensors of the plan: masks of a
        store have the name of what they are masks of."""
        return {
            (number, tensor.shard, tensor.start): self._hash(
                "tensor", tensor.name, tensor.dtype, tensor.shape, self.node(tensor.node)
            )
            for number, output in enumerate(self._plan.outputs)
            for tensor in output.tensors
        }

    def node(self, root: Node) -> str:
        """Of what a node gives."""
        known = self._nodes
        if root.id not in known:
            for node in walk([root]):
                if node.id not in known:
                    known[node.id] = self._node(node)
        return known[root.id]

    def pool(self, name: str) -> str:
        """Of a statistic over all tensors of a step, or of an order of units."""
        found = self._pools.get(name)
        if found is None:
            alignment = self._plan.alignments.get(name)
            if alignment is not None:
                found = self._alignment(alignment)
            else:
                members = self._plan.pools[name]
                # A member is known by itself, without the statistic that it is a member of.
                found = self._hash("pool", *(self._own(node, pool=None) for node in members))
            self._pools[name] = found
        return found

    def _node(self, node: Node) -> str:
        return self._own(node, None if node.pool is None else self.pool(node.pool))

    def _own(self, node: Node, pool: str | None) -> str:
        if node.load is not None:
            load = node.load
            packed = repr(load.packed) if load.packed is not None else None
            scale = load.packed.scale if load.packed is not None else None
            beside = self._files.get(scale.file) if scale is not None else None
            return self._hash(
                "load", self._files.get(load.file, load.file), load.name, load.dtype, node.shape, packed, beside
            )
        method = node.method.name if node.method is not None else None
        below = [self.node(one) for one in node.inputs]
        return self._hash(
            "node", self._head, method, node.params, node.key, node.shape, pool, node.pool_index, node.reach, below
        )

    def _alignment(self, alignment: Alignment) -> str:
        spaces = [space for space in alignment.spaces if space.kind in alignment.kinds]
        what: tuple[Any, ...] = (alignment.use, alignment.params, alignment.digest, spaces, alignment.layers)
        return self._hash("alignment", what, [self.node(node) for node in alignment.nodes])

    @staticmethod
    def _hash(*parts: Any) -> str:
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def result_digest(plan: Plan, tensors: Mapping[Place, str]) -> str:
    """What is merged, whatever the recipe's text says beside it: the tensors, the configurations and the tokenizers."""
    configs = [
        repr((output.config, output.adapter, output.store, plan.checkpoints[output.donor].location, _tokenizer(output)))
        for output in plan.outputs
    ]
    whole = repr((sorted((key, value) for key, value in tensors.items()), configs))
    return hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()


def _tokenizer(output: Output) -> list[tuple[str, str]]:
    """The tokenizer files that take the place of the donor's, by name: their digests, or where they lie."""
    return [
        (name, hashlib.blake2b(file).hexdigest() if isinstance(file, bytes) else str(file))
        for name, file in sorted((output.tokenizer or {}).items())
    ]

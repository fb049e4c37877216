"""Where the units of a network lie in its tensors: what may be permuted together. Data only, no torch.

A *space* is a set of interchangeable units: the hidden units of one feed-forward part, the heads of one attention
part, the coordinates of the residual stream, the experts of one layer. Its *uses* are the axes of tensors along which
these units lie. Permuting one space along all its uses leaves the function of the network unchanged (Git Re-Basin, ICLR
2023, arXiv 2209.04836).

Permutations are written as in NumPy's `take`: p[i] is the old unit that stands in slot i afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Use:
    """One axis of one tensor along which the units of a space lie: unit i takes the `block` elements from
    `start + i * block`. The rest of the axis, before and after, is none of this space's (fused projections).

    `grouped`: there is one block for each group of units instead (keys and values under grouped-query attention).
    `weighed`: False where the axis moves along but says nothing about which units belong together (running statistics).
    """

    tensor: str
    axis: int
    block: int = 1
    start: int = 0
    grouped: bool = False
    weighed: bool = True


@dataclass(frozen=True, slots=True)
class Space:
    """Units that may change places.

    `kind` is what recipes call it: `mlp`, `heads`, `qk` (query and key coordinates within a head, where no rotary
    embedding ties them to a frequency), `vo` (value and output coordinates within a head), `residual`, `experts`, ... .
    `size` units form groups of `group` neighbours: a unit may move within its group, and groups may move as a whole.
    `renames` are the tensors that belong to one unit as a whole, one tuple of `size` names for each of them (experts):
    unit i moving to slot j gives the tensor the name in place j.
    `parent` and `slot`: a space within one group of another (for groups of one: within one unit) lies in what stands in
    this slot *after* the parent was permuted. Parents come before their children in a list of spaces.
    """

    name: str
    kind: str
    size: int
    uses: tuple[Use, ...] = ()
    group: int = 1
    renames: tuple[tuple[str, ...], ...] = ()
    parent: str | None = None
    slot: int = 0

    @property
    def groups(self) -> int:
        return self.size // self.group

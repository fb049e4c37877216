"""The spaces of a checkpoint: its family's layout, filled in with its config.json and checked against its shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from mergekit_lite.errors import InputError
from mergekit_lite.family.data import FamilyData
from mergekit_lite.family.expression import Axis, Product, Sum, Word, words
from mergekit_lite.family.fit import Fitted, Hit, Shapes, fit, natural
from mergekit_lite.family.layout import FIXED, SpaceRule
from mergekit_lite.family.lengths import Lengths, Meant, Placed
from mergekit_lite.family.spaces import Space, Use
from mergekit_lite.family.template import Bound, filled, placeholders


def spaces_of(config: Mapping[str, Any], shapes: Shapes, data: FamilyData | None = None) -> tuple[Space, ...]:
    """All spaces of the checkpoint with this config.json and these stored tensors, parents before their children.

    `data` is the family where a person names one; else the model type in config.json decides. A tensor that is tied to
    another one counts where it is stored. Spaces of a single unit are left out, for nothing in them can move.

    InputError where the family is unknown or states no spaces, where no rule names a tensor, and where config.json
    and the shapes disagree.
    """
    fitted = fit(config, shapes, data)
    return tuple(_Gathering(fitted, config, shapes).ordered())


@dataclass(frozen=True, slots=True)
class Ruled:
    """A space, the rule of the family that it follows, and the numbers in names that the rule's sizes may ask for."""

    space: Space
    rule: SpaceRule
    numbers: Bound


def ruled_spaces(fitted: Fitted, config: Mapping[str, Any], shapes: Shapes) -> tuple[Ruled, ...]:
    """The spaces of a fitted layout as `spaces_of` gives them, with their rules. Raises what that raises."""
    gathering = _Gathering(fitted, config, shapes)
    return tuple(Ruled(space, *gathering.rule(space.name)) for space in gathering.ordered())


@dataclass
class _Growing:
    """A space whose uses are being gathered."""

    rule: SpaceRule
    size: int
    group: int
    parent: str | None
    slot: int
    numbers: Bound
    uses: list[Use] = field(default_factory=list)
    members: dict[str, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))

    def done(self, name: str) -> Space:
        for units in self.members.values():
            if len(units) != self.size:
                one = next(iter(units.values()))
                raise InputError(f"`{name}` has {self.size} members, of which {len(units)} have a tensor like `{one}`")
        renames = tuple(tuple(units[i] for i in range(self.size)) for units in self.members.values())
        return Space(name, self.rule.kind, self.size, tuple(self.uses), self.group, renames, self.parent, self.slot)


class _Gathering:
    """Goes along the axes of all tensors and gathers the uses of every space."""

    def __init__(self, fitted: Fitted, config: Mapping[str, Any], shapes: Shapes):
        self._layout = fitted.layout
        self._growing: dict[str, _Growing] = {}
        self._inside: dict[tuple[str, str, int], str] = {}
        axes = list(_placed(fitted, shapes))
        self._lengths = Lengths(fitted, config, axes)
        for placed in axes:
            self._walk((placed.node,), 0, {}, placed)
        for tensor, hit in fitted.hits.items():
            self._member(tensor, hit)

    def ordered(self) -> Iterator[Space]:
        """The spaces in the order of their names, each followed by its children."""
        children: dict[str | None, list[str]] = defaultdict(list)
        for name in sorted(self._growing, key=lambda name: (any(c.isdigit() for c in name), natural(name))):
            parent = self._growing[name].parent
            children[parent if parent in self._growing else None].append(name)
        yield from self._family_tree(None, children)

    def rule(self, name: str) -> tuple[SpaceRule, Bound]:
        """The rule that a space follows, and the numbers in names that it was found with."""
        return self._growing[name].rule, self._growing[name].numbers

    def _family_tree(self, parent: str | None, children: Mapping[str | None, list[str]]) -> Iterator[Space]:
        for name in children.get(parent, ()):
            growing, above = self._growing[name], self._growing.get(parent or "")
            if above is None or above.size == 1:
                # Nothing in the parent moves, and so the child stands alone.
                growing.parent, growing.slot = None, 0
            # A space lies in a group of its parent. What lies in one unit of a larger group cannot be said.
            sayable = above is None or above.group == 1 or not above.members
            if growing.size > 1 and sayable:
                yield growing.done(name)
            yield from self._family_tree(name, children)

    def _walk(self, factors: tuple[Axis, ...], start: int, slots: Bound, at: Placed) -> None:
        """Note the uses of a product whose first entry stands at `start`, inside the groups in `slots`."""
        first, rest = factors[0], factors[1:]
        if isinstance(first, Product):
            self._walk((*first.factors, *rest), start, slots, at)
            return
        block = prod(self._length(factor, at) for factor in rest)
        if isinstance(first, Sum):
            for term in first.terms:
                self._walk((term, *rest), start, slots, at)
                start += self._length(term, at) * block
            return
        meant = self._lengths.meant(first, {**at.bound, **slots}) if isinstance(first, Word) else None
        if meant is not None and self._lengths.size(meant) > 0:
            self._grown(meant).uses.append(Use(at.tensor, at.axis, block, start, meant.grouped, at.weighed))
        if not any(self._lengths.meant(word, {**at.bound, **slots}) for factor in rest for word in words(factor)):
            return
        for unit in range(self._length(first, at)):
            inner = dict(slots)
            if meant is not None and meant.rule.member is not None:
                group = self._lengths.size(meant) // self._lengths.groups(meant)
                inner[meant.rule.member] = unit if meant.grouped else unit // group
            self._walk(rest, start + unit * block, inner, at)

    def _length(self, node: Axis, at: Placed) -> int:
        length = self._lengths.length(node, at.bound)
        if length is not None:
            return length
        # `fixed` in a product or a sum: what the other parts leave of the axis.
        assert isinstance(at.node, Product | Sum)
        parts = at.node.factors if isinstance(at.node, Product) else at.node.terms
        known = [length for part in parts if (length := self._lengths.length(part, at.bound)) is not None]
        return at.length // prod(known) if isinstance(at.node, Product) else at.length - sum(known)

    def _grown(self, meant: Meant) -> _Growing:
        name = meant.name
        if name not in self._growing:
            size, groups = self._lengths.size(meant), self._lengths.groups(meant)
            if groups < 1 or size % groups:
                raise InputError(f"`{name}`: config.json divides {size} units into {groups} groups")
            parent, slot = self._parent(meant)
            if parent is not None:
                twin = self._inside.setdefault((parent, meant.rule.kind, slot), name)
                if twin != name:
                    raise InputError(f"`{twin}` and `{name}` are of one kind and lie in one slot of `{parent}`")
            self._growing[name] = _Growing(meant.rule, size, size // groups, parent, slot, meant.numbers)
        return self._growing[name]

    def _parent(self, meant: Meant) -> tuple[str | None, int]:
        if meant.rule.of is None:
            return None, 0
        parent = self._layout.spaces[meant.rule.of]
        assert parent.member is not None
        return filled(parent.name, meant.numbers), meant.numbers[parent.member]

    def _member(self, tensor: str, hit: Hit) -> None:
        """A tensor with the number of an expert in its name belongs to that expert as a whole."""
        for rule in self._layout.spaces.values():
            if (
                rule.member is None
                or rule.member not in hit.bound
                or not set(placeholders(rule.name)) <= set(hit.bound)
            ):
                continue
            grown = self._growing.get(filled(rule.name, hit.bound))
            if grown is not None:
                alike = filled(hit.template, {**hit.bound, rule.member: -1})
                grown.members[alike][hit.bound[rule.member]] = tensor


def _placed(fitted: Fitted, shapes: Shapes) -> Iterator[Placed]:
    for tensor, hit in fitted.hits.items():
        axes, shape = hit.rule.axes, shapes[tensor]
        if axes is None:
            continue
        if len(shape) < len(axes) or (len(shape) > len(axes) and not hit.rule.rest):
            raise InputError(
                f"`{tensor}` has {len(shape)} axes, where the family `{fitted.family}` knows {len(axes)} of them"
            )
        for axis, node in enumerate(axes):
            if node != Word(FIXED):
                yield Placed(tensor, axis, shape[axis], node, hit.bound, hit.rule.weighed)

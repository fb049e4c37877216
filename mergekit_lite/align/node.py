"""One operation of a traced graph, and the tensors that go into it, seen by their axes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_lite.align.axis import Tree, fix, fresh, resolve, unify

Axes = tuple[Tree, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor in the graph. `data`: it depends on the model's inputs. `stored`: the name of the tensor it is."""

    axes: Axes
    data: bool = False
    stored: str | None = None

    @property
    def shape(self) -> Shape:
        return tuple(axis.size for axis in self.axes)


@dataclass(slots=True)
class Notes:
    """What the rules learn beside the ties. `axes`: those of channels, those that an addition ties, those that a stored
    tensor is contracted over. `statistics`: stored tensors that are running statistics."""

    axes: dict[str, list[Tree]] = field(default_factory=lambda: {"channels": [], "added": [], "contracted": []})
    statistics: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Call:
    """One operation: its arguments by the names of its schema (tensors as Values), and the shapes of its outputs."""

    name: str
    given: Mapping[str, Any]
    shapes: tuple[Shape, ...]
    notes: Notes

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    @property
    def values(self) -> list[Value]:
        """All tensors among the arguments."""
        return list(values_in(list(self.given.values())))

    @property
    def first(self) -> Value:
        return self.values[0]


Rule = Callable[[Call], Sequence[Axes]]


def values_in(arguments: Any) -> Iterator[Value]:
    """All tensors in an argument, which may be a list of lists."""
    if isinstance(arguments, Value):
        yield arguments
    elif isinstance(arguments, list | tuple):
        for argument in arguments:
            yield from values_in(argument)


def fix_all(axes: Axes) -> None:
    for axis in axes:
        fix(axis)


def fixed(shape: Shape) -> Axes:
    return tuple(fresh(size, fixed=True) for size in shape)


def broadcast(operands: Sequence[Axes], shape: Shape) -> Axes:
    """The axes of the result, with those of the operands tied to them; an axis of length 1 is repeated."""
    made: list[Tree] = []
    for place, size in enumerate(reversed(shape)):
        column = [axes[-1 - place] for axes in operands if place < len(axes)]
        tied = [axis for axis in column if axis.size == size != 1]
        for other in tied[1:]:
            unify(tied[0], other)
        made.append(resolve(tied[0]) if tied else fresh(size))
    return tuple(made[::-1])


def dims_of(call: Call, name: str = "dim") -> list[int]:
    """The dimensions that an argument names, counted from 0; all of them where it names none."""
    rank, dim = len(call.first.axes), call.given.get(name)
    dims = range(rank) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return [d % rank for d in dims] if rank else []

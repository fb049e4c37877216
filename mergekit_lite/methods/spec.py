"""How a method describes itself: its parameters with ranges, its reach, the spaces it takes and gives. No torch."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal[
    "number", "integer", "flag", "choice", "words", "reference", "path", "layers", "integers", "spans", "globs", "texts"
]
Space = Literal["weight", "delta", "same"]
# element: each output element needs the same element of the inputs; measured: that, after a statistic of the whole
# tensor; pooled: that, after a statistic of all tensors of the step; row: whole rows; matrix: the whole tensor;
# structure: works on names, not on numbers (`stack`), and is carried out by the plan; alignment: whole models decide on
# an order of units (`permute`), which the run finds first; vocabulary: tensors with a row for every token get other
# rows (`transplant`), which the plan lays out.
Reach = Literal["element", "measured", "pooled", "row", "matrix", "structure", "alignment", "vocabulary"]
# How a further input with a shape of its own is read beside rows of the first: the same rows, the columns of these
# numbers, or all of it.
Beside = Literal["rows", "columns", "whole"]


Params = Mapping[str, Any]
Report = Callable[[int, int], None]  # steps done, and all steps, of an iteration


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Any = _Required()


@dataclass(frozen=True, slots=True)
class Param:
    """One setting of a method.

    `per_input` settings stand beside an input in `of`, or under `with` for all inputs at once. `low` and `high` bound
    numbers; an `open_` bound itself is not allowed. A `reference` names a model or step that is a further input.
    `words` are one or several of `choices`, given as a tuple, `integers` one or several whole numbers; `spans` are
    whole numbers, ranges of them with both ends (`0-3`) and `choices`, `globs` patterns over tensor names, `texts` one
    or several texts of any content; a `path` is a file, for `from` also a step. Globs of a setting that is
    `by_space` are over the names of spaces, not of tensors.
    """

    name: str
    kind: Kind
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    choices: tuple[str, ...] = ()
    per_input: bool = False
    by_space: bool = False

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def range_text(self) -> str:
        """The allowed values in words: `(0, 1]`, `tensor | row | global`, `true | false`."""
        if self.kind in ("choice", "words"):
            return " | ".join(self.choices)
        if self.kind == "path":
            return "a file"
        if self.kind == "flag":
            return "true | false"
        if self.kind == "layers":
            return "[start, stop)"
        if self.kind == "reference":
            return "model or step"
        if self.kind == "integers":
            return f"whole numbers from {self.low:g}"
        if self.kind == "spans":
            return " | ".join(["numbers", "ranges such as 0-3", *self.choices])
        if self.kind == "globs":
            return "names, * for any text"
        if self.kind == "texts":
            return "texts"
        if self.low is None and self.high is None:
            return "any integer" if self.kind == "integer" else "any number"
        left = "(-inf" if self.low is None else f"{'(' if self.open_low else '['}{self.low:g}"
        right = "inf)" if self.high is None else f"{self.high:g}{')' if self.open_high else ']'}"
        return f"{left}, {right}"

    def fault(self, value: Any) -> str | None:
        """What is wrong with a single value of this setting, or None."""
        if self.kind == "choice":
            return None if value in self.choices else f"`{self.name}` is one of {self.range_text()}, not {value!r}"
        if self.kind == "words":
            wrong = [word for word in (value if isinstance(value, tuple) else (value,)) if word not in self.choices]
            return f"`{self.name}` is among {self.range_text()}, not {wrong[0]!r}" if wrong else None
        if self.kind == "path":
            return None if isinstance(value, str) and value else f"`{self.name}` names a file, not {value!r}"
        if self.kind == "flag":
            return None if isinstance(value, bool) else f"`{self.name}` is true or false, not {value!r}"
        if self.kind == "reference":
            return None if isinstance(value, str) else f"`{self.name}` names a model or a step, not {value!r}"
        if self.kind == "integers":
            whole = value if isinstance(value, tuple) and value else (value,)
            wrong = [v for v in whole if isinstance(v, bool) or not isinstance(v, int) or v < (self.low or 0)]
            return f"`{self.name}` are {self.range_text()}, not {wrong[0]!r}" if wrong else None
        if self.kind in ("spans", "globs") and value == ():
            return f"`{self.name}` is an empty list"
        if self.kind == "spans":
            wrong = [item for item in _listed(value) if item not in self.choices and span_of(item) is None]
            return f"`{self.name}` are {self.range_text()}, not {wrong[0]!r}" if wrong else None
        if self.kind == "globs":
            wrong = [item for item in _listed(value) if not (isinstance(item, str) and item)]
            return f"`{self.name}` are names of tensors, not {wrong[0]!r}" if wrong else None
        if self.kind == "texts":
            texts = value if isinstance(value, tuple) and value else (value,)
            odd = [text for text in texts if not isinstance(text, str) or not text]
            return f"`{self.name}` are {self.range_text()}, not {odd[0]!r}" if odd else None
        if self.kind == "layers":
            return None if _is_range(value) else f"`{self.name}` is [start, stop) with 0 <= start < stop, not {value!r}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"`{self.name}` is a number, not {value!r}"
        if self.kind == "integer" and not isinstance(value, int):
            return f"`{self.name}` is a whole number, not {value!r}"
        # Written so that NaN fails every bound, and is refused even where there is none.
        above = self.low is None or (value > self.low if self.open_low else value >= self.low)
        below = self.high is None or (value < self.high if self.open_high else value <= self.high)
        if above and below and value == value and abs(value) != float("inf"):
            return None
        return f"`{self.name}` must lie in {self.range_text()}, not {value!r}"


def _listed(value: Any) -> tuple[Any, ...]:
    """One or several of something, as several."""
    return value if isinstance(value, tuple) else (value,)


def span_of(item: Any) -> tuple[int, int] | None:
    """The first and the last number that an entry of `spans` means, as `7` or `0-3`; None where it is neither."""
    match = re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", item) if isinstance(item, str) else None
    if match is not None:
        first, last = int(match[1]), int(match[2])
        return (first, last) if first <= last else None
    return (item, item) if isinstance(item, int) and not isinstance(item, bool) and item >= 0 else None


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        and 0 <= value[0] < value[1]
    )


def keywords(params: Params) -> dict[str, Any]:
    """Settings as keyword arguments of a method's `fn`: a Python keyword gets an underscore, `lambda_`."""
    return {name + "_" if keyword.iskeyword(name) else name: value for name, value in params.items()}


@dataclass(frozen=True, slots=True)
class Call:
    """One use of a method inside a composite: what the plan turns into nodes. Inputs are calls or slots."""

    method: Method
    inputs: tuple[Call | Slot, ...]
    params: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """Input number `index` of a composite, not yet bound to a tensor."""

    index: int


@dataclass(frozen=True, slots=True)
class Block:
    """Where a block lies: flat index of its first element in the tensor, and the tensor's random key (64 bits)."""

    start: int
    key: int


@dataclass(frozen=True)
class Method:
    """A merge method as the registry knows it.

    `fn` is the math. For a part it is called as `fn(xs, **params)`, with `stat=` where `measure` gave a statistic,
    `block=` where `positioned`, and `report=` where it `reports`; it returns one new tensor and leaves `xs` as they
    are. `xs` are 1-D blocks for element, measured and pooled reach, (rows, row length) blocks for row reach, whole
    tensors for matrix reach. Per-input parameters come as tuples, one entry per input. `report` is a `Report` to call
    after every step of a long iteration: it shows how far this is, and raises where the run is to stop. For a
    composite, `fn` takes one slot or call per entry of `xs` and the same parameters, and returns a `Call` tree made of
    other methods.

    `takes` and `gives` are spaces; a method that takes and gives deltas accepts weights where the step names a `base`:
    the plan then subtracts the base from every input and adds the result to it. Any other method with a base (`delta`,
    `add`) gets the base as the last of `xs`; per-input parameters have no entry for it.

    A `reference` parameter names a model or step whose tensors are read as further inputs: `fn` gets them after the
    inputs and before the base, all of the first such parameter, then all of the next, and never the names. Their shapes
    may differ from the inputs'. `without(*slots, **params)` is the call for tensors that no reference has;
    `fits(shapes)` gives what is wrong with the shapes of the inputs and references, in the order of `xs`, or None.

    `shape(shapes)` gives the shape of the result where it is not that of the first input; only methods of matrix reach
    can have and read such results. `reach` is one of `Reach`, or a function of the parameters that gives one.
    `measure(params, inputs, numels)` gives a fresh `Measure` (see methods/measure.py) for tensors of these sizes; it
    usually takes `rounds` passes. `pick(params, inputs)` gives the index of the input that the call returns unchanged,
    bit for bit, or None. For both, `inputs` counts `xs`, the base included.
    A method that `gathers` takes whole rows of one of its inputs in an order that its statistic gives; the engine reads
    them in that order and `fn` is only the plain form.
    A method with row reach gets `rows` of them together, from a multiple of that number on; the last may be fewer.
    A method that also `combines` makes rows of several rows of its first input, as it finds them in the second; rows of
    that one the engine holds for all threads.
    `beside(params)` is for a method with row reach whose inputs after the first have shapes of their own: how each of
    them is read for a block of rows. They come to `fn` as matrices, in the compute dtype.
    `plain` says of an element method that `fn` uses nothing of the blocks but `x * number`, `x - y`, `add_`, `clone`,
    `shape` and `new_zeros`: where no other kind takes part in a merge, NumPy may do these and torch is not imported.
    Blocks of the result begin at a multiple of `grain` elements.
    The last `figures` numbers of a result are told at the end of the run, and not stored.
    `factored(params, shape)` gives the method that merges deltas of `shape` by the factors A_1, B_1, A_2, B_2, ... of
    adapters, with its settings but `scale` and `turned`, or None where whole deltas are needed; its result is what
    `factored.packed` makes. `needs_factors(params)` tells that nothing else will do. `keyed` names the method whose
    random numbers this one draws, where that is another.
    `check(params, inputs)` gives what is wrong with a combination of settings, `remark` what deserves a warning; both
    give None where all is well, and `inputs` counts what stands in `of`.
    """

    name: str
    fn: Callable[..., Any]
    summary: str
    params: tuple[Param, ...]
    takes: Space = "same"
    gives: Space = "same"
    reach: Reach | Callable[[Params], Reach] = "element"
    composite: bool = False
    inputs: tuple[int, int | None] = (1, None)
    base: Literal["no", "optional", "required"] = "no"
    paper: str = ""
    measure: Callable[[Params, int, Sequence[int]], Any] | None = None
    rounds: int = 1
    pick: Callable[[Params, int], int | None] | None = None
    check: Callable[[Params, int], str | None] | None = None
    remark: Callable[[Params, int], str | None] | None = None
    positioned: bool = False
    reports: bool = False
    plain: bool = False
    shape: Callable[[Sequence[tuple[int, ...]]], tuple[int, ...]] | None = None
    row_axis: Literal["first", "last"] = "last"
    rows: int = 1
    gathers: bool = False
    combines: bool = False
    without: Callable[..., Any] | None = None
    fits: Callable[[Sequence[tuple[int, ...]]], str | None] | None = None
    beside: Callable[[Params], tuple[Beside, ...]] | None = None
    figures: int = 0
    grain: int = 1
    factored: Callable[[Params, tuple[int, ...]], tuple[Method, Params] | None] | None = None
    needs_factors: Callable[[Params], bool] | None = None
    keyed: str = ""
    public: bool = True
    doc: str = ""
    module: str = ""

    def __call__(self, *inputs: Call | Slot, **params: Any) -> Call:
        """Use this method inside a composite: `sparsify(delta, density=0.2)`. Unnamed settings take their defaults."""
        full = {p.name: params.pop(p.name, p.default) for p in self.params}
        if params or any(value is REQUIRED for value in full.values()):
            raise TypeError(f"{self.name}: unknown settings {sorted(params)} or required ones missing in {full}")
        for param in self.per_input:
            value = full[param.name]
            count = len(inputs) - 1 if self.base_last else len(inputs)
            full[param.name] = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
        return Call(self, tuple(inputs), tuple(full.items()))

    @property
    def surrounds(self) -> bool:
        """True for a method on deltas whose base stands around it: subtracted from the inputs, added to the result."""
        return self.takes == "delta" and self.gives == "delta"

    @property
    def base_last(self) -> bool:
        """True for a method whose `xs` end with the base."""
        return self.base != "no" and not self.surrounds

    def param(self, name: str) -> Param | None:
        return next((p for p in self.params if p.name == name), None)

    @property
    def per_input(self) -> tuple[Param, ...]:
        return tuple(p for p in self.params if p.per_input)

    def reach_of(self, params: Params) -> Reach:
        return self.reach(params) if callable(self.reach) else self.reach

    def signature(self) -> str:
        """`ties(of: 1 or more, base: optional)` for lists and pages."""
        low, high = self.inputs
        count = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
        base = "" if self.base == "no" else f", base: {self.base}"
        return f"{self.name}(of: {count}{base})"

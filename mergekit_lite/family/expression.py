"""The two little languages of family files, both written as Python expressions and read as syntax only.

A *size* is arithmetic over keys of config.json: `head_dim or hidden_size / num_attention_heads`. `or` takes the first
that config.json states; `/` of whole numbers must come out even; a fraction is cut off at the end. `hidden_sizes[s]` is
an entry of a list, counted from 0, by a number in the name of a tensor.

An *axis* says what lies along one axis of a tensor: `heads * head_dim` (the first factor outermost), `mlp + mlp`
(one after the other), `heads * (rotary + qk + rotary + qk + vo)`. A word is a space, the groups of a space, a size or
`fixed`; `stage[s - 1]` is the space of the number before `s`, `stage[-1]` that of the last number.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Value = int | float | None


@dataclass(frozen=True, slots=True)
class Word:
    """A space, groups or size by name. `index`: None; (placeholder, shift) for `[s - 1]`; (None, number) for `[2]`."""

    name: str
    index: tuple[str | None, int] | None = None


@dataclass(frozen=True, slots=True)
class Product:
    """Axes within axes, the first factor outermost."""

    factors: tuple[Axis, ...]


@dataclass(frozen=True, slots=True)
class Sum:
    """Segments one after the other."""

    terms: tuple[Axis, ...]


Axis = Word | int | Product | Sum


@functools.cache
def axis(text: str | int) -> Axis:
    """What lies along an axis. ValueError where the text is no such expression."""
    return _axis(_expression(str(text)))


def words(node: Axis) -> tuple[Word, ...]:
    """Every word of an axis, in order."""
    return tuple(word for word, _ in nested(node))


def nested(node: Axis, outer: frozenset[str] = frozenset()) -> Iterator[tuple[Word, frozenset[str]]]:
    """Every word of an axis, in order, with the names of the words inside whose units it stands."""
    match node:
        case Word():
            yield node, outer
        case Sum(parts):
            for part in parts:
                yield from nested(part, outer)
        case Product(parts):
            for part in parts:
                yield from nested(part, outer)
                outer |= {word.name for word, _ in nested(part)}


def check_size(text: str | int) -> None:
    """ValueError where the text is no size."""
    _evaluate(_expression(str(text)), lambda _: None)


def size(text: str | int, value: Callable[[str], Value]) -> int | None:
    """The size under the values of keys that `value` gives (None: not stated); None where a needed key is missing.

    ValueError where a division leaves a remainder or the result is negative.
    """
    result = _evaluate(_expression(str(text)), value)
    if result is not None and result < 0:
        raise ValueError(f"`{text}` gives {result}")
    return None if result is None else int(result)


@functools.cache
def keys(text: str | int) -> tuple[str, ...]:
    """The keys that a size asks for, in order."""
    found: list[str] = []

    def note(key: str) -> None:
        found.append(key)

    _evaluate(_expression(str(text)), note)
    return tuple(dict.fromkeys(found))


@functools.cache
def _expression(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"`{text}` is no expression") from None


def _axis(node: ast.expr) -> Axis:
    match node:
        case ast.Name(id=name):
            return Word(name)
        case ast.Constant(value=int(number)) if not isinstance(number, bool) and number > 0:
            return number
        case ast.Subscript(value=ast.Name(id=name), slice=index):
            return Word(name, _index(index))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            terms = [part.terms if isinstance(part, Sum) else (part,) for part in (_axis(left), _axis(right))]
            return Sum((*terms[0], *terms[1]))
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            factors = [part.factors if isinstance(part, Product) else (part,) for part in (_axis(left), _axis(right))]
            return Product((*factors[0], *factors[1]))
    raise ValueError(f"`{ast.unparse(node)}` is no axis: words, numbers, `+`, `*` and `word[number - 1]` make one")


def _index(node: ast.expr) -> tuple[str | None, int]:
    match node:
        case ast.Constant(value=int(number)):
            return None, number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=1)):
            return None, -1
        case ast.Name(id=name):
            return name, 0
        case ast.BinOp(left=ast.Name(id=name), op=ast.Sub(), right=ast.Constant(value=int(number))):
            return name, -number
        case ast.BinOp(left=ast.Name(id=name), op=ast.Add(), right=ast.Constant(value=int(number))):
            return name, number
    raise ValueError(f"`[{ast.unparse(node)}]` is no number of a space")


def _evaluate(node: ast.expr, value: Callable[[str], Value]) -> Value:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.Name() | ast.Attribute():
            return value(_key(node))
        case ast.Subscript(value=ast.Name() | ast.Attribute() as inner, slice=ast.Name(id=number)):
            place = value(number)
            return value(_key(inner) if place is None else f"{_key(inner)}.{place}")
        case ast.BoolOp(op=ast.Or(), values=choices):
            # What stands behind the first that is stated need not come out even.
            found = (_evaluate(choice, value) for choice in choices)
            return next((number for number in found if number is not None), None)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _evaluate(left, value), _evaluate(right, value)
            return _arithmetic(op, a, b, ast.unparse(node))
    raise ValueError(f"`{ast.unparse(node)}` is no size: keys, numbers, `or`, `+`, `-`, `*`, `/` and `//` make one")


def _arithmetic(op: ast.operator, a: Value, b: Value, text: str) -> Value:
    if not isinstance(op, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.FloorDiv):
        raise ValueError(f"`{text}` is no size: keys, numbers, `or`, `+`, `-`, `*`, `/` and `//` make one")
    if a is None or b is None:
        return None
    match op:
        case ast.Add():
            return a + b
        case ast.Sub():
            return a - b
        case ast.Mult():
            return a * b
    if b == 0:
        raise ValueError(f"`{text}` divides by zero")
    if isinstance(op, ast.FloorDiv):
        return a // b
    if isinstance(a, int) and isinstance(b, int):
        if a % b:
            raise ValueError(f"`{text}`: {b} does not divide {a}")
        return a // b
    return a / b


def _key(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=inner, attr=name):
            return f"{_key(inner)}.{name}"
    raise ValueError(f"`{ast.unparse(node)}` is no key of config.json")

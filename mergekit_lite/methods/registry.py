"""Where methods come from: the files of this folder, and installed packages with an entry point."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

from mergekit_lite.errors import InputError, Problem
from mergekit_lite.methods.spec import Call, Method, Param, Slot, keywords

GROUP = "mergekit_lite.methods"


def method(*params: Param, name: str | None = None, **spec: Any) -> Callable[[Callable[..., Any]], Method]:
    """Make a `Method` of a function: `@method(Param(...), paper=..., takes="delta")`.

    The name is the function's unless `name` gives another; the first line of its docstring is the summary, the whole
    docstring the explanation. `spec` are the other fields of `Method`. Raises TypeError where there is no docstring.
    """

    def make(fn: Callable[..., Any]) -> Method:
        doc = inspect.getdoc(fn)
        if not doc:
            raise TypeError(f"method `{name or fn.__name__}` needs a docstring: its first line is the summary")
        return Method(
            name=name or fn.__name__,
            fn=fn,
            summary=doc.splitlines()[0],
            params=params,
            doc=doc,
            module=fn.__module__,
            **spec,
        )

    return make


def all_methods() -> Mapping[str, Method]:
    """Every known method by name, in alphabetical order. Raises `InputError` where an installed package is broken."""
    return _discover()[0]


def package_of(name: str) -> str:
    """The distribution that the method called `name` comes from. Raises KeyError and `InputError` as `get` does."""
    return _discover()[1][name]


def get(name: str) -> Method:
    """The method called `name`. Raises KeyError where there is none."""
    return all_methods()[name]


def expand(call: Call | Slot) -> Call | Slot:
    """A tree of calls made of parts only: composites are replaced by what they are made of. Settings are complete,
    per-input ones are tuples."""
    if isinstance(call, Slot):
        return call
    inputs = tuple(expand(below) for below in call.inputs)
    if call.method.composite:
        return expand(call.method.fn(*inputs, **keywords(dict(call.params))))
    return Call(call.method, inputs, call.params)


@functools.cache
def _discover() -> tuple[Mapping[str, Method], Mapping[str, str]]:
    """The methods by name, and the distribution of each."""
    found: dict[str, Method] = {}
    package = importlib.import_module(__package__ or GROUP)
    for info in pkgutil.iter_modules(package.__path__):
        found.update({m.name: m for m in _in_module(importlib.import_module(f"{package.__name__}.{info.name}"))})
    owners = dict.fromkeys(found, "mergekit_lite")
    problems: list[Problem] = []
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        owner = entry.dist.name if entry.dist is not None else entry.value
        hint = f"upgrade or uninstall the package `{owner}`"
        try:
            methods = _of_entry(entry.load())
        except Exception as error:  # A stranger's package may raise anything.
            message = f"the package `{owner}` is broken: its methods `{entry.value}` do not load ({error!r})"
            problems.append(Problem(message, hint=hint))
            continue
        for m in methods:
            if m.name in found:
                message = f"the package `{owner}` has a method `{m.name}`, a name that `{owners[m.name]}` uses already"
                problems.append(Problem(message, hint=hint))
            else:
                found[m.name] = m
                owners[m.name] = owner
    if problems:
        raise InputError(problems)
    return MappingProxyType(dict(sorted(found.items()))), MappingProxyType(owners)


def _of_entry(loaded: object) -> list[Method]:
    if isinstance(loaded, Method):
        return [loaded]
    if isinstance(loaded, ModuleType):
        methods = _in_module(loaded)
        if methods:
            return methods
        raise TypeError("the module has no method")
    raise TypeError(f"neither a module nor a method but {type(loaded).__name__}")


def _in_module(module: ModuleType) -> list[Method]:
    """The methods made in `module`, without those it imports to build on."""
    return [m for m in vars(module).values() if isinstance(m, Method) and m.module == module.__name__]

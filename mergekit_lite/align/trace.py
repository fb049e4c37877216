"""The spaces of a model that no family file describes, read off its graph.

`torch.export` gives the operations that the model does to an example; each has a rule that ties the axes of its inputs
and outputs to each other (ops.py). What ends up free along the axes of stored tensors is a space. Axes of the model's
inputs and outputs are fixed, and so are all axes of an operation without a rule.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mergekit_lite.align.axis import Atom, atoms, fresh, places_of
from mergekit_lite.align.node import Axes, Call, Notes, Value, fix_all, fixed, values_in
from mergekit_lite.align.ops import apply
from mergekit_lite.errors import InputError, Problem
from mergekit_lite.family.spaces import Space, Use
from mergekit_lite.lazy import torch

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

MOST = 4096  # uses of one space along one axis; a space that is scattered over more is left fixed
_HINT = "describe it in a family file instead: docs/families.md"


def trace_spaces(module: torch.nn.Module, example_inputs: Any) -> tuple[Space, ...]:
    """The spaces of `module` in eval mode, with the names of its `state_dict()`; of tied tensors the first name.

    `example_inputs` is a tensor, a tuple of positional arguments, or a mapping of keyword arguments. Only what the
    model does to them is seen: give a batch of two or more, and sequences of two or more to a recurrent model. Spaces
    have no groups, parents or renames, and are of one of these kinds:

        channels   of convolutions               residual   tied by an addition of two branches
        heads      each a block of coordinates   qk, vo     coordinates within all heads, the same ones in each
        mlp        everything else

    Raises InputError where torch.export cannot trace the module.
    """
    program = _export(module, *arguments_of(example_inputs))
    notes, tensors = _walk(program, _names(module))
    return tuple(_spaces(tensors, notes))


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: of a tensor, a tuple or list, or a mapping."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def _names(module: torch.nn.Module) -> dict[str, str]:
    """For every name of a stored tensor the first name of the same tensor."""
    first: dict[int, str] = {}
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _export(module: torch.nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> ExportedProgram:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program: ExportedProgram = torch.export.export(module, positional, keywords).run_decompositions()
            return program
    except Exception as error:  # torch.export raises whatever the module's code and its own many parts raise
        reason = str(error).strip().splitlines()
        message = f"torch.export cannot trace {type(module).__name__}: {reason[0] if reason else type(error).__name__}"
        raise InputError(Problem(message, None, _HINT)) from error
    finally:
        for part in training:
            part.training = True


def _walk(program: ExportedProgram, first: Mapping[str, str]) -> tuple[Notes, dict[str, Axes]]:
    """What the rules note, and the axes of the stored tensors that the graph uses."""
    targets = {
        spec.arg.name: first.get(spec.target, spec.target)
        for spec in program.graph_signature.input_specs
        if spec.target is not None and spec.kind.name in ("PARAMETER", "BUFFER") and spec.persistent is not False
    }
    notes = Notes()
    values: dict[Node, Any] = {}
    tensors: dict[str, Axes] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in targets:
            if node.users:
                name = targets[node.name]
                axes = tensors.setdefault(name, tuple(map(fresh, _shapes(node)[0])))
                values[node] = Value(axes, stored=name)
        elif node.op == "call_function":
            values[node] = _call(node, values, notes)
        elif node.op == "output":
            for value in values_in(_read(node.args, values)):
                fix_all(value.axes)
        else:
            made = [Value(fixed(shape), data=node.op == "placeholder") for shape in _shapes(node)]
            values[node] = made[0] if len(made) == 1 else made
    return notes, tensors


def _call(node: Node, values: Mapping[Node, Any], notes: Notes) -> Any:
    """The Value of an operation, or a list of Values."""
    if node.target is operator.getitem:
        several, place = _read(node.args, values)
        return several[place]
    shapes = _shapes(node)
    if not shapes:
        return []  # an assertion, or arithmetic of sizes
    given = _read({**dict(enumerate(node.args)), **node.kwargs}, values)
    name, pointwise = "", False
    if isinstance(node.target, torch._ops.OpOverload):
        tags = node.target.tags
        name = node.target._schema.name.removeprefix("aten::")
        pointwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
        given = {
            argument.name: given.get(place, given.get(argument.name, argument.default_value))
            for place, argument in enumerate(node.target._schema.arguments)
        }
    made = apply(Call(name, given, shapes, notes), pointwise)
    return made if isinstance(node.meta["val"], list | tuple) else made[0]


def _read(argument: Any, values: Mapping[Node, Any]) -> Any:
    """An argument with the Values of the nodes in it."""
    if isinstance(argument, list | tuple):
        return [_read(part, values) for part in argument]
    if isinstance(argument, dict):
        return {key: _read(part, values) for key, part in argument.items()}
    return values[argument] if isinstance(argument, torch.fx.Node) else argument


def _shapes(node: Node) -> tuple[tuple[int, ...], ...]:
    """The shapes of a node's outputs. InputError where they depend on the numbers in the input."""
    made = node.meta.get("val")
    outputs = made if isinstance(made, list | tuple) else [made] if isinstance(made, torch.Tensor) else []
    shapes = tuple(tuple(part.shape) if isinstance(part, torch.Tensor) else (0,) for part in outputs)
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        raise InputError(Problem(f"the shape of `{node.name}` depends on the numbers in the input", None, _HINT))
    return shapes


def _spaces(tensors: Mapping[str, Axes], notes: Notes) -> Iterator[Space]:
    uses: dict[Atom, list[Use]] = {}
    inner: set[Atom] = set()  # atoms that repeat within each position of another
    scattered: set[Atom] = set()
    for name, axes in tensors.items():
        for axis, tree in enumerate(axes):
            for atom, starts, block in places_of(tree):
                if len(starts) > MOST:
                    scattered.add(atom)
                elif not atom.fixed:
                    weighed = name not in notes.statistics
                    uses.setdefault(atom, []).extend(Use(name, axis, block, at, weighed=weighed) for at in starts)
                    inner |= {atom} if len(starts) > 1 else set()
    free = {atom: found for atom, found in uses.items() if atom not in scattered}
    noted = {kind: {atom for tree in trees for atom in atoms(tree)} for kind, trees in notes.axes.items()}
    stems = {atom: re.sub(r"\.(weight|bias)$", "", found[0].tensor) for atom, found in free.items()}
    taken: dict[str, int] = {}
    for atom, found in free.items():
        kind = _kind(atom, found, inner, noted)
        name = stems[atom] if list(stems.values()).count(stems[atom]) == 1 else f"{stems[atom]}.{kind}"
        taken[name] = taken.get(name, 0) + 1
        yield Space(name if taken[name] == 1 else f"{name}.{taken[name]}", kind, atom.size, tuple(found))


def _kind(atom: Atom, uses: list[Use], inner: set[Atom], noted: Mapping[str, set[Atom]]) -> str:
    if atom in noted["added"]:
        return "residual"
    if atom in noted["channels"]:
        return "channels"
    if any(use.block > 1 for use in uses):
        return "heads"
    if atom in inner:
        return "vo" if atom in noted["contracted"] else "qk"
    return "mlp"

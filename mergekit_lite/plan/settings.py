"""The recipe's steps held against the methods they use: names, counts, settings, ranges. No tensor, no file."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from mergekit_lite.errors import Mark, Problem, suggest
from mergekit_lite.methods.spec import Method, Param
from mergekit_lite.recipe.links import cycles, references
from mergekit_lite.recipe.model import Recipe, Ref, Step
from mergekit_lite.recipe.value import NO_VALUE, Value


def check_steps(recipe: Recipe, methods: Mapping[str, Method]) -> list[Problem]:
    """Every fault of the recipe's steps that shows without a checkpoint."""
    problems: list[Problem] = []
    for step in recipe.steps.values():
        method = methods.get(step.use)
        if method is None:
            hint = suggest(step.use, [m.name for m in methods.values() if m.public])
            problems.append(Problem(f"there is no method `{step.use}`", step.use_mark, hint))
        else:
            problems += [
                *_inputs(step, method),
                *_base(step, method),
                *_statistics(step, method, recipe),
                *(_settings(step, method) or _together(step, method)),
            ]
    return problems or _cycles(recipe, methods)


def _together(step: Step, method: Method) -> list[Problem]:
    """What is wrong with the settings taken together, where they are the same for all tensors."""
    params = constant(step, method)
    fault = method.check(params, len(step.of)) if method.check and params is not None else None
    return [Problem(fault, step.use_mark, f"`merge methods {method.name}` explains it")] if fault else []


def constant(step: Step, method: Method) -> dict[str, Any] | None:
    """The settings of `step`, per-input ones as tuples, or None where one differs from tensor to tensor."""
    values = [*step.params.values(), *(value for item in step.of for value in item.params.values())]
    return resolve(step, method, "", None) if all(value.constant for value in values) else None


def _inputs(step: Step, method: Method) -> list[Problem]:
    low, high = method.inputs
    count = len(step.of)
    if count >= low and (high is None or count <= high):
        return []
    wanted = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
    plural = "" if wanted == "1" else "s"
    message = f"`{method.name}` takes {wanted} input{plural} in `of`, here are {count}"
    return [Problem(message, step.use_mark, f"`merge methods {method.name}` explains it")]


def _base(step: Step, method: Method) -> list[Problem]:
    problems: list[Problem] = []
    if step.base is None and method.base == "required" and method.surrounds:
        return problems  # Deltas may come from other steps: spaces are checked when they are known.
    if step.base is None and method.base == "required":
        message = f"`{method.name}` needs a `base`"
        problems.append(Problem(message, step.use_mark, "name the model that the others were fine-tuned from"))
    if step.base is not None and method.base == "no":
        problems.append(Problem(f"`{method.name}` takes no `base`", step.base.mark, "remove it, or use another method"))
    for key, ref in (("rest", step.rest), ("below", step.below), ("above", step.above)):
        if ref is not None and method.name != "stack":
            problems.append(Problem(f"`{method.name}` takes no `{key}`", ref.mark, "only `stack` does"))
    return problems


def statistics(step: Step, method: Method, only: str | None = None) -> list[Ref]:
    """The models or steps that the step's `reference` settings name: parameter by parameter, input by input. `only` is
    the one setting that is asked for."""
    found: list[Ref] = []
    for param in method.params:
        if param.kind == "reference" and only in (None, param.name):
            common = step.params.get(param.name)
            values = [item.params.get(param.name, common) for item in step.of] if param.per_input else [common]
            found += [Ref(str(v.rules[0].value), v.mark) for v in values if v is not None and v.constant]
    return found


def _statistics(step: Step, method: Method, recipe: Recipe) -> list[Problem]:
    """References to what does not exist, or that differ from tensor to tensor."""
    problems: list[Problem] = []
    names = {param.name for param in method.params if param.kind == "reference"}
    given = [*step.params.items(), *(pair for item in step.of for pair in item.params.items())]
    for name, value in given:
        if name in names and not value.constant:
            problems.append(Problem(f"`{name}` is one model or step for all tensors", value.mark, "name it plainly"))
    known = [*recipe.models, *recipe.steps]
    read = references(step)  # the reader has looked these up
    for ref in statistics(step, method):
        if ref.name not in known and ref not in read:
            hint = suggest(ref.name, known)
            problems.append(Problem(f"there is no model or step `{ref.name}`", ref.mark, hint))
    return problems


def references_of(step: Step, methods: Mapping[str, Method], steps: Container[str]) -> list[Ref]:
    """Everything that a step works from: inputs, base, rest, and what its settings refer to."""
    known = [] if step.use not in methods else statistics(step, methods[step.use])
    source = known_step(step, steps)
    return [*references(step), *known, *([source] if source else [])]


def known_step(step: Step, steps: Container[str]) -> Ref | None:
    """The step of `steps` whose permutations `from` names; None where it names a file, or there is no `from`."""
    value = step.params.get("from")
    name = value.rules[0].value if value is not None and value.constant else None
    return Ref(name, value.mark) if value is not None and isinstance(name, str) and name in steps else None


def _cycles(recipe: Recipe, methods: Mapping[str, Method]) -> list[Problem]:
    """Cycles that go through a `reference` setting; the reader has found the others."""
    if cycles({step.name: [ref.name for ref in references(step)] for step in recipe.steps.values()}):
        return []
    uses = {
        step.name: [ref.name for ref in references_of(step, methods, recipe.steps)] for step in recipe.steps.values()
    }
    return [
        Problem(f"the steps refer to one another in a circle: {' -> '.join(path)}", recipe.steps[path[0]].mark)
        for path in cycles(uses)
    ]


def _settings(step: Step, method: Method) -> list[Problem]:
    problems: list[Problem] = []
    listing = f"`merge methods {method.name}` lists them all"
    given = [(name, value, False) for name, value in step.params.items()]
    given += [(name, value, True) for item in step.of for name, value in item.params.items()]
    for name, value, beside_input in given:
        param = method.param(name)
        allowed = [p.name for p in (method.per_input if beside_input else method.params)]
        if param is None or (beside_input and not param.per_input):
            kind = "per-input setting" if beside_input else "setting"
            hint = suggest(name, allowed) if allowed else None
            hint = f"{hint} {listing}" if hint and "did you mean" in hint else hint or listing
            problems.append(Problem(f"`{method.name}` has no {kind} `{name}`", _key_mark(value), hint))
            continue
        for scalar, mark in value.scalars():
            fault = _fault(param, scalar)
            if fault:
                problems.append(Problem(fault, mark, f"{param.help}; {listing}"))
    for param in method.params:
        missing = [item for item in step.of if param.name not in item.params]
        if param.required and param.name not in step.params and (not param.per_input or missing):
            where = f"beside `{missing[0].ref.name}` or under `with`" if param.per_input else "under `with`"
            message = f"`{method.name}` needs `{param.name}` ({param.range_text()}) {where}"
            problems.append(Problem(message, step.use_mark, f"{param.help}; {listing}"))
    return problems


def _fault(param: Param, scalar: Any) -> str | None:
    several = ("layers", "words", "integers", "spans", "globs", "texts")
    if isinstance(scalar, tuple) and param.kind not in several:
        return f"`{param.name}` is one value, not a list"
    return param.fault(scalar)


def _key_mark(value: Value) -> Mark:
    return value.key_mark or value.mark


class Unset(Exception):
    """No rule of a setting applies to a tensor; `param` is the setting, `mark` where it stands."""

    def __init__(self, param: str, mark: Mark):
        super().__init__(param)
        self.param = param
        self.mark = mark


def resolve(step: Step, method: Method, name: str, depth: float | None) -> dict[str, Any]:
    """The settings of `step` for tensor `name`: per-input ones as tuples. Raises `Unset` where globs leave a gap."""

    def at(param: Param, value: Value | None) -> Any:
        if value is None:
            return param.default
        found = value.at(name, depth)
        if found is NO_VALUE:
            raise Unset(param.name, value.mark)
        return float(found) if param.kind == "number" and isinstance(found, int) else found

    settings: dict[str, Any] = {}
    for param in method.params:
        common = step.params.get(param.name)
        if param.per_input:
            settings[param.name] = tuple(at(param, item.params.get(param.name, common)) for item in step.of)
        else:
            settings[param.name] = at(param, common)
    return settings

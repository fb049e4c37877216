"""One step at a time: the tables of its inputs become the table of its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergekit_lite.checkpoint.meta import MERGEABLE
from mergekit_lite.errors import Mark, Problem
from mergekit_lite.methods.registry import expand
from mergekit_lite.methods.spec import Call, Method, Params, Slot, keywords
from mergekit_lite.plan.factors import NoFactors, merged_factors
from mergekit_lite.plan.graph import Builder, PoolConflict, Table
from mergekit_lite.plan.model import Node
from mergekit_lite.plan.parts import part_faults
from mergekit_lite.plan.settings import Unset, constant, resolve
from mergekit_lite.recipe.model import Step
from mergekit_lite.recipe.value import glob_matches

SHOWN = 3  # tensor names that one finding lists before it only counts


@dataclass(frozen=True, slots=True)
class Source:
    """One input of a step: the name it is mentioned by, where, and its table."""

    name: str
    mark: Mark
    table: Table


class Faults:
    """Findings about many tensors, gathered by kind so that a hundred tensors give one message."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, Mark, str | None], list[str]] = {}

    def add(self, message: str, mark: Mark, hint: str | None, tensor: str) -> None:
        self._found.setdefault((message, mark, hint), []).append(tensor)

    def problems(self) -> list[Problem]:
        """One problem a kind: the message with the first tensors it holds for."""
        return [
            Problem(f"{message}: {listed(names)}", mark, hint) for (message, mark, hint), names in self._found.items()
        ]


def listed(names: Sequence[str]) -> str:
    """`a, b, c and 7 more`."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"`{name}`" for name in names[:SHOWN]) + more


def build_step(
    builder: Builder,
    step: Step,
    method: Method,
    sources: Sequence[Source],
    base: Source | None,
    further: Sequence[Source],
    delta: Method,
    add: Method,
) -> tuple[Table, list[Problem]]:
    """The result of `step` and what is wrong with it. `further` are what the method's `reference` settings name.
    `delta` and `add` are the methods of these names, which go around a delta method that has a base."""
    problems = [*_space_faults(step, method, sources, base), *part_faults(step, sources, base)]
    lead = base or sources[0]
    empty = replace(lead.table, nodes={}, space=_space(method, sources, base))
    if problems:
        return empty, problems

    faults = Faults()
    labels = labels_of(builder, [*sources, *([base] if base else []), *further])
    unfit = _Unfit(sources, base, faults)
    nodes: dict[str, Node] = {}
    dtypes: dict[str, str] = {}
    same = constant(step, method)
    calls: dict[Any, Call | Slot] = {}
    spaces = [source.table.space for source in sources]

    def zero(name: str, like: Node) -> Node:
        return builder.call(delta(Slot(0), Slot(1)), [like, like], ["zero"] * 2, step.name, name)

    for name, given in _aligned(step, sources, base, faults, zero):
        table = lead.table
        if name not in table.nodes:
            table = next(s.table for s in sources if name in s.table.nodes)
        dtype = dtypes[name] = table.dtypes[name]
        if given is None or dtype not in MERGEABLE:
            nodes[name] = table.nodes[name]
            continue
        if unfit(name, given):
            continue
        try:
            params = same if same is not None else resolve(step, method, name, lead.table.family.depth(name))
        except Unset as gap:
            faults.add(f"no rule of `{gap.param}` applies to", gap.mark, "add an `else` to it", name)
            continue
        # Settings that are the same for all tensors have been checked.
        fault = method.check(params, len(sources)) if method.check and same is None else None
        if fault:
            faults.add(f"{fault} In", step.use_mark, f"`merge methods {method.name}` explains it", name)
            continue
        statistics = [source.table.nodes[name] for source in further if name in source.table.nodes]
        if statistics and len(statistics) < len(further):
            lacking = next(source for source in further if name not in source.table.nodes)
            hint = "statistics cover a tensor for every input, or for none"
            faults.add(f"`{lacking.name}` lacks tensors that other statistics have", lacking.mark, hint, name)
            continue
        misfit = method.fits([n.shape for n in (*given, *statistics)]) if method.fits and statistics else None
        if misfit:
            hint = "were the statistics made with this model?"
            faults.add(f"{misfit} In", further[0].mark, hint, name)
            continue
        use = (bool(statistics), None if same is not None else tuple(params.items()))
        call = calls.get(use)
        if call is None:
            call = _call(method, params, sources, base, statistics, delta, add)
            if not statistics and method.without is not None:
                call = method.without(*(Slot(i) for i in range(len(sources))), **keywords(_plain(method, params)))
            calls[use] = call
        try:
            thin = merged_factors(builder, method, params, call, given, spaces, labels, (step.name, name), add)
            given = [*given, *statistics]
            nodes[name] = thin or builder.call(call, given, labels[: len(given)], step.name, name)
        except NoFactors as fault:
            faults.add(str(fault), step.use_mark, "name them as models: `{adapter: ADAPTER}`", name)
        except PoolConflict as conflict:
            message = f"{conflict} measures all tensors at once, so its settings cannot differ between tensors"
            faults.add(message, step.use_mark, "use `scope: tensor`, or one value without globs and curves", name)
    return replace(empty, nodes=nodes, dtypes=dtypes), faults.problems()


def idle_globs(step: Step, method: Method, table: Table) -> list[Problem]:
    """Globs in the step's settings that match no tensor: most often a typing error, which would go unseen."""
    values = [*step.params.items(), *(pair for item in step.of for pair in item.params.items())]
    elsewhere = {param.name for param in method.params if param.by_space}
    return [
        Problem(
            f"`{rule.glob}` matches no tensor, so this value of `{param}` is never used",
            rule.mark,
            "`merge inspect --tensors` shows the names; `*` stands for any text, dots included",
        )
        for param, value in values
        for rule in value.rules
        if param not in elsewhere
        if rule.glob is not None and not any(glob_matches(rule.glob, name) for name in table.nodes)
    ]


def labels_of(builder: Builder, sources: Sequence[Source]) -> list[str]:
    """The inputs' names, `a`, `b`, `a#2` where a name comes twice: they key the random masks. A name that is a path of
    this machine is what stands for it elsewhere, so that a published lock draws the same masks."""
    seen: dict[str, int] = {}
    labels = []
    for source in sources:
        name = builder.called.get(source.name, source.name)
        seen[name] = seen.get(name, 0) + 1
        labels.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return labels


def _space(method: Method, sources: Sequence[Source], base: Source | None) -> str:
    if method.surrounds:
        return "weight" if base else "delta"
    return sources[0].table.space if method.gives == "same" else method.gives


def _space_faults(step: Step, method: Method, sources: Sequence[Source], base: Source | None) -> list[Problem]:
    problems: list[Problem] = []
    if base is not None and base.table.space != "weight":
        hint = "a base is a model, or a step that gives a whole model"
        problems.append(Problem(f"`{base.name}` is a delta and cannot be a base", base.mark, hint))
    for source in sources:
        space = source.table.space
        if method.takes == "delta" and space == "weight" and not (method.surrounds and base):
            hint = f"give `{step.name}` a `base`, or take the delta first: `use: delta`"
            problems.append(
                Problem(f"`{method.name}` takes deltas, `{source.name}` is a whole model", source.mark, hint)
            )
        elif method.takes == "weight" and space == "delta":
            hint = "add it to its base first: `use: add`"
            problems.append(
                Problem(f"`{method.name}` takes whole models, `{source.name}` is a delta", source.mark, hint)
            )
        elif method.takes == "same" and space != sources[0].table.space:
            message = f"`{source.name}` is a {space}, `{sources[0].name}` is a {sources[0].table.space}"
            hint = "a method works on whole models or on deltas, not on both: `use: delta` and `use: add` lead across"
            problems.append(Problem(message, source.mark, hint))
        codes = source.table.quantized
        if codes is not None and method.reach != "structure":
            problems.append(Problem(f"`{source.name}` {codes.says}", source.mark, codes.hint))
    return problems


def _aligned(
    step: Step,
    sources: Sequence[Source],
    base: Source | None,
    faults: Faults,
    zero: Callable[[str, Node], Node],
) -> Iterator[tuple[str, list[Node] | None]]:
    """Every tensor name of the result with its inputs in order (the base last), None where it is kept as it is.
    `zero(name, like)` gives a delta of zeros in the shape of a tensor."""
    everyone = [*sources, *([base] if base else [])]
    tables = [source.table.nodes for source in everyone]
    lead = [*([base] if base else []), *sources]
    names = dict.fromkeys(name for source in lead for name in source.table.nodes)
    for name in names:
        lacking = [source for source in lead if name not in source.table.nodes]
        if not lacking:
            yield name, [nodes[name] for nodes in tables]
        elif step.missing == "skip":
            continue
        elif step.missing == "base" and base is not None and name in base.table.nodes:
            yield name, None
        elif step.missing == "zero_delta" and base is not None and name in base.table.nodes:
            spare = base.table.nodes[name]
            if all(source.table.space == "delta" and name not in source.table.nodes for source in sources):
                yield name, None
                continue
            found = [source.table.nodes.get(name) for source in sources]
            spares = [zero(name, spare) if s.table.space == "delta" else spare for s in sources]
            yield name, [*(n if n is not None else other for n, other in zip(found, spares, strict=True)), spare]
        else:
            for source in lacking:
                hint = _missing_hint(step, base, source)
                faults.add(f"`{source.name}` lacks tensors that others of `{step.name}` have", source.mark, hint, name)


def _missing_hint(step: Step, base: Source | None, lacking: Source) -> str:
    if base is None or lacking is base:
        return "`missing: skip` in the step leaves such tensors out"
    return (
        "`missing: base` keeps the base's tensor, `zero_delta` takes the base for the model that lacks it, "
        "`skip` leaves it out"
    )


class _Unfit:
    """Whether the inputs of a tensor, the base last, do not go together; says why to `faults`."""

    def __init__(self, sources: Sequence[Source], base: Source | None, faults: Faults):
        self._everyone = [*sources, *([base] if base else [])]
        self._lead = base or sources[0]
        self._place = -1 if base else 0
        self._dtypes = [source.table.dtypes for source in self._everyone]
        self._faults = faults

    def __call__(self, name: str, given: Sequence[Node]) -> bool:
        shape = given[self._place].shape
        for node, dtypes in zip(given, self._dtypes, strict=True):
            if node.shape != shape or dtypes.get(name, "F32") not in MERGEABLE:
                self._explain(name, given, shape)
                return True
        return False

    def _explain(self, name: str, given: Sequence[Node], shape: tuple[int, ...]) -> None:
        lead = self._lead.name
        for source, node in zip(self._everyone, given, strict=True):
            stored = source.table.dtypes.get(name)
            if node.shape != shape:
                shapes = f"{_shape(node.shape)} and {_shape(shape)}"
                message = f"`{source.name}` and `{lead}` have different shapes ({shapes})"
                hint = "only checkpoints of one architecture and one vocabulary can be merged"
                self._faults.add(message, source.mark, hint, name)
            elif stored is not None and stored not in MERGEABLE:
                message = f"`{source.name}` stores as {stored} what `{lead}` stores as numbers to merge"
                self._faults.add(message, source.mark, "are these checkpoints of one architecture?", name)


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"


def _call(
    method: Method,
    params: Params,
    sources: Sequence[Source],
    base: Source | None,
    statistics: Sequence[Node],
    delta: Method,
    add: Method,
) -> Call | Slot:
    """A use of `method` over the slots of one tensor: the inputs, the base if there is one, then the statistics."""
    count = len(sources)
    last = () if base is None else (Slot(count),)
    beside = tuple(Slot(count + len(last) + i) for i in range(len(statistics)))
    settings = tuple(_plain(method, params).items())
    if not (last and method.surrounds):
        return expand(Call(method, (*map(Slot, range(count)), *beside, *last), settings))
    inputs = [Slot(i) if source.table.space == "delta" else delta(Slot(i), *last) for i, source in enumerate(sources)]
    return add(expand(Call(method, (*inputs, *beside), settings)), *last)


def _plain(method: Method, params: Params) -> Params:
    """The settings without references: a method never sees a name."""
    names = {param.name for param in method.params if param.kind == "reference"}
    return {key: value for key, value in params.items() if key not in names}

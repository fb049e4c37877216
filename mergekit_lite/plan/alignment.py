"""Steps that put units in another order (`permute`, `reorder`, `merge_many`): which tensors move along, and what has to
be looked at first to find the order."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergekit_lite.errors import MergeError, Problem
from mergekit_lite.family.axes import spaces_of
from mergekit_lite.family.data import load_family
from mergekit_lite.family.spaces import Space
from mergekit_lite.methods.registry import all_methods
from mergekit_lite.methods.spec import Call, Method, Slot
from mergekit_lite.plan.graph import Builder, Table
from mergekit_lite.plan.model import Alignment, Node
from mergekit_lite.plan.settings import Unset, resolve
from mergekit_lite.plan.steps import Source, listed
from mergekit_lite.recipe.model import Step


def build_alignment(
    builder: Builder, step: Step, method: Method, sources: Sequence[Source], named: Mapping[str, Source]
) -> tuple[Table, list[Problem]]:
    """The result of `step` and what is wrong with it. `named` is what the step's `reference` settings name, by setting.

    The order itself is found by the run: it is a statistic over whole models, which `builder` notes as an alignment.
    """
    lead = sources[0]
    problems = _unfit(step, method, sources, named)
    settings = {p.name: _setting(step, p.name, p.default) for p in method.params if not p.per_input}
    if problems:
        return replace(lead.table, nodes={}), problems
    known = builder.alignments.get(settings["from"]) if settings.get("from") else None
    kinds = settings["spaces"] if isinstance(settings["spaces"], tuple) else (settings["spaces"],)
    try:
        spaces = known.spaces if known else _spaces(lead.table, settings.get("family"))
    except MergeError as fault:
        return replace(lead.table, nodes={}), [_placed(problem, step) for problem in fault.problems]
    if known:
        kinds = known.kinds
    chosen = tuple(space for space in spaces if space.kind in kinds)
    used = used_tensors(chosen)
    if not chosen:
        there = ", ".join(sorted({f"`{space.kind}`" for space in spaces}))
        problems.append(Problem("the model has none of these spaces", _mark(step, "spaces"), f"it has {there}"))
    models = [*([named["like"]] if "like" in named else []), *sources]
    for model in models:
        problems += _gaps(model, lead, used, step)
    path = settings.get("from")
    digest = None
    if path is not None and known is None:
        digest, found = _file(path, chosen, step)
        problems += found
    for name in ("activations", "like_activations"):
        if name in named:
            problems += _activations(named[name], chosen)
    if problems:
        return replace(lead.table, nodes={}), problems
    name = known.name if known else step.name
    if known is None:
        tables = [*models, *(named[n] for n in ("like_activations", "activations") if n in named)]
        builder.alignments[name] = Alignment(
            name=name,
            use=step.use if path is None else "known",
            labels=tuple(source.name for source in sources),
            spaces=spaces,
            kinds=kinds,
            models=tuple({t: m.table.nodes[t] for t in used} for m in models),
            activations=tuple(
                {s.name: t.table.nodes[s.name] for s in chosen if s.name in t.table.nodes}
                for t in tables[len(models) :]
            ),
            params=tuple(
                (key, value)
                for key, value in settings.items()
                if key in ("cost", "max_sweeps", "seed", "order", "starts", "way", "from") and value is not None
            ),
            digest=digest,
        )
    moved = _Moved(builder, step.name, name, spaces, kinds, bool(settings.get("invert")))
    tables_out = [moved.table(source.table, number) for number, source in enumerate(sources)]
    if method.name != "merge_many":
        return tables_out[0], []
    return _mean(builder, step, method, sources, tables_out)


def used_tensors(spaces: Sequence[Space]) -> tuple[str, ...]:
    """Every tensor that some of these spaces move or compare, in order."""
    names = [use.tensor for space in spaces for use in space.uses]
    names += [name for space in spaces for group in space.renames for name in group]
    return tuple(dict.fromkeys(names))


class _Moved:
    """Makes tables of permuted tensors."""

    def __init__(
        self, builder: Builder, step: str, alignment: str, spaces: Sequence[Space], kinds: Sequence[str], invert: bool
    ):
        self._builder, self._step, self._alignment, self._invert = builder, step, alignment, invert
        chosen = [space for space in spaces if space.kind in kinds]
        # What may come to stand under a tensor's name: itself, and what else an order of experts puts there.
        self._candidates: dict[str, tuple[str, ...]] = {name: (name,) for name in used_tensors(chosen)}
        for space in chosen:
            for names in space.renames:
                self._candidates.update(dict.fromkeys(names, names))

    def table(self, table: Table, model: int) -> Table:
        """`table` with the tensors of input number `model` in their new order."""
        nodes = dict(table.nodes)
        for name, candidates in self._candidates.items():
            if name in nodes:
                inputs = [table.nodes[c] for c in candidates]
                place = (("tensor", name), ("among", candidates), ("model", model), ("invert", self._invert))
                nodes[name] = self._builder.gather(inputs, self._step, self._alignment, place)
        return replace(table, nodes=nodes)


def _mean(
    builder: Builder, step: Step, method: Method, sources: Sequence[Source], tables: Sequence[Table]
) -> tuple[Table, list[Problem]]:
    linear = all_methods()["linear"]
    labels = [source.name for source in sources]
    nodes: dict[str, Node] = {}
    lacking: list[str] = []
    calls: dict[Any, Call] = {}
    lead = tables[0]
    for name, node in lead.nodes.items():
        if any(name not in table.nodes or table.nodes[name].shape != node.shape for table in tables):
            lacking.append(name)
            continue
        try:
            weights = resolve(step, method, name, lead.family.depth(name))["weight"]
        except Unset as gap:
            return lead, [Problem(f"no rule of `weight` applies to `{name}`", gap.mark, "add an `else` to it")]
        if weights not in calls:
            calls[weights] = linear(*map(Slot, range(len(tables))), weight=weights, normalize=True)
        nodes[name] = builder.call(calls[weights], [t.nodes[name] for t in tables], labels, step.name, name)
    if lacking:
        hint = "only checkpoints of one architecture can be matched"
        return lead, [Problem(f"not all models have, in one shape, {listed(lacking)}", step.use_mark, hint)]
    return replace(lead, nodes=nodes), []


def _spaces(table: Table, family: str | None) -> tuple[Space, ...]:
    data = load_family(os.path.expanduser(family)) if family else None
    return spaces_of(table.config, {name: node.shape for name, node in table.nodes.items()}, data)


def _unfit(step: Step, method: Method, sources: Sequence[Source], named: Mapping[str, Source]) -> list[Problem]:
    problems: list[Problem] = []
    for source in [*sources, *named.values()]:
        if source.table.quantized:
            hint = "save it in bfloat16 first (transformers: `model.dequantize()`), then merge"
            problems.append(Problem(f"`{source.name}` is quantised: its numbers are codes", source.mark, hint))
    like = named.get("like")
    if like is not None and like.table.space != sources[0].table.space:
        hint = "match whole models; a delta takes the permutations of that step with `from`"
        message = f"`{like.name}` is a {like.table.space}, `{sources[0].name}` is a {sources[0].table.space}"
        problems.append(Problem(message, like.mark, hint))
    varying = [value for name, value in step.params.items() if name != "weight" and not value.constant]
    problems += [
        Problem("this setting is one value for all tensors", value.mark, "give it plainly") for value in varying
    ]
    return problems


def _setting(step: Step, name: str, default: Any) -> Any:
    value = step.params.get(name)
    return default if value is None else value.rules[0].value


def _mark(step: Step, name: str) -> Any:
    value = step.params.get(name)
    return value.mark if value is not None else step.use_mark


def _placed(problem: Problem, step: Step) -> Problem:
    return problem if problem.mark is not None else replace(problem, mark=step.use_mark)


def _gaps(model: Source, lead: Source, used: Sequence[str], step: Step) -> list[Problem]:
    """Tensors that one model lacks or has in another shape."""
    there, wanted = model.table.nodes, lead.table.nodes
    lacking = [name for name in used if name not in there]
    other = [name for name in used if name in there and name in wanted and there[name].shape != wanted[name].shape]
    problems = []
    if lacking:
        hint = f"`{step.use}` needs checkpoints of one architecture"
        problems.append(Problem(f"`{model.name}` lacks tensors that move along: {listed(lacking)}", model.mark, hint))
    if other:
        hint = "only models of one width have units that match one to one"
        message = f"`{model.name}` and `{lead.name}` have different shapes: {listed(other)}"
        problems.append(Problem(message, model.mark, hint))
    return problems


def _file(path: str, spaces: Sequence[Space], step: Step) -> tuple[str | None, list[Problem]]:
    """The digest of a file of permutations, and why it does not fit."""
    from mergekit_lite.align.file import check_file

    try:
        return check_file(os.path.expanduser(path), spaces), []
    except MergeError as fault:
        mark = _mark(step, "from")
        return None, [replace(problem, mark=mark) for problem in fault.problems]


def _activations(source: Source, spaces: Sequence[Space]) -> list[Problem]:
    nodes = source.table.nodes
    lacking = [space.name for space in spaces if space.name not in nodes]
    if lacking:
        hint = "leave their kind out of `spaces`; `merge inspect MODEL --spaces` shows the names"
        return [Problem(f"`{source.name}` holds no activations of {listed(lacking)}", source.mark, hint)]
    wrong = [s.name for s in spaces if len(nodes[s.name].shape) != 2 or nodes[s.name].shape[1] % s.size]
    if wrong:
        hint = "activations of a space are a matrix (samples, units) under the space's name"
        return [
            Problem(f"`{source.name}` has other shapes than the model's spaces: {listed(wrong)}", source.mark, hint)
        ]
    return []

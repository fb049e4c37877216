"""Steps that put units in another order (`permute`, `reorder`, `merge_many`): which tensors move along, and what has to
be looked at first to find the order."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergekit_lite.errors import Mark, MergeError, Problem, RecipeError
from mergekit_lite.family.axes import spaces_of
from mergekit_lite.family.data import FamilyData, load_family
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
    nothing = replace(lead.table, nodes={})
    problems = _unfit(step, sources, named)
    if problems:
        return nothing, problems
    settings = {p.name: _setting(step, p.name, p.default) for p in method.params if not p.per_input}
    inverted = bool(settings.get("invert"))
    found = builder.orders.get(settings.get("from") or "")
    called = [builder.called.get(source.name, source.name) for source in sources]
    try:
        if found is None:
            alignment = replace(_alignment(step, settings, sources, named), labels=tuple(called))
        else:
            alignment, other = found
            inverted = inverted != other
            if len(alignment.labels) > 1:
                message = f"`{settings['from']}` holds an order for each of its {len(alignment.labels)} models"
                hint = f"take one of the files that it leaves: `permutations/{settings['from']}.1.safetensors`"
                return nothing, [Problem(message, _mark(step, "from"), hint)]
    except MergeError as fault:
        return nothing, [p if p.mark is not None else replace(p, mark=step.use_mark) for p in fault.problems]
    chosen = [space for space in alignment.spaces if space.kind in alignment.kinds]
    problems = [gap for model in _models(sources, named) for gap in _gaps(model, lead, used_tensors(chosen), step)]
    if problems:
        return nothing, problems
    if found is None:
        builder.alignments[step.name] = alignment
    builder.orders[step.name] = (alignment, inverted)
    tables = [
        _moved(builder, step.name, alignment, inverted, source.table, number) for number, source in enumerate(sources)
    ]
    return _mean(builder, step, method, sources, tables) if method.name == "merge_many" else (tables[0], [])


def _alignment(
    step: Step, settings: Mapping[str, Any], sources: Sequence[Source], named: Mapping[str, Source]
) -> Alignment:
    """The search that `step` asks for. Raises a MergeError where the model's family is not known or states no such
    spaces, or where what the settings name does not fit."""
    lead = sources[0].table
    kinds = settings["spaces"] if isinstance(settings["spaces"], tuple) else (settings["spaces"],)
    data = _family(settings["family"], step) if settings["family"] else None
    spaces = spaces_of(lead.config, {name: node.shape for name, node in lead.nodes.items()}, data)
    chosen = [space for space in spaces if space.kind in kinds]
    if not chosen:
        there = ", ".join(sorted({f"`{space.kind}`" for space in spaces}))
        problem = Problem("the model has none of these spaces", _mark(step, "spaces"), f"it has {there}")
        raise RecipeError(problem)
    given = [named[name] for name in ("like_activations", "activations") if name in named]
    problems = [problem for source in given for problem in _activations(source, chosen)]
    if problems:
        raise RecipeError(problems)
    path = settings.get("from")
    path = None if path is None else os.path.expanduser(path)
    used = used_tensors(chosen)
    return Alignment(
        name=step.name,
        use=step.use if path is None else "known",
        labels=tuple(source.name for source in sources),
        spaces=spaces,
        kinds=kinds,
        # Tensors that a model lacks are told of once the step is looked at as a whole.
        models=tuple({t: m.table.nodes[t] for t in used if t in m.table.nodes} for m in _models(sources, named)),
        activations=tuple({space.name: source.table.nodes[space.name] for space in chosen} for source in given),
        params=tuple(
            (key, settings[key])
            for key in ("cost", "max_sweeps", "seed", "order", "starts", "way")
            if settings.get(key) is not None
        )
        + (() if path is None else (("from", path),)),
        digest=None if path is None else _digest(path, chosen, step),
    )


def _family(path: str, step: Step) -> FamilyData:
    try:
        return load_family(os.path.expanduser(path))
    except MergeError as fault:
        raise RecipeError([p if p.mark else replace(p, mark=_mark(step, "family")) for p in fault.problems]) from None


def _models(sources: Sequence[Source], named: Mapping[str, Source]) -> list[Source]:
    """What is looked at: the model to resemble first, where there is one."""
    return [*([named["like"]] if "like" in named else []), *sources]


def used_tensors(spaces: Sequence[Space]) -> tuple[str, ...]:
    """Every tensor that some of these spaces move or compare, in order."""
    names = [use.tensor for space in spaces for use in space.uses]
    names += [name for space in spaces for group in space.renames for name in group]
    return tuple(dict.fromkeys(names))


def _moved(builder: Builder, step: str, alignment: Alignment, inverted: bool, table: Table, model: int) -> Table:
    """`table` with the tensors of model number `model` in their new order."""
    chosen = [space for space in alignment.spaces if space.kind in alignment.kinds]
    # What may come to stand under a tensor's name: itself, and what else an order of experts puts there.
    candidates: dict[str, tuple[str, ...]] = {name: (name,) for name in used_tensors(chosen)}
    for space in chosen:
        for names in space.renames:
            candidates.update(dict.fromkeys(names, names))
    nodes = dict(table.nodes)
    for name, among in candidates.items():
        place = (("tensor", name), ("among", among), ("model", model), ("invert", inverted))
        nodes[name] = builder.gather([table.nodes[one] for one in among], step, alignment.name, place)
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


def _unfit(step: Step, sources: Sequence[Source], named: Mapping[str, Source]) -> list[Problem]:
    problems: list[Problem] = []
    for source in [*sources, *named.values()]:
        codes = source.table.quantized
        if codes is not None:
            problems.append(Problem(f"`{source.name}` {codes.says}", source.mark, codes.hint))
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


def _mark(step: Step, name: str) -> Mark:
    value = step.params.get(name)
    return value.mark if value is not None else step.use_mark


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


def _digest(path: str, spaces: Sequence[Space], step: Step) -> str:
    """The digest of a file of permutations. Raises a MergeError where it does not fit."""
    from mergekit_lite.align.file import check_file

    try:
        return check_file(path, spaces)
    except MergeError as fault:
        raise RecipeError([replace(problem, mark=_mark(step, "from")) for problem in fault.problems]) from None


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

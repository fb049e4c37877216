"""`share`: some tensors of a merged model, the others of one task's; and what follows from it for several saves: files
that are one file on the disk."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergekit_lite.checkpoint.meta import MERGEABLE
from mergekit_lite.errors import Problem
from mergekit_lite.methods.spec import Method, span_of
from mergekit_lite.plan.graph import Builder, Table, Taken
from mergekit_lite.plan.model import Output, Plan
from mergekit_lite.plan.settings import constant
from mergekit_lite.plan.stack import EMBEDDING
from mergekit_lite.plan.steps import Faults, Source, listed
from mergekit_lite.plan.words import shape
from mergekit_lite.recipe.model import Recipe, Step
from mergekit_lite.recipe.value import glob_matches

_SHOWN = "`merge inspect --tensors` shows the names; `*` stands for any text, dots included"


def build_share(
    builder: Builder, step: Step, method: Method, shared: Source, own: Source
) -> tuple[Table, list[Problem]]:
    """The model `own` with those tensors of `shared` that the step names, and what is wrong with it."""
    table = own.table
    problems = [*_unfit(step, shared, own)]
    settings = constant(step, method)
    if problems or settings is None:
        return replace(table, nodes={}), problems
    names = list(dict.fromkeys([*table.nodes, *shared.table.nodes]))
    taken, problems = _named(step, settings, own, names)
    faults = Faults()
    nodes, dtypes, recast = dict(table.nodes), dict(table.dtypes), []
    for name in taken:
        fault = _fault(name, shared, own)
        if fault is not None:
            faults.add(fault[0], fault[1].mark, fault[2], name)
            continue
        nodes[name], dtypes[name] = shared.table.nodes[name], shared.table.dtypes[name]
        if dtypes[name] != table.dtypes[name]:
            recast.append(name)
    below = builder.taken.get(own.name, Taken({}))
    builder.taken[step.name] = Taken({**below.names, **dict.fromkeys(taken, shared.name)}, (*below.recast, *recast))
    return replace(table, nodes=nodes, dtypes=dtypes), [*problems, *faults.problems()]


def _unfit(step: Step, shared: Source, own: Source) -> Iterator[Problem]:
    for value in step.params.values():
        if not value.constant:
            yield Problem("this setting is one list for all tensors", value.mark, "give it plainly")
    for source in (shared, own):
        if source.table.quantized is not None:
            yield Problem(f"`{source.name}` {source.table.quantized.says}", source.mark, source.table.quantized.hint)
    if shared.table.space != own.table.space:
        message = f"`{shared.name}` is a {shared.table.space}, `{own.name}` is a {own.table.space}"
        yield Problem(message, shared.mark, "share tensors of whole models, or of deltas: `use: add` leads across")


def _named(
    step: Step, settings: Mapping[str, Any], own: Source, names: Sequence[str]
) -> tuple[list[str], list[Problem]]:
    """The tensors among `names` that `layers` and `tensors` mean, in their order, and entries that mean none."""
    family, problems = own.table.family, []
    found: set[str] = set()
    layers, globs = (_listed(settings[key]) for key in ("layers", "tensors"))
    at = {name: family.layer(name) for name in names} if layers else {}
    spans = [(item, span) for item in layers if (span := span_of(item)) is not None]
    mark = step.params["layers"].mark if layers else step.use_mark
    if spans and len(family.stacks) != 1:
        hint = 'name them under `tensors`, such as `"decoder.block.0.*"`: `merge inspect --tensors` shows the names'
        problems.append(Problem(f"`{own.name}` has not one stack of layers that numbers could mean", mark, hint))
        spans = []
    for item, (first, last) in spans:
        count = family.stacks[0].count
        if last >= count:
            message = f"`{own.name}` has layers 0 to {count - 1}, `layers` asks for {item}"
            problems.append(Problem(message, mark, "layers are counted from 0, and both ends of a range are included"))
        found |= {name for name, layer in at.items() if layer is not None and first <= layer.index <= last}
    for word in ("below", "above"):
        if word in layers:
            outside = {n for n in names if at[n] is None and (EMBEDDING.search(n) is not None) == (word == "below")}
            what = "embedding" if word == "below" else "tensor behind the layers"
            if not outside:
                problems.append(Problem(f"`{own.name}` has no {what}, which `{word}` means", mark, _SHOWN))
            found |= outside
    for glob in globs:
        matched = {name for name in names if glob_matches(glob, name)}
        if not matched:
            problems.append(Problem(f"`{glob}` matches no tensor", step.params["tensors"].mark, _SHOWN))
        found |= matched
    return [name for name in names if name in found], problems


def _listed(value: Any) -> tuple[Any, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)


def _fault(name: str, shared: Source, own: Source) -> tuple[str, Source, str] | None:
    """Why the tensor of `shared` cannot stand in `own`: a message, whose fault it is, a hint."""
    for source, other in ((shared, own), (own, shared)):
        if name not in source.table.nodes:
            hint = f"leave them to `{other.name}`: name fewer under `layers` and `tensors`"
            if other is shared:
                hint = f"configuration and names are those of `{own.name}`: name fewer under `layers` and `tensors`"
            return f"`{source.name}` lacks tensors of `{other.name}` that are to be shared", source, hint
    shapes = [source.table.nodes[name].shape for source in (shared, own)]
    if shapes[0] != shapes[1]:
        message = f"`{shared.name}` and `{own.name}` have different shapes ({shape(shapes[0])} and {shape(shapes[1])})"
        return message, shared, "what is shared has one shape in all models; leave such tensors to each of them"
    kinds = [source.table.dtypes[name] for source in (shared, own)]
    if kinds[0] != kinds[1] and not MERGEABLE.issuperset(kinds):
        message = f"`{shared.name}` stores as {kinds[0]} what `{own.name}` stores as {kinds[1]}"
        return message, shared, "are these checkpoints of one architecture?"
    return None


# What several saves share


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of the model or step `source` that the same saves share, by name."""

    source: str
    names: frozenset[str]


def groups_of(step: str, saved: Iterable[str], taken: Mapping[str, Taken]) -> list[Group]:
    """The tensors that go into files of their own where `step` is saved: those that it takes from elsewhere, apart from
    each other where not the same of the steps `saved` take them."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    everyone = sorted({name for name in saved if name in taken})
    for name, source in (taken[step].names if step in taken else {}).items():
        found.setdefault((source, tuple(s for s in everyone if taken[s].names.get(name) == source)), []).append(name)
    return [Group(source, frozenset(names)) for (source, _), names in found.items()]


def link(outputs: Sequence[Output]) -> list[Output]:
    """The outputs in which every shard whose bytes are bound to be those of an earlier one, because header and
    computation are the same, says so. Only shards of tensors that a `share` keeps apart are looked at."""
    first: dict[Any, tuple[int, int]] = {}
    made = []
    for o, output in enumerate(outputs):
        shards = []
        for s, shard in enumerate(output.shards):
            key = (shard.header, tuple((t.start, t.node.id) for t in shard.tensors))
            place = first.setdefault(key, (o, s)) if shard.apart else (o, s)
            shards.append(shard if place == (o, s) else replace(shard, same=place))
        made.append(replace(output, shards=tuple(shards)))
    return made


def what_to_say(
    recipe: Recipe,
    outputs: Sequence[Output],
    groups: Mapping[str, Sequence[Group]],
    taken: Mapping[str, Taken],
    alike: Container[int],
) -> Iterator[Problem]:
    """What deserves a warning: tensors that several outputs share and yet have in files of their own, and tensors that
    are shared in another dtype than the others of a model, but for the outputs of the numbers `alike`, whose saves give
    a dtype."""
    apart: dict[Group, list[Output]] = {}
    for number, output in enumerate(outputs):
        mark = recipe.steps[output.step].use_mark if output.step in recipe.steps else None
        for group in groups.get(output.step, ()):
            linked = (s for s in output.shards if s.same is not None and s.tensors[0].name in group.names)
            if not any(linked):
                apart.setdefault(group, []).append(output)
        recast = taken[output.step].recast if output.step in taken else ()
        if recast and number not in alike and output.step in groups:
            message = f"`{output.step}` stores what it shares in another dtype than its own tensors: {listed(recast)}"
            yield Problem(message, mark, "`dtype` in the save gives all tensors one")
    for group, having in apart.items():
        if len(having) > 1:
            places = ", ".join(f"`{output.to}`" for output in having)
            message = f"what {places} share of `{group.source}` is written for each of them"
            hint = "it is one file where their saves have one `dtype`, `quantize` and `shard`, and files may be divided"
            yield Problem(message, recipe.steps[having[0].step].use_mark, hint)


def spread(plan: Plan, told: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a run tells of tensors, by the number of the output and by name, also for outputs whose shards are further
    names of another's."""
    found = {number: dict(tensors) for number, tensors in told.items()}
    for number, output in enumerate(plan.outputs):
        for shard in output.shards:
            first = told.get(str(shard.same[0]), {}) if shard.same is not None else {}
            here = {tensor.name: first[tensor.name] for tensor in shard.tensors if tensor.name in first}
            if here:
                found.setdefault(str(number), {}).update(here)
    return found

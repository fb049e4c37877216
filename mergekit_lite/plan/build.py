"""Recipe and headers become a plan. Every fault is found here, before a weight is read or a byte written."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.meta import Checkpoint, TensorMeta
from mergekit_lite.checkpoint.quantized import refused
from mergekit_lite.errors import Problem, RecipeError
from mergekit_lite.family.family import Family, family_of
from mergekit_lite.methods.registry import all_methods
from mergekit_lite.methods.spec import Method
from mergekit_lite.plan.adapter import adapted
from mergekit_lite.plan.digest import plan_digest
from mergekit_lite.plan.graph import Builder, Table
from mergekit_lite.plan.lowrank import Ranks
from mergekit_lite.plan.masks import unmasked
from mergekit_lite.plan.mixture import build_mixture
from mergekit_lite.plan.model import Alignment, Node, Plan, StepView, Unit
from mergekit_lite.plan.order import BLOCK, bytes_read, input_bytes, make_units, walk
from mergekit_lite.plan.outputs import Adapters, make_outputs, saved_name
from mergekit_lite.plan.peak import peak_bytes, peak_of
from mergekit_lite.plan.settings import check_steps, constant, references_of, statistics
from mergekit_lite.plan.share import build_share
from mergekit_lite.plan.stack import build_stack
from mergekit_lite.plan.steps import Source, build_step, idle_globs
from mergekit_lite.plan.transplant import build_transplant, conflict, without_row
from mergekit_lite.plan.vocabulary import models_named, remap
from mergekit_lite.recipe.links import unused_steps
from mergekit_lite.recipe.model import Recipe, Ref, Step
from mergekit_lite.recipe.places import published
from mergekit_lite.recipe.value import Curve, Value


def build_plan(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    *,
    out: Path | None = None,
    threads: int = 1,
    block: int = BLOCK,
    check_output: bool = True,
    ranks: Mapping[int, Ranks] | None = None,
    measure: int | None = None,
    header: str | None = None,
) -> Plan:
    """The plan of `recipe` over `checkpoints` (by model name, all that the recipe's steps and saves mention).

    `out` replaces the output folder of the only save. `threads` and `block` (elements) change the memory at the peak,
    never the result. `ranks` gives, by the number of the save, those of the changes in adapters that are saved with
    `energy`; with `measure` the plan is to find those of this save, and nothing else. `header` stands in the shards'
    headers in place of the recipe. Raises RecipeError with every fault that was found.
    """
    problems = check_steps(recipe, all_methods())
    if problems:
        raise RecipeError(problems)
    with no_collection():
        return _build(recipe, checkpoints, out, threads, block, check_output, ranks or {}, measure, header)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Headers and plans are millions of small objects that all live on: looking through them for garbage takes a third
    of the time and finds none."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            if not gc.get_freeze_count():
                # Puts what was made with what is old, unseen: the next look at what is new would take it all in.
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def _build(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    out: Path | None,
    threads: int,
    block: int,
    check_output: bool,
    ranks: Mapping[int, Ranks],
    measure: int | None,
    header: str | None,
) -> Plan:
    methods = all_methods()
    problems: list[Problem] = []
    builder = Builder(recipe.seed, published(recipe))
    tied: list[tuple[TensorMeta, TensorMeta]] = []
    tables: dict[str, Table] = {}
    families: list[tuple[Checkpoint, Family]] = []
    for name, checkpoint in checkpoints.items():
        family = next((known for other, known in families if _alike(other, checkpoint)), None)
        if family is None:
            family = family_of(checkpoint.config, checkpoint.tensors, checkpoint.configs)
            families.append((checkpoint, family))
        table, pairs = model_table(builder, name, checkpoint, family)
        tied += pairs
        mark = recipe.models[name].mark
        tables[name], found_faults = adapted(builder, name, checkpoint, table, methods["add"], mark)
        tables[name] = unmasked(builder, name, checkpoint, tables[name])
        problems += found_faults
    views: list[StepView] = []
    warnings: list[Problem] = [*recipe.notes]
    warnings += [note for checkpoint in checkpoints.values() for note in checkpoint.notes]
    if problems and any(save.tokenizer is not None for save in recipe.saves):
        raise RecipeError(problems)
    # Its faults come alone: where tables keep their old rows, every step would find that shapes differ.
    steps = in_order(recipe, methods)
    clash = conflict(recipe, steps)
    if clash is not None:
        raise RecipeError(clash)
    vocabulary, notes = remap(builder, recipe, checkpoints, tables, merged_models(recipe))
    warnings += notes
    for step in steps:
        found = _step(builder, step, methods, tables, checkpoints, vocabulary is not None, problems)
        if found is not None:
            tables[step.name] = found
            views.append(_view(step, found))
            method = methods[step.use]
            warnings += [*_remarks(step, method), *idle_globs(step, method, found), *without_row(step, found)]
    warnings += builder.remarks
    adapters = Adapters(builder, recipe, tables, checkpoints, ranks, measure, problems, warnings, header)
    outputs = make_outputs(recipe, tables, checkpoints, out, check_output, vocabulary, problems, adapters)
    if problems:
        raise RecipeError(problems)
    for name in unused_steps(recipe):
        message = f"step `{name}` is used by nothing and will not run"
        warnings.append(Problem(message, recipe.steps[name].mark, "save it or remove it"))
    units = make_units(outputs)
    pools, alignments = _needed(units, builder)
    size = 8 if recipe.compute == "float64" else 4
    return Plan(
        recipe=recipe,
        checkpoints=checkpoints,
        steps=tuple(views),
        outputs=outputs,
        units=units,
        pools=pools,
        alignments=alignments,
        bytes_read=bytes_read(units, pools, alignments),
        bytes_input=input_bytes(units),
        bytes_written=sum(output.nbytes - output.linked for output in outputs),
        peak_bytes=peak_bytes(peak_of(units, pools, alignments, block, size), threads),
        digest=plan_digest(recipe, outputs, units, pools, alignments, checkpoints, builder.count),
        threads=threads,
        block=block,
        vocabulary=None if vocabulary is None else vocabulary.view,
        tied=tuple(tied),
        warnings=tuple(dict.fromkeys(warnings)),  # steps that one line makes may have the same to say
        ranks=ranks,
    )


def _needed(units: Sequence[Unit], builder: Builder) -> tuple[dict[str, tuple[Node, ...]], dict[str, Alignment]]:
    """The statistics over whole models that the outputs need, directly or for one another."""
    needed: set[str] = set()
    fresh = {node.pool for unit in units for node in unit.nodes if node.pool}
    while fresh:
        needed |= fresh
        looked_at = [node for name in fresh if name in builder.alignments for node in builder.alignments[name].nodes]
        fresh = {node.pool for node in walk(looked_at) if node.pool} - needed
    pools = {pool: tuple(members) for pool, members in builder.pools.items() if pool in needed}
    return pools, {name: found for name, found in builder.alignments.items() if name in needed}


def _alike(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether both are of one family, for sure: they have one configuration and the same names."""
    return (one.config, one.configs) == (other.config, other.configs) and list(one.tensors) == list(other.tensors)


def model_table(
    builder: Builder, name: str, checkpoint: Checkpoint, family: Family
) -> tuple[Table, list[tuple[TensorMeta, TensorMeta]]]:
    """A checkpoint as a table, and the tensors (alias, canonical) that it stores both of, while its configuration says
    they are one: of these only the canonical one takes part."""
    tensors = checkpoint.tensors
    tied = [(tensors[alias], tensors[to]) for alias, to in family.tied if alias in tensors and to in tensors]
    aliases = {alias.name for alias, _ in tied}
    metas = {key: meta for key, meta in tensors.items() if key not in aliases}
    configs = (checkpoint.config, *checkpoint.configs.values())
    table = Table(
        space="weight",
        nodes={key: builder.load(meta) for key, meta in metas.items()},
        dtypes={key: meta.saved for key, meta in metas.items()},
        donor=name,
        config=checkpoint.config,
        family=family,
        quantized=next(filter(None, (refused(c, checkpoint.folder) for c in configs)), None),
        form=checkpoint.form,
    )
    return table, tied


def in_order(recipe: Recipe, methods: Mapping[str, Method]) -> list[Step]:
    """The steps that lead to a save, inputs before users. The reader has made sure that there are no cycles."""
    ordered: dict[str, Step] = {}

    def visit(name: str) -> None:
        if name in recipe.steps and name not in ordered:
            for ref in references_of(recipe.steps[name], methods, recipe.steps):
                visit(ref.name)
            ordered[name] = recipe.steps[name]

    for save in recipe.saves:
        visit(saved_name(recipe, save))
        for ref in save.beside:
            visit(ref.name)
    return list(ordered.values())


def used_models(recipe: Recipe) -> list[str]:
    """The models that the saves need, in the order of the recipe."""
    named = {*merged_models(recipe), *models_named(recipe)}
    return [name for name in recipe.models if name in named]


def merged_models(recipe: Recipe) -> list[str]:
    """Those of them whose weights the steps read."""
    methods = all_methods()
    names = {ref.name for step in in_order(recipe, methods) for ref in references_of(step, methods, recipe.steps)}
    names |= {saved_name(recipe, save) for save in recipe.saves}
    names |= {ref.name for save in recipe.saves for ref in save.beside}
    return [name for name in recipe.models if name in names]


def _step(
    builder: Builder,
    step: Step,
    methods: Mapping[str, Method],
    tables: Mapping[str, Table],
    checkpoints: Mapping[str, Checkpoint],
    renumbered: bool,
    problems: list[Problem],
) -> Table | None:
    """The step's table; None where an input of it has failed, whose faults are known already. `renumbered` tells that
    the recipe has brought all models to one vocabulary."""
    if any(ref.name not in tables for ref in references_of(step, methods, tables)):
        return None
    method = methods[step.use]

    def source(ref: Ref) -> Source:
        return Source(ref.name, ref.mark, tables[ref.name])

    sources = [source(item.ref) for item in step.of]
    if method.reach == "vocabulary":
        (vocabulary,) = (source(ref) for ref in statistics(step, method))
        table, found = build_transplant(builder, step, sources[0], vocabulary, checkpoints)
    elif method.name == "moe":
        named = {ref.name: source(ref) for ref in [*statistics(step, method), *([step.base] if step.base else [])]}
        table, found = build_mixture(builder, step, method, sources, named, None if renumbered else checkpoints)
    elif method.name == "bang":
        from mergekit_lite.plan.balance import build_bang

        named = {ref.name: source(ref) for ref in statistics(step, method)}
        table, found = build_bang(builder, step, method, sources, named, methods["delta"], methods["add"])
    elif method.name == "share":
        table, found = build_share(builder, step, method, *sources)
    elif method.reach == "structure":
        others = [source(ref) if ref else None for ref in (step.rest, step.below, step.above)]
        table, found = build_stack(step, sources, *others)
    elif method.name == "merge_experts":
        from mergekit_lite.plan.experts import build_experts

        given = [source(ref) for ref in statistics(step, method)]
        table, found, remarks = build_experts(builder, step, method, sources[0], given[0] if given else None)
        builder.remarks += remarks
    elif method.name == "slice":
        from mergekit_lite.plan.slice import build_slice

        table, found = build_slice(builder, step, method, sources[0])
    elif method.name == "mix_widths":
        from mergekit_lite.plan.mix import build_mix

        table, found = build_mix(builder, step, method, sources)
    elif method.reach == "alignment":
        from mergekit_lite.plan.alignment import build_alignment

        refs = {p.name: r for p in method.params if p.kind == "reference" for r in statistics(step, method, p.name)}
        named = {name: source(ref) for name, ref in refs.items()}
        table, found = build_alignment(builder, step, method, sources, named)
    else:
        base = source(step.base) if step.base else None
        further = [source(ref) for ref in statistics(step, method)]
        table, found = build_step(builder, step, method, sources, base, further, methods["delta"], methods["add"])
    problems += found
    return None if found else table


def _remarks(step: Step, method: Method) -> list[Problem]:
    """Warnings about settings that are the same for all tensors."""
    params = constant(step, method)
    text = method.remark(params, len(step.of)) if method.remark and params is not None else None
    return [Problem(text, step.use_mark)] if text else []


def _view(step: Step, table: Table) -> StepView:
    shown = {name: _shown(value) for name, value in step.params.items()}
    inputs = tuple(item.ref.name for item in step.of)
    extra = tuple(ref.name for ref in (step.base, step.rest, step.below, step.above) if ref)
    base = step.base.name if step.base else None
    rows = table.adopted.rows if table.adopted is not None and step.use == "transplant" else {}
    return StepView(step.name, step.use, inputs, base, table.space, len(table.nodes), shown, (*inputs, *extra), rows)


def _shown(value: Value) -> str:
    def one(part: Any) -> str:
        if isinstance(part, Curve):
            return f"across {list(part.points)}"
        return str(part).lower() if isinstance(part, bool) else str(part)

    if len(value.rules) == 1 and value.rules[0].glob is None:
        return one(value.rules[0].value)
    return ", ".join(f"{rule.glob or 'else'}: {one(rule.value)}" for rule in value.rules)

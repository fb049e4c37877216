"""`merge inspect`: what a checkpoint is and what numbers it holds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_lite.cli import bar, options, show
from mergekit_lite.cli.confine import check_inside
from mergekit_lite.errors import UsageError

if TYPE_CHECKING:
    from mergekit_lite.checkpoint.meta import Checkpoint
    from mergekit_lite.family.spaces import Space
    from mergekit_lite.report.look import Look
    from mergekit_lite.report.stats import Stats
    from mergekit_lite.report.store import StoreLook

STATS = ("nan", "+inf", "-inf", "zeros", "min", "max", "mean", "std")
SHOWN = 8  # shards that are listed before they are only counted


def inspect(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A folder, a file or a Hub id.", show_default=False)
    ],
    stats: Annotated[
        bool, typer.Option("--stats", help="Read all weights and count NaN, infinities, zeros; give range, mean, std.")
    ] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    spaces: Annotated[
        bool, typer.Option("--spaces", help="List what may be permuted: hidden units, heads, experts, residual stream.")
    ] = False,
    quantisability: Annotated[
        bool,
        typer.Option(
            "--quantisability", help="Read all weights and measure what rounding them to 2, 4 and 8 bits would lose."
        ),
    ] = False,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="PARENT",
            help="With --quantisability: tell where the model loses more than this one; may be repeated.",
            show_default=False,
        ),
    ] = None,
    family: options.Family = None,
    fetch: options.Fetch = options.Source.cache,
    offline: options.Offline = False,
    allow_pickle: options.AllowPickle = False,
    threads: options.Threads = None,
    sandbox: options.Sandbox = None,
    json: options.Json = False,
) -> None:
    """Show what a checkpoint holds: family, layers, sizes, dtypes, tied tensors.

    Reads headers and config.json only, unless --stats is given: of models on the Hub too, which --stats downloads, or
    with `--fetch stream` reads in parts. Statistics are those of the finite numbers, in float64;
    std is that of the whole population. Of a LoRA adapter it shows what it changes, and how much. Spaces follow from
    the model type in config.json, or from a family file.

    --quantisability takes the tensors of two or more axes. Their error is mse / var after rounding to integers, half to
    even, and back: with one scale for a tensor or for each channel (a row along the first axis), symmetric about 0 or
    between the least and the largest number. Skewness is 0 and kurtosis 3 of a normal distribution, 1.8 of a uniform
    one. With --against a tensor is named whose error at 4 bits exceeds that of its worst parent.
    """
    from mergekit_lite import merge
    from mergekit_lite.checkpoint.find import AdapterFound
    from mergekit_lite.report.look import look, open_location
    from mergekit_lite.report.store import look_at_store

    parents = against or []
    if parents and not quantisability:
        raise UsageError("`--against` names what `--quantisability` compares with", hint="add `--quantisability`")
    check_inside([checkpoint, *parents], family)
    stream = fetch is options.Source.stream
    try:
        opened = open_location(checkpoint, offline, allow_pickle, not (stats or quantisability) or stream)
    except AdapterFound:
        if quantisability:
            hint = "fold it into its base by a recipe, and inspect the result"
            raise UsageError("an adapter has no weights that are rounded by themselves", hint=hint) from None
        if spaces or family:
            raise UsageError("an adapter has no spaces", hint="inspect the model that it was made for") from None
        _adapter(checkpoint, offline, tensors, json)
        return
    seen = look(opened)
    free = _spaces(opened, family) if spaces or family else None
    found = _measure(opened, threads or merge.default_threads()) if stats else None
    rounded = None
    if quantisability:
        from mergekit_lite.cli import quantisability as rounding

        others = [open_location(parent, offline, allow_pickle, stream) for parent in parents]
        rounded = rounding.measure(opened, others, threads or merge.default_threads())
    store = look_at_store(opened, masks=stats)
    if json:
        made = _as_json(opened, seen, tensors, found)
        if store is not None:
            made["masks"] = store.as_json()
        if free is not None:
            from mergekit_lite.report.spaces import as_json

            made["spaces"] = as_json(free)
        if rounded is not None:
            made["quantisability"] = rounding.as_json(rounded)
        show.json(made)
    else:
        for name, text in (*_summary(seen), *(_store(store) if store is not None else ())):
            show.line(f"{name:<14}{text}")
        if free is not None:
            show.line()
            _space_table(free)
        if tensors or found is not None:
            show.line()
            _table(opened, tensors, found)
        if rounded is not None:
            show.line()
            rounding.tell(rounded)
    show.warnings(seen.notes)


def _store(store: StoreLook) -> Iterator[tuple[str, str]]:
    """What a mask store keeps beside its base."""

    def share(nbytes: int) -> str:
        return f"{show.size(nbytes)}, {nbytes / store.apart:.1%} of {show.count(len(store.tasks), 'model')} apart"

    yield (
        "mask store",
        ", ".join(
            task if store.density is None else f"{task} ({store.density[task]:.1%} of the entries)"
            for task in store.tasks
        ),
    )
    yield "all of it", share(store.nbytes) + (" · masks coded with zstd" if store.compressed else "")
    if store.census is not None and store.coded is not None:
        nothing, one, several = store.census
        yield "by entropy", share(store.coded)  # of each task by itself
        yield "used", f"by no task {nothing:.1%} · by one alone {one:.1%} · by several {several:.1%}"


def _adapter(location: str, offline: bool, tensors: bool, json: bool) -> None:
    """What an adapter changes, in place of a checkpoint's family and layers."""
    from mergekit_lite.report.adapter import adapter_at, look_at, tensors_of

    opened = adapter_at(location, offline)
    seen = look_at(opened)
    metas = list(tensors_of(opened))
    if json:
        listed = [{"name": m.name, "shape": m.shape, "dtype": m.stored, "bytes": m.nbytes} for m in metas]
        show.json(seen.as_json() | ({"list": listed} if tensors else {}))
        return
    modules = ", ".join(f"{count} {name}" for name, count in seen.modules.items())
    rows = [
        ("adapter", seen.location + (f" at {seen.revision}" if seen.revision else "")),
        ("kind", f"{seen.kind} · {show.count(sum(seen.modules.values()), 'module')}"),
        ("made for", seen.base or ""),
        ("modules", modules),
        ("rank", ", ".join(map(str, seen.ranks))),
        ("scale", ", ".join(f"{scale:g}" for scale in seen.scales)),
        ("whole", ", ".join(seen.whole)),
        ("tensors", f"{seen.tensors:,}"),
        ("parameters", f"{seen.parameters:,}"),
        ("size", show.size(seen.bytes)),
    ]
    for name, text in rows:
        if text:
            show.line(f"{name:<14}{text}")
    if tensors:
        show.line()
        columns = ["tensor", "shape", "dtype", "bytes"]
        show.table(columns, [[m.name, show.shape(m.shape), m.stored, f"{m.nbytes:,}"] for m in metas], right=["bytes"])


def _spaces(opened: Checkpoint, family: str | None) -> Sequence[Space]:
    from mergekit_lite.family.axes import spaces_of
    from mergekit_lite.family.data import load_family

    shapes = {name: meta.shape for name, meta in opened.tensors.items()}
    return spaces_of(opened.config, shapes, load_family(os.path.expanduser(family)) if family else None)


def _space_table(spaces: Sequence[Space]) -> None:
    """A row for all spaces that differ in a number alone, such as that of their layer."""
    from mergekit_lite.report.spaces import rows_of

    columns = ["space", "kind", "spaces", "units", "group", "axes", "along"]
    rows = [
        [row.name, row.kind, f"{row.spaces:,}", f"{row.units:,}", f"{row.group:,}", f"{row.axes:,}", row.along]
        for row in rows_of(spaces)
    ]
    show.table(columns, rows, right=["spaces", "units", "group", "axes"])


def _measure(opened: Checkpoint, threads: int) -> dict[str, Stats | None]:
    from mergekit_lite.report.stats import measure, over

    with bar.reading("read", sum(meta.nbytes for meta in opened.tensors.values())) as advance:
        return {meta.name: stats for meta, stats in over(opened, measure, threads, advance)}


def _summary(seen: Look) -> Iterator[tuple[str, str]]:
    """The lines at the top, those that say something."""
    yield "checkpoint", seen.location + (f" at {seen.revision}" if seen.revision else "")
    kinds = [f"model type {seen.model_type}"] if seen.model_type else []
    yield "family", " · ".join([seen.family, *kinds, *seen.architectures])
    for stack in seen.stacks:
        other = f" ({stack.key} states {stack.stated})" if stack.stated not in (None, stack.layers) else ""
        yield "layers", f"{stack.layers} in {stack.name}{other}"
    yield "tensors", f"{seen.tensors:,}"
    yield "parameters", f"{seen.parameters:,}" + (f" and {seen.others:,} integers or booleans" if seen.others else "")
    yield "size", f"{show.size(seen.bytes)} in {show.count(len(seen.shards), 'file')}"
    for dtype in seen.dtypes:
        yield "dtype", f"{dtype.dtype} · {show.count(dtype.tensors, 'tensor')} · {show.size(dtype.bytes)}"
    for shard in seen.shards[:SHOWN]:
        yield "shard", f"{shard.file} · {show.count(shard.tensors, 'tensor')} · {show.size(shard.bytes)}"
    if len(seen.shards) > SHOWN:
        yield "", f"and {len(seen.shards) - SHOWN} more"
    for tie in seen.tied:
        yield "tied", f"{tie.alias} = {tie.canonical} · stored: {', '.join(tie.stored) or 'neither'}"
    for name, number in (("vocabulary", seen.vocabulary), ("hidden size", seen.hidden), ("experts", seen.experts)):
        if number is not None:
            yield name, f"{number:,}"
    if seen.beside:
        yield "beside", ", ".join(seen.beside)


def _table(opened: Checkpoint, tensors: bool, found: Mapping[str, Stats | None] | None) -> None:
    columns = ["tensor", "shape", "dtype"]
    columns += ["bytes", "shard"] if tensors else []
    columns += STATS if found is not None else []
    rows = []
    files = {shard.path: shard.name for shard in opened.shards}
    for meta in opened.tensors.values():
        row = [meta.name, show.shape(meta.shape), meta.stored]
        row += [f"{meta.nbytes:,}", files[meta.file]] if tensors else []
        row += _cells(found[meta.name]) if found is not None else []
        rows.append(row)
    if found is not None:
        from mergekit_lite.report.stats import total

        row = ["all floating", "", ""] + (["", ""] if tensors else [])
        rows.append(row + _cells(total((opened.tensors[name], stats) for name, stats in found.items())))
    show.table(columns, rows, right=["bytes", *STATS])


def _cells(stats: Stats | None) -> list[str]:
    if stats is None:
        return ["-"] * len(STATS)
    counts = (stats.nan, stats.positive_infinity, stats.negative_infinity, stats.zeros)
    numbers = (stats.min, stats.max, stats.mean, stats.std)
    return [f"{n:,}" for n in counts] + ([f"{x:.4g}" for x in numbers] if stats.finite else ["-"] * len(numbers))


def _as_json(
    opened: Checkpoint, seen: Look, tensors: bool, found: Mapping[str, Stats | None] | None
) -> dict[str, object]:
    """The look; with `--tensors` or `--stats` `list` has an entry for every tensor, with `--stats` `total` the sum."""
    made = seen.as_json()
    if tensors or found is not None:
        entries: list[dict[str, object]] = []
        files = {shard.path: shard.name for shard in opened.shards}
        for meta in opened.tensors.values():
            entry: dict[str, object] = {"name": meta.name, "shape": meta.shape, "dtype": meta.stored}
            entry |= {"bytes": meta.nbytes, "shard": files[meta.file]}
            if found is not None:
                stats = found[meta.name]
                entry["stats"] = None if stats is None else stats.as_json()
            entries.append(entry)
        made["list"] = entries
    if found is not None:
        from mergekit_lite.report.stats import total

        made["total"] = total((opened.tensors[name], stats) for name, stats in found.items()).as_json()
    return made

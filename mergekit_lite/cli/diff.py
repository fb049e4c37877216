"""`merge diff`: how two checkpoints differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergekit_lite.cli import bar, options, show
from mergekit_lite.cli.confine import check_inside
from mergekit_lite.errors import UsageError

if TYPE_CHECKING:
    from mergekit_lite.checkpoint.meta import Checkpoint
    from mergekit_lite.report.diff import Comparison, Gap, TensorDiff

ROWS = 30  # tensors that are shown where `--limit` does not say
KEYS = 30  # keys of config.json that are shown
WORDS = {
    "same": "same",
    "differs": "differ",
    "dtype": "in another dtype",
    "shape": "of another shape",
    "only_a": "only in A",
    "only_b": "only in B",
}


class Order(str, Enum):
    """What stands first."""

    max = "max"
    rel = "rel"
    name = "name"


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[C]...", help="Further ones, with --base.", show_default=False)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="Compare what all have changed in this one: cosine, signs, entries; by layer and tensor.",
            show_default=False,
        ),
    ] = None,
    gradients: Annotated[
        list[Path] | None,
        typer.Option(
            "--gradients",
            metavar="FILE",
            help="With --base: a task's gradient, of `merge stats`; once for every model.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show tensors that are the same, too.")] = False,
    sort: Annotated[
        Order | None,
        typer.Option(
            "--sort",
            help="By the largest |a-b|, which is the default, by ||a-b|| / ||a||, or by name.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", metavar="N", min=0, help=f"Tensors to show, 0 for all; {ROWS} if left out.", show_default=False
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", metavar="X", min=0.0, help="The largest |a-b| that counts as equal.")
    ] = 0.0,
    directions: Annotated[
        bool,
        typer.Option("--directions", help="Compare singular directions too, which decomposes every matrix."),
    ] = False,
    split: Annotated[
        float | None,
        typer.Option(
            "--split",
            metavar="X",
            min=-1.0,
            max=1.0,
            help="With --base, name the layers whose cosine is at least X, as `use: share` takes them.",
            show_default=False,
        ),
    ] = None,
    fetch: options.Fetch = options.Source.cache,
    offline: options.Offline = False,
    threads: options.Threads = None,
    sandbox: options.Sandbox = None,
    json: options.Json = False,
) -> None:
    """Compare two checkpoints, tensor by tensor. Leaves with 0 where they are equal, with 1 where not.

    Equal are the same bits, or with --tolerance numbers as near as that, whatever the dtype. Differences of config.json
    count too, save for what transformers notes about itself. The checkpoints may be sharded differently. With
    --directions `rho` is 1 where all singular directions agree and near 0 where they have nothing in common, `leading`
    the same of the largest ones: what a matching of units raises (arXiv 2402.04051).

    With --base two or more models are compared by their task vectors, model minus base. `cosine` is the mean over all
    pairs of models: layers where it is low are better kept apart than merged, and --split lists the others. `conflict`
    is the share of the entries that several models change in which their signs differ, `overlap` the mean over pairs of
    |A and B| / |A or B| of the entries that they change. --gradients adds the cosine of the gradients of their tasks'
    losses at the model that they would share, which `merge stats MERGED --collect gradient` writes; --split then goes
    by that. That is a measure and no verdict: it leaves with 0.
    """
    from mergekit_lite import merge
    from mergekit_lite.report.diff import diff as compare
    from mergekit_lite.report.look import open_location

    models = [a, b, *(more or ())]
    check_inside([*models, *([base] if base is not None else [])], None, *(gradients or ()))
    if gradients and (base is None or len(gradients) != len(models)):
        hint = "`merge diff A B --base BASE --gradients A_GRADIENT --gradients B_GRADIENT`"
        raise UsageError("`--gradients` goes with `--base`, once for every model, in their order", hint=hint)
    if base is not None:
        from mergekit_lite.cli.task_vectors import compare_task_vectors

        if everything or directions or tolerance or sort is not None:
            hint = "leave out `--all`, `--sort`, `--tolerance` and `--directions`: all tensors are measured, in order"
            raise UsageError("`--base` compares task vectors, which have no such setting", hint=hint)
        opening = {"offline": offline, "stream": fetch is options.Source.stream}
        shown = ROWS if limit is None else limit
        rows = threads or merge.default_threads()
        compare_task_vectors(base, models, opening, rows, shown, json, gradients or (), split)
        return
    if split is not None:
        raise UsageError(
            "`--split` goes by the cosines of task vectors", hint="name what was fine-tuned: `--base BASE`"
        )
    if more:
        hint = "name what they were all made from: `merge diff A B C --base BASE`"
        raise UsageError(f"without `--base` two checkpoints are compared, not {len(models)}", hint=hint)
    stream = fetch is options.Source.stream
    left, right = (open_location(side, offline, stream=stream) for side in (a, b))
    with bar.reading("compare", sum(meta.nbytes for meta in left.tensors.values())) as advance:
        found = compare(left, right, tolerance=tolerance, threads=threads or merge.default_threads(), advance=advance)
    ranked = found.ranked((sort or Order.max).value, everything)
    turned = _directions(left, right, threads or merge.default_threads()) if directions else {}
    if json:
        entries = [t.as_json() for t in ranked[: limit or None]]
        if directions:
            entries = [entry | {"directions": turned.get(str(entry["name"]))} for entry in entries]
        show.json({**found.as_json(), "tensors": entries})
    else:
        _show(found, ranked, ROWS if limit is None else limit, turned)
    show.warnings([*left.notes, *right.notes])
    for side in found.lacks_config:
        show.note(f"`{side}` has no config.json: only the weights are compared")
    if not found.equal:
        raise typer.Exit(1)


def _directions(a: Checkpoint, b: Checkpoint, threads: int) -> dict[str, dict[str, Any]]:
    """The figures of the singular directions by tensor, as plain data."""
    from mergekit_lite.report.directions import directions

    with bar.reading("decompose", sum(meta.nbytes for meta in a.tensors.values())) as advance:
        return {
            name: {"rho": found.rho, "leading": found.leading, "k": found.k}
            for name, found in directions(a, b, threads=threads, advance=advance)
        }


def _show(found: Comparison, ranked: Sequence[TensorDiff], limit: int, turned: Mapping[str, Mapping[str, Any]]) -> None:
    chosen = ranked[: limit or None]
    if chosen:
        columns = ["tensor", "what", "max |a-b|", "relative", "cosine", "differing"]
        rows = [_row(tensor) for tensor in chosen]
        if turned:
            columns += ["rho", "leading"]
            rows = [row + _turned(turned.get(t.name)) for row, t in zip(rows, chosen, strict=True)]
        show.table(columns, rows, right=columns[2:])
        if len(chosen) < len(ranked):
            show.note(f"{len(ranked) - len(chosen):,} more: `--limit 0` shows all")
        show.line()
    if found.config:
        rows = [[entry.key, entry.a or "-", entry.b or "-"] for entry in found.config[:KEYS]]
        show.table(["config.json", "A", "B"], rows)
        if len(found.config) > KEYS:
            show.note(f"{len(found.config) - KEYS:,} more: `--json` gives all")
        show.line()
    show.line(_summary(found))


def _row(tensor: TensorDiff) -> list[str]:
    numbers = _numbers(tensor.gap, tensor.a.numel if tensor.a is not None else 0)
    return [tensor.name, _what(tensor), *numbers]


def _turned(figures: Mapping[str, Any] | None) -> list[str]:
    shown = [figures[key] if figures else None for key in ("rho", "leading")]
    return ["-" if value is None else f"{value:.3f}" for value in shown]


def _what(tensor: TensorDiff) -> str:
    a, b = tensor.a, tensor.b
    if a is not None and b is not None and tensor.state == "shape":
        return f"shape {show.shape(a.shape)} | {show.shape(b.shape)}"
    if a is not None and b is not None and tensor.state == "dtype":
        return f"dtype {a.dtype} | {b.dtype}"
    return "differs" if tensor.state == "differs" else WORDS[tensor.state]


def _numbers(gap: Gap | None, numel: int) -> list[str]:
    if gap is None:
        return ["-"] * 4
    differing = f"{gap.differing:,}/{numel:,}" + (f" ({gap.undefined:,} NaN or inf)" if gap.undefined else "")
    return [f"{gap.max_abs:.4g}", f"{gap.relative:.4g}", f"{gap.cosine:.6f}", differing]


def _summary(found: Comparison) -> str:
    """`equal · 291 tensors · 291 same`."""
    parts = ["equal" if found.equal else "not equal", show.count(len(found.tensors), "tensor")]
    parts += [f"{number:,} {WORDS[state]}" for state, number in found.counts.items()]
    if found.tolerance and set(found.counts) != {"same"}:
        within = sum(tensor.state != "same" and tensor.within(found.tolerance) for tensor in found.tensors)
        parts.append(f"{within:,} of them within {found.tolerance:g}")
    if found.config:
        parts.append(f"{show.count(len(found.config), 'key')} of config.json")
    return " · ".join(parts)

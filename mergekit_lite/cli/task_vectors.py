"""`merge diff --base`: what several models have changed in one base, as tables or JSON."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lite.cli import bar, show

if TYPE_CHECKING:
    from mergekit_lite.checkpoint.meta import Checkpoint
    from mergekit_lite.report.gradients import Gradients
    from mergekit_lite.report.split import Split
    from mergekit_lite.report.task_vectors import Overlap, TaskVectors

FIGURES = ("cosine", "conflict", "overlap")
LEFT = 5  # tensors without figures that are named


def compare_task_vectors(
    base: str,
    models: Sequence[str],
    opening: Mapping[str, bool],
    threads: int,
    limit: int,
    json: bool,
    gradients: Sequence[Path] = (),
    threshold: float | None = None,
) -> None:
    """Compare the task vectors of `models` and print what is found. `opening` is how checkpoints are opened, `limit`
    how many tensors are shown, 0 for all; `gradients` are files of the tasks' gradients. With a `threshold` it is told
    which layers have a cosine as high as that, of the gradients where they are given. Raises InputError."""
    from mergekit_lite.report.look import open_location
    from mergekit_lite.report.split import split
    from mergekit_lite.report.task_vectors import task_vectors

    start, *others = (open_location(location, **opening) for location in (base, *models))
    slopes = _opened(start, others, gradients)
    with bar.reading("compare", sum(meta.nbytes for meta in start.tensors.values())) as advance:
        found = task_vectors(start, others, threads=threads, advance=advance)
    pulls = _pulls(start, others, slopes, threads)
    cosines = found.layers if pulls is None else pulls.layers
    scores = {name: one.cosine for name, one in cosines.items()}
    divided = None if threshold is None else split(start, others, scores, threshold)
    if json:
        more = {"gradients": pulls.as_json()} if pulls is not None else {}
        show.json(found.as_json() | more | ({} if divided is None else {"split": divided.as_json()}))
    else:
        _show(found, limit, pulls)
        for text in () if divided is None else _divided(divided):
            show.line(text)
    show.warnings([note for checkpoint in (start, *others) for note in checkpoint.notes])
    for text in _remarks(found, pulls):
        show.note(text)


def _opened(start: Checkpoint, others: Sequence[Checkpoint], files: Sequence[Path]) -> list[Checkpoint]:
    """The files of gradients, looked at before any weight is read."""
    from mergekit_lite.report.gradients import check_gradients
    from mergekit_lite.report.look import open_location

    slopes = [open_location(str(file), offline=True) for file in files]
    if slopes:
        check_gradients(start, others, slopes)
    return slopes


def _pulls(
    start: Checkpoint, others: Sequence[Checkpoint], slopes: Sequence[Checkpoint], threads: int
) -> Gradients | None:
    if not slopes:
        return None
    from mergekit_lite.report.gradients import gradients

    with bar.reading("compare gradients", sum(meta.nbytes for meta in slopes[0].tensors.values())) as advance:
        return gradients(start, others, slopes, threads=threads, advance=advance)


def _show(found: TaskVectors, limit: int, pulls: Gradients | None) -> None:
    figures = FIGURES if pulls is None else (*FIGURES, "gradients")

    def pulled(one: Overlap | None) -> list[str]:
        return [] if pulls is None else [_cell(one.cosine if one is not None else None)]

    tensors = list(found.tensors.items())
    rows = [
        [name, f"{one.count:,}", *_cells(one), *pulled(pulls.tensors.get(name) if pulls else None)]
        for name, one in tensors[: limit or None]
    ]
    show.table(["tensor", "numbers", *figures], rows, right=["numbers", *figures])
    if len(rows) < len(tensors):
        show.note(f"{len(tensors) - len(rows):,} more: `--limit 0` shows all")
    show.line()
    rows = [
        [
            name,
            f"{found.members[name]:,}",
            f"{one.count:,}",
            *_cells(one),
            *pulled(pulls.layers.get(name) if pulls else None),
        ]
        for name, one in found.layers.items()
    ]
    show.table(["layer", "tensors", "numbers", *figures], rows, right=["tensors", "numbers", *figures])
    show.line()
    names = _short(found.models)
    if len(names) > 2:
        whole = found.whole
        rows = [
            [
                names[i],
                names[j],
                *map(_cell, (whole.pair_cosine(i, j), whole.pair_conflict(i, j), whole.pair_overlap(i, j))),
                *([_cell(pulls.whole.pair_cosine(i, j))] if pulls is not None else []),
            ]
            for i, j in whole.pairs
        ]
        show.table(["model", "and", *figures], rows, right=figures)
        show.line()
    parts = [show.count(len(found.tensors), "tensor"), show.count(len(names), "model")]
    parts += [f"{name} {cell}" for name, cell in zip(FIGURES, _cells(found.whole), strict=True)]
    parts += [f"gradients {cell}" for cell in pulled(pulls.whole if pulls else None)]
    show.line(" · ".join(parts))


def _divided(found: Split) -> list[str]:
    """What a step `use: share` may take from a merged model, and what each model keeps."""
    kept = f"own, as their cosine is below {found.threshold:g} or not known: {', '.join(found.own)}"
    if not found.settings:
        return [f"nothing to share: no layer has a cosine of {found.threshold:g} or more"]
    head = f"to share, as their cosine is at least {found.threshold:g} or nothing is changed twice (`use: share`):"
    return [head, *(f"  {line}" for line in found.text), *([kept] if found.own else [])]


def _cells(one: Overlap) -> list[str]:
    return [_cell(value) for value in (one.cosine, one.conflict, one.overlap)]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _short(locations: Sequence[str]) -> Sequence[str]:
    """The last parts of the locations where these tell them apart."""
    names = [os.path.basename(location.rstrip("/")) for location in locations]
    return names if len(set(names)) == len(names) else locations


def _remarks(found: TaskVectors, pulls: Gradients | None) -> Iterator[str]:
    """What takes no part, and what is not finite."""
    if found.left:
        named = [f"`{name}` {why}" for name, why in list(found.left.items())[:LEFT]]
        more = f"; and {len(found.left) - LEFT:,} more, which `--json` names" if len(found.left) > LEFT else ""
        yield f"{show.count(len(found.left), 'tensor')} not compared: {'; '.join(named)}{more}"
    if found.whole.undefined:
        places = show.count(found.whole.undefined, "number")
        yield f"{places} left out, where a model or the base is NaN or infinite: `merge inspect --stats` counts them"
    if pulls is not None and pulls.whole.undefined:
        yield f"{show.count(pulls.whole.undefined, 'number')} of gradients left out, where one is NaN or infinite"

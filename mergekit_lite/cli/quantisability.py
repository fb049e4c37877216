"""`merge inspect --quantisability`: how well weights bear rounding to few bits, as tables or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_lite.cli import bar, show

if TYPE_CHECKING:
    from mergekit_lite.checkpoint.meta import Checkpoint
    from mergekit_lite.report.quantisability import Way, Weight


def measure(model: Checkpoint, parents: Sequence[Checkpoint], threads: int) -> list[Weight]:
    """The figures of a model's weights and of its parents'. Raises InputError."""
    from mergekit_lite.report.quantisability import quantisability

    total = sum(meta.nbytes for checkpoint in (model, *parents) for meta in checkpoint.tensors.values())
    with bar.reading("measure", total) as advance:
        return quantisability(model, parents, threads=threads, advance=advance)


def as_json(weights: Sequence[Weight]) -> dict[str, object]:
    """All figures; `worse` counts the tensors that lose more at 4 bits than those of any parent."""
    from mergekit_lite.report.quantisability import together

    known = [weight.shape for weight in weights if weight.shape is not None]
    whole = together(known).as_json()
    made: dict[str, object] = {"error": whole["error"], "tensors": [weight.as_json() for weight in weights]}
    if any(weight.parents for weight in weights):
        made["worse"] = sum(bool(weight.worse) for weight in weights)
    return made


def tell(weights: Sequence[Weight]) -> None:
    """A row for each tensor, one for each way of rounding, and what is worse than in the parents."""
    from mergekit_lite.report.quantisability import BITS, FLAGGED, GRANULARITIES, RANGES, together

    against = any(weight.parents for weight in weights)
    ways = [(FLAGGED, granularity, kind) for granularity in GRANULARITIES for kind in RANGES]
    columns = ["tensor", "skewness", "kurtosis", *(_label(way) for way in ways)]
    rows = []
    for weight in weights:
        shape = weight.shape
        row = [weight.meta.name]
        row += [_number(shape.skewness), _number(shape.kurtosis)] if shape is not None else ["NaN or inf", "-"]
        row += [_number(shape.error(way)) if shape is not None else "-" for way in ways]
        if against:
            worse = "all" if len(weight.worse) == len(ways) else ", ".join(map(_label, weight.worse))
            row.append(worse or ("-" if weight.parents else "no parent has it"))
        rows.append(row)
    show.table(columns + (["worse than parents"] if against else []), rows, right=columns[1:])
    show.line()
    whole = together(weight.shape for weight in weights if weight.shape is not None)
    rows = [
        [f"{granularity} {kind}", *(_number(whole.error((number, granularity, kind))) for number in BITS)]
        for granularity in GRANULARITIES
        for kind in RANGES
    ]
    heads = [f"{number} bits" for number in BITS]
    show.table(["all, mse / var", *heads], rows, right=heads)
    if against:
        count = sum(bool(weight.worse) for weight in weights)
        show.line()
        show.line(f"{count:,} of {show.count(len(weights), 'tensor')} lose more at {FLAGGED} bits than in any parent")


def _label(way: Way) -> str:
    bits, granularity, kind = way
    return f"{bits} {granularity} {kind[:-6]}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"

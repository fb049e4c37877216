"""`merge search` where weights or permutations are learned from data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lite.cli import bar, show

if TYPE_CHECKING:
    from mergekit_lite.evaluate.learn import Learned
    from mergekit_lite.evaluate.order import LearnedOrder
    from mergekit_lite.evaluate.template import Template

SHOWN = 40  # rows of weights


def learn(
    template: Template,
    folder: Path,
    text: Path | None,
    data: Path | None,
    block: int | None,
    lines: bool,
    examples: int | None,
    device: str,
    threads: int | None,
    offline: bool,
    allow_pickle: bool,
    json: bool,
) -> None:
    """Learn what `template` leaves open, tell of it and write it into `folder`."""
    from mergekit_lite import choose, merge
    from mergekit_lite.calibrate.measure import Settings, check_given
    from mergekit_lite.evaluate.search import BEST
    from mergekit_lite.recipe.learned import Learning, LearningOrder

    settings = Settings(
        kinds=(),
        text=text,
        data=data,
        block=block,
        lines=lines,
        examples=examples,
        seed=template.first.seed,
        device=device,
        threads=threads or merge.default_threads(),
        offline=offline,
    )
    check_given(settings)
    hole = template.learned or template.order
    learning = hole.learning if hole is not None else None
    if isinstance(learning, LearningOrder):
        with bar.counting("steps", learning.steps + 1) as advance:
            order = choose.learn_order(
                template,
                settings,
                folder,
                threads=threads,
                offline=offline,
                allow_pickle=allow_pickle,
                told=lambda: advance(1),
            )
        if json:
            show.json({"folder": str(folder), **order.as_json()})
        else:
            _order(order, folder)
        return
    epochs = learning.epochs if isinstance(learning, Learning) else None
    with bar.counting("epochs", epochs or 0) as advance:
        found = choose.learn(
            template,
            data=settings,
            out=folder,
            threads=threads,
            offline=offline,
            allow_pickle=allow_pickle,
            told=lambda loss: advance(1),
        )
    if json:
        show.json({"folder": str(folder), **found.as_json()})
        return
    _table(found)
    if not found.better:
        show.note("the weights are those of the start: learning had not lowered the loss", "yellow")
    show.line(f"wrote {folder / BEST} · `merge run {folder / BEST}` makes it")


def _order(found: LearnedOrder, folder: Path) -> None:
    from mergekit_lite.evaluate.search import BEST

    rows = [[name, f"{share:.1%}"] for name, share in found.moved.items()]
    show.table(["space", "moved"], rows[:SHOWN], right=["moved"])
    if len(rows) > SHOWN:
        show.line(f"and {len(rows) - SHOWN} more rows")
    show.line(f"loss {found.before:.6g} by weight matching, {found.after:.6g} after step {found.step} of {found.steps}")
    if not found.step:
        show.note("the permutations are those of weight matching: learning had not lowered the loss", "yellow")
    show.line(f"wrote {folder / BEST} · `merge run {folder / BEST}` makes it")


def _table(found: Learned) -> None:
    rows = [[group or "*", *(f"{value:.4f}" for value in values)] for group, values in found.weights.items()]
    show.table(["tensors", *found.inputs], rows[:SHOWN], right=list(found.inputs))
    if len(rows) > SHOWN:
        show.line(f"and {len(rows) - SHOWN} more rows")
    show.line(f"loss {found.before:.6g} before, {found.after:.6g} after {show.count(len(found.epochs), 'epoch')}")

"""A picture of a path, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergekit_lite.errors import StoppedError, UsageError
from mergekit_lite.limits import hint_for

_WIDTH, _HEIGHT = 5.5, 4.0  # inches of one panel
_BAR = 0.22  # inches of a bar


def check_picture(path: Path) -> None:
    """Raises UsageError where matplotlib is not installed, or draws no file of this ending."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        hint = "`pip install 'mergekit_lite[search]'`, or leave out `--plot`"
        raise UsageError("a picture needs matplotlib, which is not installed", hint=hint) from None
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise UsageError(f"matplotlib cannot draw `{path}`", hint="a name that ends in .svg, .png or .pdf")


def draw(
    path: Path,
    ts: Sequence[float],
    scores: Sequence[float],
    goal: str,
    metric: str,
    bars: Sequence[tuple[str, Sequence[tuple[str, float | None]]]] = (),
) -> None:
    """Draw the scores at `ts`, the straight line between the ends and, as a bar between the two, the barrier. `bars`
    are further panels, each with a title and a number for every layer. Raises StoppedError where the disk refuses."""
    import matplotlib
    from matplotlib.figure import Figure

    sign = 1.0 if goal == "min" else -1.0
    line = [(1 - t) * scores[0] + t * scores[-1] for t in ts]
    over = [sign * (score - straight) for score, straight in zip(scores, line, strict=True)]
    top = max(range(len(ts)), key=lambda i: over[i])
    most = max((len(rows) for _, rows in bars), default=0)
    panels = 1 + len(bars)
    # Text stays text, and the same path gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "merge path"}):
        figure = Figure(figsize=(_WIDTH * panels, max(_HEIGHT, 1.2 + _BAR * most)), layout="constrained")
        axes: Any = figure.subplots(1, panels, squeeze=False)[0]
        axes[0].plot(ts, scores, marker="o", label="merges")
        axes[0].plot([0, 1], [scores[0], scores[-1]], "--", color="grey", label="straight line")
        if over[top] > 0:
            label = f"barrier {over[top]:.4g}"
            axes[0].plot([ts[top]] * 2, [line[top], scores[top]], color="C3", linewidth=3, label=label)
        axes[0].set(xlabel="t: from A (0) to B (1)", ylabel=metric)
        axes[0].legend()
        for panel, (title, rows) in zip(axes[1:], bars, strict=True):
            names = [name for name, _ in rows]
            panel.barh(range(len(rows)), [value or 0.0 for _, value in rows])
            panel.set_yticks(range(len(rows)), names)
            panel.invert_yaxis()
            panel.set_xlim(left=0)
            panel.set_xlabel(title)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as fault:
            raise StoppedError(f"cannot write `{path}`: {fault.strerror}", hint=hint_for(fault)) from fault

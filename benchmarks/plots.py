"""The results of benchmark runs as small SVG files. Needs matplotlib: `pip install mergekit_lite[bench]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

SIZE_METHODS = ("passthrough", "linear", "slerp", "dare_ties", "ties", "della")
Points = Mapping[str, Sequence[tuple[float, float]]]


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """A file for every part of `results` that has a curve."""
    folder.mkdir(parents=True, exist_ok=True)
    # The same results give the same bytes.
    pyplot.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9, "axes.grid": True})
    made = []
    if results.get("costs"):
        made.append(_lines(folder / "size.svg", _sizes(results["costs"]), "parameters", "seconds", log=True))
    if results.get("count"):
        title = f"fine-tunes of {results['count']['size']}"
        made.append(_lines(folder / "models.svg", _with_floor(results["count"], "models"), title, "seconds"))
    if results.get("threads"):
        made.append(_lines(folder / "threads.svg", _with_floor(results["threads"], "threads"), "threads", "seconds"))
    if results.get("memory"):
        points: dict[str, list[tuple[float, float]]] = {}
        for row in results["memory"]["rows"]:
            if "fault" not in row:
                points.setdefault(row["method"], []).append((row["parameters"], row["peak"] / 1e6))
        made.append(_lines(folder / "memory.svg", points, "parameters", "peak anonymous MB", log_x=True))
    if results.get("plan"):
        points = {}
        for row in results["plan"]["rows"]:
            points.setdefault(f"`merge plan`, {row['method']}", []).append((row["tensors"], row["wall"]))
            points.setdefault(f"planning alone, {row['method']}", []).append((row["tensors"], row["inside"]))
        made.append(_lines(folder / "plan.svg", points, "tensors of a model", "seconds", log=True))
    return made


def _sizes(costs: Mapping[str, Any]) -> Points:
    points: dict[str, list[tuple[float, float]]] = {}
    for part in costs.values():
        for row in part["rows"]:
            if row["tool"] == "mergekit_lite" and row["method"] in SIZE_METHODS and "fault" not in row:
                points.setdefault(row["method"], []).append((part["parameters"], row["wall"]))
                if row["method"] in ("linear", "ties"):
                    label = f"floor of {row['inputs']} models"
                    points.setdefault(label, []).append((part["parameters"], row["floor"]))
    return points


def _with_floor(part: Mapping[str, Any], column: str) -> Points:
    points: dict[str, list[tuple[float, float]]] = {}
    for row in part["rows"]:
        if "fault" not in row:
            points.setdefault(row["method"], []).append((row[column], row["wall"]))
            if row["method"] in ("linear", "ties"):
                points.setdefault(f"floor of {row['method']}", []).append((row[column], row["floor"]))
    return points


def _lines(path: Path, points: Points, x: str, y: str, *, log: bool = False, log_x: bool = False) -> Path:
    """One line for every entry; floors are dashed."""
    figure, axes = pyplot.subplots(figsize=(5.5, 3.6))
    for label, some in points.items():
        some = sorted(some)
        style = "--" if label.startswith(("floor", "planning")) else "-"
        axes.plot([a for a, _ in some], [b for _, b in some], style, marker="o", markersize=3, label=label)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if log or log_x:
        axes.set_xscale("log")
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    pyplot.close(figure)
    return path

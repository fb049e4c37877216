"""The results of benchmark runs as Markdown: targets first, then table by table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BEGIN, END = "<!-- results: benchmarks/bench.py -->", "<!-- end of results -->"
# Times in floors, or in copies of one input; the same for every method that is a variant of these.
TO_FLOOR: Mapping[str, float] = {
    "linear": 1.5,
    "slerp": 2.2,
    "model_stock": 2.2,
    "ties": 4.0,
    "ties_tensor": 4.0,
    "dare_ties": 4.0,
    "breadcrumbs": 4.0,
    "della": 6.0,
}
TO_CP: Mapping[str, float] = {"passthrough": 1.2, "stack": 1.2}
PEAK, SPREAD = 200e6, 1.2  # bytes, and the largest over the smallest peak of a method among sizes
START, PLAN_LARGE, PLAN_16K = 1.5, 2.0, 1.0  # seconds
SHOWN = 0.005  # of the processor time: what is less stands together in one row
Results = Mapping[str, Any]


def markdown(results: Results) -> str:
    """All that is in `results`, part by part. Day and machine stand above each part, or once where they are one."""
    parts_of = [*results.get("costs", {}).values(), *(part for name, part in results.items() if name != "costs")]
    one_machine = bool(parts_of) and all(part["about"] == parts_of[0]["about"] for part in parts_of)
    if one_machine:
        head = _about(parts_of[0]["about"])
        results = {
            name: {s: {**p, "about": None} for s, p in part.items()} if name == "costs" else {**part, "about": None}
            for name, part in results.items()
        }
    parts = [
        ("about", [head] if one_machine else []),
        ("targets", _targets(results)),
        *((f"costs {size}", _costs(found)) for size, found in _by_size(results)),
        *((f"peers {size}", _peers(found)) for size, found in _by_size(results)),
        ("cold", _plain(results.get("cold"), "Inputs on the disk", _COLD)),
        ("count", _grid(results.get("count"), "Number of fine-tunes", "models", "models.svg")),
        ("threads", _grid(results.get("threads"), "Threads", "threads", "threads.svg")),
        ("memory", _memory(results.get("memory"))),
        ("start", _start(results.get("start"))),
        ("plan", _plan(results.get("plan"))),
        ("profile", _profile(results.get("profile"))),
    ]
    return "\n\n".join("\n".join(lines) for _, lines in parts if lines) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """A table whose first `left` columns stand to the left."""
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join([":-"] * left + ["-:"] * (len(head) - left)) + " |"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _by_size(results: Results) -> list[tuple[str, Any]]:
    return sorted(results.get("costs", {}).items(), key=lambda item: item[1]["parameters"])


def _said(part: Mapping[str, Any], more: str = "") -> list[str]:
    """Where and when, unless that stands above all parts, and what else there is to say."""
    said = " ".join(text for text in (_about(part["about"]) if part["about"] else "", more) if text)
    return [said, ""] if said else []


def _about(about: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {text}" for name, text in about["versions"].items())
    return f"{about['date']}, {about['machine']}; {versions}."


# Targets


def _targets(results: Results) -> list[str]:
    rows: list[tuple[str, float | None, float, str]] = []
    sizes = _by_size(results)
    if sizes:
        size, found = sizes[-1]
        ours = [row for row in found["rows"] if row["tool"] == "mergekit_lite" and "fault" not in row]
        for limits, column, unit in ((TO_FLOOR, "to_floor", "F"), (TO_CP, "to_cp", "cp")):
            by_method = {row["method"]: row[column] for row in ours}
            rows += [(f"{name}, {size}", by_method.get(name), limit, unit) for name, limit in limits.items()]
        worst = max(ours, key=lambda row: row["peak"], default=None)
        if worst is not None:
            rows.append((f"largest peak, {size} ({worst['method']})", worst["peak"] / 1e6, PEAK / 1e6, "MB"))
    spread = _spread(results.get("memory"))
    if spread is not None:
        rows.append((f"peak among sizes, largest over smallest ({spread[0]})", spread[1], SPREAD, "×"))
    started = {row["command"]: row["wall"] for row in results.get("start", {}).get("rows", ())}
    rows += [(f"`{name}` of a tiny model", wall, START, "s") for name, wall in started.items() if "run" in name]
    for row in results.get("plan", {}).get("rows", ()):
        if row["models"] == "70B":
            rows.append((f"`merge plan` of {row['models']}, {row['method']}", row["wall"], PLAN_LARGE, "s"))
        if row["tensors"] == 16_000:
            rows.append((f"planning of 16,000 tensors, {row['method']}", row["inside"], PLAN_16K, "s"))
    if not rows:
        return []
    head = ["what", "target", "measured", ""]
    return ["## Targets", "", *table(head, [_target(*row) for row in rows])]


def _target(what: str, found: float | None, limit: float, unit: str) -> tuple[str, str, str, str]:
    digits = 0 if unit == "MB" else 2
    if found is None:
        return what, f"≤ {limit:g} {unit}", "not measured", ""
    return what, f"≤ {limit:g} {unit}", f"{found:.{digits}f} {unit}", "met" if found <= limit else "missed"


def _spread(part: Any) -> tuple[str, float] | None:
    """The method whose peaks differ most among sizes, and by what factor."""
    peaks: dict[str, list[float]] = {}
    for row in part["rows"] if part else ():
        if "fault" not in row:
            peaks.setdefault(row["method"], []).append(row["peak"])
    found = [(name, max(some) / min(some)) for name, some in peaks.items() if len(some) > 1]
    return max(found, key=lambda item: item[1], default=None)


# Costs

_F = "F is `cat` of every input to /dev/null plus `cp` of one, before and after each merge; the flush is not in it."


def _costs(part: Mapping[str, Any]) -> list[str]:
    head = ["method", "settings", "inputs", "wall s", "F s", "× F", "from to", "× cp", "flush s", "CPU s", "× linear",
            "CPU × linear", "peak MB", "target"]  # fmt: skip
    rows = []
    for row in part["rows"]:
        if row["tool"] != "mergekit_lite":
            continue
        settings = ", ".join(f"{name} {value}" for name, value in row["settings"].items())
        if "fault" in row:
            rows.append([row["method"], settings, f"failed: {_cell(row['fault'])}", *[""] * (len(head) - 3)])
            continue
        low, high = row["to_floor_range"]
        rows.append([
            row["method"], settings, str(row["inputs"]), f"{row['wall']:.2f}", f"{row['floor']:.2f}",
            f"{row['to_floor']:.2f}", f"{low:.2f} {high:.2f}", f"{row['to_cp']:.2f}", f"{row['flush']:.2f}",
            f"{row['cpu']:.2f}", _number(row.get("to_linear_wall")), _number(row.get("to_linear_cpu")),
            f"{row['peak'] / 1e6:.0f}", _verdict(row),
        ])  # fmt: skip
    some = next((row["repetitions"] for row in part["rows"] if "repetitions" in row), 0)
    said = f"{part['threads']} threads, medians of {some} repetitions. {_F} `flush` is what `sync` of that copy takes."
    lines = [f"## Every method, {part['size']}", "", *_said(part, said), *table(head, rows, left=2)]
    return [*lines, "", "![Time against the size of the model](plots/size.svg)"]


def _verdict(row: Mapping[str, Any]) -> str:
    for limits, column in ((TO_FLOOR, "to_floor"), (TO_CP, "to_cp")):
        if row["method"] in limits:
            return "met" if row[column] <= limits[row["method"]] else f"missed: {limits[row['method']]:g}"
    return ""


def _peers(part: Mapping[str, Any]) -> list[str]:
    tools = list(dict.fromkeys(row["tool"] for row in part["rows"]))
    if len(tools) < 2:
        return []
    by_method: dict[str, dict[str, Any]] = {}
    for row in part["rows"]:
        by_method.setdefault(row["method"], {})[row["tool"]] = row
    head = ["method", *(f"{tool} {what}" for tool in tools for what in ("s", "× F", "MB"))]
    head += [f"{tool} / ours" for tool in tools[1:]]
    rows = []
    for method, found in by_method.items():
        if len(found) < 2:
            continue
        cells = [method]
        for tool in tools:
            row = found.get(tool, {})
            if "fault" in row:
                cells += [f"failed: {_cell(row['fault'])}", "", ""]
            else:
                cells += [_number(row.get("wall")), _number(row.get("to_floor")), _number(row.get("peak"), 1e6, 0)]
        ours = found.get(tools[0], {}).get("wall")
        theirs = [found.get(tool, {}).get("wall") for tool in tools[1:]]
        rows.append([*cells, *("" if not (ours and wall) else f"{wall / ours:.1f}" for wall in theirs)])
    return [f"## Beside other tools, {part['size']}", "", *_said(part, "In the same rounds."), *table(head, rows)]


# The other parts

_COLD = "Pages of the inputs are dropped before each `cat` and each merge; `cp` finds them in the cache after `cat`."


def _plain(part: Any, title: str, more: str) -> list[str]:
    if not part:
        return []
    rows = [
        [r["method"], f"{r['wall']:.2f}", f"{r['cat']:.2f}", f"{r['cp']:.2f}", f"{r['to_floor']:.2f}"]
        for r in part["rows"]
        if "fault" not in r
    ]
    head = ["method", "wall s", "cat s", "cp s", "× F"]
    return [f"## {title}, {part['size']}", "", *_said(part, more), *table(head, rows)]


def _grid(part: Any, title: str, column: str, plot: str) -> list[str]:
    """A row a method; wall, × F and processor time for every number of models or threads."""
    if not part:
        return []
    values = sorted({row[column] for row in part["rows"]})
    methods = list(dict.fromkeys(row["method"] for row in part["rows"]))
    found = {(row["method"], row[column]): row for row in part["rows"] if "fault" not in row}
    rows = []
    for method in methods:
        for what, key in (("wall s", "wall"), ("× F", "to_floor"), ("CPU s", "cpu"), ("peak MB", "peak")):
            scale, digits = (1e6, 0) if key == "peak" else (1.0, 2)
            cells = [_number(found.get((method, value), {}).get(key), scale, digits) for value in values]
            rows.append([method, what, *cells])
    head = ["method", "", *(str(value) for value in values)]
    lines = [f"## {title}, {part['size']}", "", *_said(part), *table(head, rows, left=2)]
    return [*lines, "", f"![{title}](plots/{plot})"]


def _memory(part: Any) -> list[str]:
    if not part:
        return []
    sizes = list(dict.fromkeys(row["size"] for row in part["rows"]))
    methods = list(dict.fromkeys(row["method"] for row in part["rows"]))
    found = {(row["method"], row["size"]): row for row in part["rows"]}

    def cell(method: str, size: str) -> str:
        row = found.get((method, size), {})
        return f"none: {_cell(row['fault'])}" if "fault" in row else _number(row.get("peak"), 1e6, 0)

    rows = [[method, *(cell(method, size) for size in sizes)] for method in methods]
    more = f"{part['threads']} threads; the largest anonymous memory in MB. 13B is a sparse file of zeros."
    lines = ["## Memory", "", *_said(part, more), *table(["method", *sizes], rows)]
    return [*lines, "", "![Peak memory against the size of the model](plots/memory.svg)"]


def _start(part: Any) -> list[str]:
    if not part:
        return []
    rows = [[f"`{r['command']}`", f"{r['wall']:.2f}", f"{r['cpu']:.2f}"] for r in part["rows"]]
    more = "Whole processes that have next to nothing to do; the model is tiny."
    return ["## Start-up", "", *_said(part, more), *table(["command", "wall s", "CPU s"], rows)]


def _plan(part: Any) -> list[str]:
    if not part:
        return []
    rows = [
        [r["models"], r["method"], f"{r['tensors']:,}", f"{r['wall']:.2f}", f"{r['inside']:.2f}"] for r in part["rows"]
    ]
    head = ["models", "method", "tensors", "`merge plan` s", "planning alone s"]
    more = "Headers of a base and three fine-tunes, without data."
    lines = ["## Plans", "", *_said(part, more), *table(head, rows, left=2)]
    return [*lines, "", "![Seconds of a plan against the number of tensors](plots/plan.svg)"]


def _profile(part: Any) -> list[str]:
    if not part:
        return []
    lines = [f"## Where the processor time goes, {part['size']}", ""]
    lines += _said(part, "One thread, and that of the digests, sampled in the process; see benchmarks/cpu_profile.py.")
    for found in part["rows"]:
        total = found["cpu"]
        large = {name: value for name, value in found["places"].items() if value >= SHOWN * total}
        rest = sum(found["places"].values()) - sum(large.values())
        rows = [[name, f"{value:.2f}", f"{value / total:.1%}"] for name, value in large.items()]
        rows.append(["all else", f"{rest:.2f}", f"{rest / total:.1%}"])
        text = f"**{found['method']}**: {found['cpu']:.2f} s of processor time in {found['wall']:.2f} s"
        lines += [f"{text}, {found['flush_wall']:.2f} s of them waiting for the disk's flush.", ""]
        lines += [*table(["where", "CPU s", "share"], rows), ""]
    return lines[:-1]


def _number(value: float | None, scale: float = 1.0, digits: int = 2) -> str:
    return "" if value is None else f"{value / scale:.{digits}f}"


def _cell(text: str) -> str:
    """The end of a message as one cell of a table."""
    return " ".join(text.split())[-80:].replace("|", "/")

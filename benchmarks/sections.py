"""The parts of a benchmark run. Each measures one thing and gives it as data for JSON."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cases import Case, case
from make_models import SIZES, make
from process import FailedRun, Floor, Usage, clear, floor, forget, run, weight_files
from sparse import many_tensors
from tools import MERGE, Ours, Tool, write_recipe

COUNT_METHODS = ("linear", "task_arithmetic", "ties")
COUNTS = range(2, 9)
THREAD_METHODS = ("linear", "slerp", "dare_ties", "ties")
MEMORY_METHODS = ("passthrough", "linear", "slerp", "ties", "dare_ties", "della")
COLD_METHODS = ("passthrough", "linear", "ties_tensor")
PLAN_TENSORS = (2_000, 16_000, 100_000)
PLAN_METHODS = ("linear", "ties")
# Seconds to read, check and plan a recipe, without the start of Python and the imports.
PLAN_INSIDE = """
import sys, time
from mergekit_lite import load_recipe, plan
import mergekit_lite.plan.build
load_recipe(sys.argv[1])
began = time.perf_counter()
plan(load_recipe(sys.argv[1]))
print(time.perf_counter() - began)
"""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """What all parts share: folders, repetitions, threads, the tools beside this program, where to tell progress."""

    models: Path
    out: Path
    repeat: int
    threads: int
    say: Say
    peers: tuple[Tool, ...] = ()
    peer_methods: tuple[str, ...] = ()

    def folder(self, size: str, tunes: int = 3) -> Path:
        """The models of a size, made where they are not there."""
        make(size, self.models / size, tunes)
        return self.models / size

    def case(self, label: str, size: str, tunes: int = 3) -> Case:
        return case(label, SIZES[size].layers, tunes)


@dataclass
class Series:
    """The repetitions of one tool on one case, each with the floors before and after it."""

    tool: Tool
    case: Case
    used: list[Usage] = field(default_factory=list)
    floors: list[tuple[Floor, Floor]] = field(default_factory=list)
    fault: str | None = None

    def ratio(self, index: int) -> float:
        """One repetition's time over the mean of the floors around it."""
        return 2 * self.used[index].wall / sum(f.seconds for f in self.floors[index])

    def as_json(self, linear: Series | None) -> dict[str, Any]:
        """Medians; the ratios are medians of the ratios of single rounds."""
        row: dict[str, Any] = {
            "tool": self.tool.name,
            "method": self.case.label,
            "settings": dict(self.case.settings),
            "inputs": len(self.case.inputs),
        }
        if self.fault is not None:
            return {**row, "fault": self.fault}
        median = statistics.median
        around = [floor for pair in self.floors for floor in pair]
        count = range(len(self.used))
        row |= {
            "repetitions": len(self.used),
            "wall": median(u.wall for u in self.used),
            "cpu": median(u.cpu for u in self.used),
            "peak": max(u.peak for u in self.used),
            "cat": median(f.cat for f in around),
            "cp": median(f.cp for f in around),
            "flush": median(f.flush for f in around),
            "floor": median(f.seconds for f in around),
            "to_floor": median(self.ratio(i) for i in count),
            "to_floor_range": [min(self.ratio(i) for i in count), max(self.ratio(i) for i in count)],
            "to_cp": median(2 * u.wall / (a.cp + b.cp) for u, (a, b) in zip(self.used, self.floors, strict=True)),
            "runs": [u.as_json() for u in self.used],
            "floors": [[asdict(a), asdict(b)] for a, b in self.floors],
        }
        if linear is not None and linear.used and linear.fault is None:
            pairs = list(zip(self.used, linear.used, strict=False))
            row["to_linear_wall"] = median(mine.wall / theirs.wall for mine, theirs in pairs)
            row["to_linear_cpu"] = median(mine.cpu / theirs.cpu for mine, theirs in pairs)
        return row


def rounds(bench: Bench, folder: Path, entries: Sequence[tuple[Tool, Case]], cold: bool = False) -> list[Series]:
    """Run all entries `bench.repeat` times, round by round, with the floor of the same inputs before and after each.

    Entries that read the same models run one after the other and share the floor between them. What is returned has
    the order of `entries`.
    """
    series = [Series(tool, case) for tool, case in entries]
    for one in series:
        one.tool.prepare(one.case, folder)
    bench.out.mkdir(parents=True, exist_ok=True)
    for number in range(bench.repeat):
        before: tuple[tuple[str, ...], Floor] | None = None
        for one in sorted(series, key=lambda one: one.case.inputs):
            if one.fault is not None:
                continue
            folders = [folder / name for name in one.case.inputs]
            if before is None or before[0] != one.case.inputs:
                if not number:
                    floor(folders, bench.out / "copy")  # fills the page cache
                before = (one.case.inputs, floor(folders, bench.out / "copy", cold))
            if cold:
                forget(weight_files(folders))
            try:
                used = one.tool.merge(one.case, folder, bench.out)
            except FailedRun as fault:
                one.fault = str(fault)
                bench.say(f"{one.tool.name} {one.case.label}: {fault}")
                continue
            after = floor(folders, bench.out / "copy", cold)
            one.used.append(used)
            one.floors.append((before[1], after))
            before = (one.case.inputs, after)
            bench.say(
                f"{number + 1}/{bench.repeat} {one.tool.name:14} {one.case.label:18} {used.wall:8.2f} s "
                f"{one.ratio(-1):6.2f} F {used.cpu:8.2f} s CPU {used.peak / 1e6:7.0f} MB"
            )
    return series


def costs(bench: Bench, size: str, labels: Iterable[str]) -> dict[str, Any]:
    """Every method against the floor and against linear, beside the peers. Methods on matrices, and those that need
    statistics, only where the size has these: the small ones."""
    folder = bench.folder(size)
    cases = [bench.case(label, size) for label in labels]
    small = SIZES[size].statistics
    cases = [c for c in cases if small or not (c.matrix or c.statistics)]
    ours: Tool = Ours(bench.threads)
    entries = [(ours, c) for c in cases]
    entries += [(p, c) for c in cases for p in bench.peers if c.label in bench.peer_methods and p.takes(c)]
    found = rounds(bench, folder, entries)
    linear = next((s for s in found if s.tool is ours and s.case.label == "linear"), None)
    rows = [one.as_json(linear) for one in found]
    return {"size": size, "parameters": SIZES[size].parameters, "threads": bench.threads, "rows": rows}


def count(bench: Bench, size: str, labels: Iterable[str]) -> dict[str, Any]:
    """Cost against the number of fine-tunes."""
    folder = bench.folder(size, max(COUNTS))
    rows = []
    for label in labels:
        entries: list[tuple[Tool, Case]] = [(Ours(bench.threads), bench.case(label, size, n)) for n in COUNTS]
        for tunes, one in zip(COUNTS, rounds(bench, folder, entries), strict=True):
            rows.append({**one.as_json(None), "models": tunes})
    return {"size": size, "threads": bench.threads, "rows": rows}


def threads(bench: Bench, size: str, labels: Iterable[str], counts: Sequence[int]) -> dict[str, Any]:
    """Cost against the number of threads."""
    folder = bench.folder(size)
    rows = []
    for label in labels:
        entries: list[tuple[Tool, Case]] = [(Ours(n), bench.case(label, size)) for n in counts]
        for number, one in zip(counts, rounds(bench, folder, entries), strict=True):
            rows.append({**one.as_json(None), "threads": number})
    return {"size": size, "rows": rows}


def cold(bench: Bench, size: str, labels: Iterable[str]) -> dict[str, Any]:
    """Inputs on the disk, not in the page cache: the floor and the merge both read them from there."""
    folder = bench.folder(size)
    ours = Ours(bench.threads)
    found = rounds(bench, folder, [(ours, bench.case(label, size)) for label in labels], cold=True)
    return {"size": size, "threads": bench.threads, "rows": [one.as_json(None) for one in found]}


def memory(bench: Bench, sizes: Iterable[str], labels: Iterable[str]) -> dict[str, Any]:
    """The largest anonymous memory of one run for every size, without floors."""
    rows: list[dict[str, Any]] = []
    ours = Ours(bench.threads)
    bench.out.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        folder = bench.folder(size)
        for label in labels:
            row: dict[str, Any] = {"size": size, "parameters": SIZES[size].parameters, "method": label}
            room = shutil.disk_usage(bench.out).free
            needed = 2 * SIZES[size].parameters
            try:
                if room < 1.1 * needed:
                    raise FailedRun(f"the result takes {needed / 1e9:.0f} GB, {room / 1e9:.0f} GB are free")
                row |= ours.merge(bench.case(label, size), folder, bench.out).as_json()
            except FailedRun as fault:
                row["fault"] = str(fault)
            rows.append(row)
            bench.say(f"memory {size:5} {label:16} {row.get('peak', 0) / 1e6:6.0f} MB {row.get('fault', '')}")
    return {"threads": bench.threads, "rows": rows}


def start(bench: Bench) -> dict[str, Any]:
    """Seconds of commands that have next to nothing to do."""
    folder = bench.folder("tiny")
    bench.out.mkdir(parents=True, exist_ok=True)
    recipe = str(write_recipe(bench.case("linear", "tiny").recipe(folder, bench.out / "planned"), bench.out / "s.yaml"))
    commands = {"merge --version": ["--version"], "merge --help": ["--help"], "merge plan": ["plan", recipe]}
    used: dict[str, list[Usage]] = {}
    ours = Ours(bench.threads)
    for _ in range(bench.repeat):
        for name, words in commands.items():
            used.setdefault(name, []).append(run([*MERGE, *words]))
        for label in ("passthrough", "linear", "ties"):
            found = ours.merge(bench.case(label, "tiny"), folder, bench.out)
            used.setdefault(f"merge run, {label}", []).append(found)
    rows = [{"command": name, **_median(found)} for name, found in used.items()]
    for row in rows:
        bench.say(f"start {row['command']:28} {row['wall']:6.2f} s")
    return {"rows": rows}


def plan(bench: Bench, tensors: Sequence[int], large: str) -> dict[str, Any]:
    """Seconds of `merge plan`, the whole command and the planning alone: for numbers of tensors, and for the shape of a
    large model."""
    bench.out.mkdir(parents=True, exist_ok=True)
    folders = {}
    for number in tensors:
        folders[f"{number:,} tensors"] = (bench.models / f"tensors-{number}", number)
        for name in ("base", "tune1", "tune2", "tune3"):
            many_tensors(bench.models / f"tensors-{number}" / name, number)
    if large:
        folders[large] = (bench.folder(large), len(SIZES[large].shapes()))
    rows = []
    for name, (folder, number) in folders.items():
        for label in PLAN_METHODS:
            made = case(label, 4).recipe(folder, bench.out / "planned")
            recipe = str(write_recipe(made, bench.out / "plan.yaml"))
            used = [run([*MERGE, "plan", recipe]) for _ in range(bench.repeat)]
            inside = [_inside(recipe) for _ in range(bench.repeat)]
            row = {"models": name, "tensors": number, "method": label, **_median(used)}
            rows.append({**row, "inside": statistics.median(inside)})
            bench.say(f"plan {name:16} {label:8} {row['wall']:6.2f} s, {rows[-1]['inside']:.2f} s of it planning")
    return {"rows": rows}


def profile(bench: Bench, size: str, labels: Iterable[str]) -> dict[str, Any]:
    """Where the processor time of a run on one thread goes; see cpu_profile.py."""
    folder = bench.folder(size)
    bench.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for label in labels:
        target, report = bench.out / "merged", bench.out / "profile.json"
        clear(target)
        recipe = str(write_recipe(bench.case(label, size).recipe(folder, target), bench.out / "recipe.yaml"))
        script = str(Path(__file__).with_name("cpu_profile.py"))
        run([sys.executable, script, recipe, str(report)])
        clear(target)
        rows.append({"method": label, **json.loads(report.read_text(encoding="utf-8"))})
        bench.say(f"profile {label}: {rows[-1]['cpu']:.2f} s CPU, {rows[-1]['wall']:.2f} s")
    return {"size": size, "rows": rows}


def _inside(recipe: str) -> float:
    done = subprocess.run([sys.executable, "-c", PLAN_INSIDE, recipe], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _median(used: Sequence[Usage]) -> dict[str, Any]:
    return {
        "repetitions": len(used),
        "wall": statistics.median(u.wall for u in used),
        "cpu": statistics.median(u.cpu for u in used),
        "peak": max(u.peak for u in used),
    }

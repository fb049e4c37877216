"""Time and memory of whole `merge run` processes beside plain copying, all in one run on one machine.

    python benchmarks/bench.py --write benchmarks/RESULTS.md
    python benchmarks/bench.py --parts costs --sizes 60M --methods linear ties --repeat 3
    python benchmarks/bench.py --profile linear ties

Makes the models where they are not there (2.2 GB each at 1.1B). The floor F is `cat` of every input to /dev/null plus
`cp` of one of them, timed before and after each merge; times are quoted as ratios to it, since machines differ and
drift. Every round runs each merge once, and the figures are medians over rounds. Memory is the largest anonymous
resident memory of the process (RssAnon), sampled a hundred times a second.

What a run measures replaces that part in the JSON file and leaves the others, so that parts can be measured one by one;
`--write` puts all of the file between the markers of a Markdown file, with plots beside it where matplotlib is there.
Other tools come from environments of their own: `--mergekit PATH/bin/mergekit-yaml`, `--sd-mecha PATH/bin/python`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sections
from cases import labels
from make_models import SIZES
from results import BEGIN, END, markdown
from tools import Mergekit, SdMecha, Tool

HERE = Path(__file__).parent
PARTS = ("start", "plan", "costs", "count", "threads", "cold", "memory", "profile")
PEER_METHODS = (
    "passthrough", "linear", "slerp", "task_arithmetic", "model_stock", "ties_tensor", "dare_ties", "breadcrumbs",
    "della",
)  # fmt: skip


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line, complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", type=Path, default=Path("bench"), help="where the models are, or will be made")
    add("--out", type=Path, default=Path("bench-out"), help="folder for results of merges, removed one by one")
    add("--parts", nargs="+", choices=PARTS, help="what to measure (default: all)")
    add("--sizes", nargs="+", choices=list(SIZES), default=["60M", "1.1B"], help="models of `costs`; the last one is")
    add("--methods", nargs="+", help="merges instead of those that each part has by itself")
    add("--repeat", type=int, default=5, help="rounds (default: 5)")
    add("--threads", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))], help="the last one is for all")
    add("--count-size", choices=list(SIZES), default="60M", help="models of `count`, of which there are nine")
    add("--memory-sizes", nargs="+", choices=list(SIZES), default=["60M", "1.1B", "13B"])
    add("--plan-tensors", type=int, nargs="*", default=list(sections.PLAN_TENSORS))
    add("--plan-size", choices=["", *SIZES], default="70B")
    add("--mergekit", type=Path, help="mergekit-yaml of an environment that has mergekit")
    add("--mergekit-dtype", choices=["bfloat16", "float32"], default="bfloat16", help="its arithmetic")
    add("--sd-mecha", type=Path, help="Python of an environment that has sd-mecha")
    add("--peer-methods", nargs="+", default=list(PEER_METHODS))
    add("--profile", nargs="+", metavar="METHOD", help="where the processor time of these goes, and nothing else")
    add("--json", type=Path, default=HERE / "results.json", help="file of the figures")
    add("--write", type=Path, help="a Markdown file whose results are replaced")
    args = parser.parse_args(words)
    if args.parts is None:
        args.parts = ["profile"] if args.profile else list(PARTS)
    unknown = sorted({*(args.methods or ()), *(args.profile or ())} - set(labels()))
    if unknown:
        parser.error(f"there is no merge {', '.join(unknown)}; there are {', '.join(labels())}")
    return args


def measure(args: argparse.Namespace, part: str, bench: sections.Bench) -> Any:
    """One part, as data."""
    size = args.sizes[-1]
    match part:
        case "start":
            return sections.start(bench)
        case "plan":
            return sections.plan(bench, args.plan_tensors, args.plan_size)
        case "costs":
            return {name: sections.costs(bench, name, args.methods or labels()) for name in args.sizes}
        case "count":
            return sections.count(bench, args.count_size, args.methods or sections.COUNT_METHODS)
        case "threads":
            return sections.threads(bench, size, args.methods or sections.THREAD_METHODS, sorted(set(args.threads)))
        case "cold":
            return sections.cold(bench, size, args.methods or sections.COLD_METHODS)
        case "memory":
            return sections.memory(bench, args.memory_sizes, args.methods or sections.MEMORY_METHODS)
        case "profile":
            return sections.profile(bench, size, args.profile or ("linear", "ties"))
    raise ValueError(part)


def about(args: argparse.Namespace, threads: int) -> dict[str, Any]:
    """When and where: what has to stand beside a figure."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    disk = subprocess.run(["stat", "-f", "-c", "%T", str(args.out)], capture_output=True, text=True, check=True)
    versions = {"Python": platform.python_version(), "Linux": platform.release().split("-")[0]}
    versions |= {name: version(name) for name in ("torch", "numpy", "mergekit_lite")}
    beside = {"mergekit": args.mergekit and args.mergekit.with_name("python"), "sd-mecha": args.sd_mecha}
    for name, python in beside.items():
        if python:
            asked = f"from importlib.metadata import version; print(version('{name}'))"
            done = subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=True)
            versions[name] = done.stdout.strip()
    if args.mergekit:
        versions["mergekit"] += f" in {args.mergekit_dtype}"
    where = f"{cpu}, {threads} of {os.cpu_count()} cores, {memory:.0f} GiB, {disk.stdout.strip()}"
    return {"date": datetime.date.today().isoformat(), "machine": where, "versions": versions}


def write(results: dict[str, Any], path: Path) -> None:
    """Replace what stands between the markers of a Markdown file, and the plots beside it. Raises SystemExit where
    there are no markers."""
    page = path.read_text(encoding="utf-8")
    if BEGIN not in page or END not in page:
        raise SystemExit(f"{path} has no lines {BEGIN} and {END}")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n\n{markdown(results)}\n{END}{tail}", encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        return
    from plots import draw

    draw(results, path.parent / "plots")


def main(words: Sequence[str] | None = None) -> None:
    args = arguments(words)
    args.out.mkdir(parents=True, exist_ok=True)
    threads = args.threads[-1]
    peers: list[Tool] = []
    if args.mergekit:
        peers.append(Mergekit(args.mergekit, threads, args.mergekit_dtype))
    if args.sd_mecha:
        peers.append(SdMecha(args.sd_mecha, threads))

    def say(text: str) -> None:
        print(text, flush=True)

    methods = tuple(args.methods or args.peer_methods)
    bench = sections.Bench(args.models, args.out, args.repeat, threads, say, tuple(peers), methods)
    results = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    noted = about(args, threads)
    for part in args.parts:
        print(f"# {part}", flush=True)
        found = measure(args, part, bench)
        if part == "costs":
            results.setdefault("costs", {}).update({size: {"about": noted, **rows} for size, rows in found.items()})
        else:
            results[part] = {"about": noted, **found}
        # After every part: an interrupted run keeps what it has.
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        if args.write:
            write(results, args.write)


if __name__ == "__main__":
    main()

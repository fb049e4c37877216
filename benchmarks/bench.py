"""Time and memory of whole `merge run` processes beside plain copying, all in one run on one machine.

    python benchmarks/bench.py --models bench --out bench-out --recipes linear ties

Makes the models if they are not there (about 2.2 GB each). The floor is `cat` of every input to /dev/null plus `cp` of
one of them, timed before and after each merge; times are quoted as ratios to it, since machines differ and drift.
Memory is the largest anonymous resident memory of the process (RssAnon), sampled 20 times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

RECIPES = {
    "passthrough": ("use: passthrough, of: tune1", ["tune1"]),
    "linear": ("use: linear, of: [tune1, tune2, tune3]", ["tune1", "tune2", "tune3"]),
    "slerp": ("use: slerp, of: [tune1, tune2], with: {t: 0.4}", ["tune1", "tune2"]),
    "task_arithmetic": (
        "use: task_arithmetic, base: base, of: [tune1, tune2], with: {lambda: 0.4}",
        ["tune1", "tune2"],
    ),
    "ties": ("use: ties, base: base, of: [tune1, tune2, tune3]", ["base", "tune1", "tune2", "tune3"]),
    "ties_tensor": (
        "use: ties, base: base, of: [tune1, tune2, tune3], with: {scope: tensor}",
        ["base", "tune1", "tune2", "tune3"],
    ),
    "dare_ties": (
        "use: dare_ties, base: base, of: [tune1, tune2, tune3], with: {drop_rate: 0.5}",
        ["base", "tune1", "tune2", "tune3"],
    ),
    "breadcrumbs": (
        "use: breadcrumbs, base: base, of: [tune1, tune2], with: {density: 0.9}",
        ["base", "tune1", "tune2"],
    ),
}


def floor(models: Path, names: list[str], out: Path) -> float:
    """Seconds to read every input and to copy one of them."""
    began = time.perf_counter()
    files = [str(file) for name in names for file in sorted((models / name).glob("*.safetensors"))]
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", *files], stdout=nowhere, check=True)
    subprocess.run(["cp", "-r", str(models / names[0]), str(out)], check=True)
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds


def merge(recipe: Path, threads: int) -> tuple[float, int]:
    """Wall seconds of one `merge run` process and its largest anonymous memory in bytes."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "mergekit_lite", "run", str(recipe), "--threads", str(threads)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")
    return time.perf_counter() - began, peak


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes, 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("bench"))
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if not (args.models / "tune3").exists():
        maker = Path(__file__).with_name("make_models.py")
        subprocess.run([sys.executable, str(maker), "--out", str(args.models)], check=True)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    print(f"{'recipe':16} {'floor s':>8} {'merge s':>8} {'ratio':>6} {'peak MB':>8}")
    for name in args.recipes:
        step, inputs = RECIPES[name]
        recipe = args.out / f"{name}.yaml"
        models = ", ".join(f"{m}: {(args.models / m).resolve()}" for m in ("base", "tune1", "tune2", "tune3"))
        target = (args.out / name).resolve()
        recipe.write_text(f"version: 1\nmodels: {{{models}}}\nsteps: {{m: {{{step}}}}}\nsave: {{to: {target}}}\n")
        for left in (target, target.with_name(f"{name}.partial")):
            shutil.rmtree(left, ignore_errors=True)
        before = floor(args.models, inputs, args.out / "copy")
        seconds, peak = merge(recipe, args.threads)
        after = floor(args.models, inputs, args.out / "copy")
        shutil.rmtree(target)
        base = (before + after) / 2
        rows.append({"recipe": name, "floor": base, "seconds": seconds, "ratio": seconds / base, "peak": peak})
        print(f"{name:16} {base:8.2f} {seconds:8.2f} {seconds / base:6.2f} {peak / 1e6:8.0f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

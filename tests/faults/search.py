"""Kill searches with `kill -9` at random moments, go on with them until they are done, and look at what came out.

    python tests/faults/search.py --times 20 --dir DIR

One search is not disturbed. Another, of the same recipe, is killed so many times, by itself or with the score command
that it is at, and must end with the same trials: none lost, none twice, with one job and `tpe` the same values and
scores. DIR is made and removed.

With --full the disk of the study's folder is full from some call on instead, and the same command goes on with room.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import layer
import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
SCORE = """\
import pathlib, sys, time
import numpy as np
from safetensors.numpy import load_file
found = load_file(pathlib.Path(sys.argv[1]) / "model.safetensors")
time.sleep(0.1)
print(sum(float(np.abs(found[n] - w).sum()) for n, w in load_file("goal.safetensors").items()))
"""
RECIPE = """\
version: 1
models: {{base: ./base, a: ./a, b: ./b}}
steps:
  m:
    use: {{choice: [ties, task_arithmetic]}}
    base: base
    of: [a, b]
    with: {{lambda: {{layers.0.*: {{search: [0, 1]}}, "*": {{search: [0, 1]}}}}}}
save: {{to: out/best}}
score: {{command: "{python} score.py {{model}}", goal: min}}
"""


def prepare(folder: Path) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("base", "a", "b", "goal"):
        tensors = {f"layers.{i}.w": rng.standard_normal((64, 64)).astype("float32") for i in range(4)}
        if name == "goal":
            save_file(tensors, folder / "goal.safetensors")
            continue
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text("{}", encoding="utf-8")
    (folder / "score.py").write_text(SCORE, encoding="utf-8")
    (folder / "r.yaml").write_text(RECIPE.format(python=sys.executable), encoding="utf-8")


def begin(folder: Path, out: str, trials: int, jobs: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "mergekit_lite", "search", "r.yaml", "--out", out, "--trials", str(trials)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    words += ["--jobs", str(jobs), "--json"]
    return subprocess.Popen(
        words,
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def whole(folder: Path, out: str, trials: int, jobs: int) -> list[dict[str, Any]]:
    child = begin(folder, out, trials, jobs)
    told, said = child.communicate()
    if child.returncode:
        sys.exit(f"{out} ended with {child.returncode}: {said}")
    found: list[dict[str, Any]] = json.loads(told)["trials"]
    return found


def campaign(folder: Path, out: str, args: argparse.Namespace, jobs: int, draws: random.Random) -> int:
    """Kill a study until that was done often enough; how often it was."""
    kills = 0
    while kills < args.times:
        # It has more to do than there is time for, so that each is killed at work.
        child = begin(folder, out, args.trials, jobs)
        until = time.monotonic() + draws.uniform(0.5, args.seconds)
        while child.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        if child.poll() is not None:
            break
        child.kill()
        child.communicate()
        kills += 1
    return kills


# Calls that need room, and the numbers of those from which on there is none.
CALLS = "open,write,pwrite,fsync,fdatasync,mkdir,rename,ftruncate,fallocate"
FROM = (1, 2, 3, 5, 9, 10, 12, 14, 16, 18, 20, 22, 25, 30, 40, 60, 90, 120, 149, 261, 295, 400, 542, 700)


def full(folder: Path) -> list[str]:
    """What was not as it should be, of searches on a disk without room."""
    (folder / "score.sh").write_text("#!/bin/sh\nstat -c %s $1/model.safetensors\n", encoding="utf-8")
    (folder / "score.sh").chmod(0o755)
    recipe = (folder / "r.yaml").read_text(encoding="utf-8").partition("score:")[0]
    (folder / "r.yaml").write_text(f'{recipe}score: {{command: "./score.sh {{model}}", goal: min}}\n', encoding="utf-8")
    (folder / "layer").mkdir()
    made = layer.Layer(folder / "layer")
    faults = []
    for first in FROM:
        shutil.rmtree(folder / "r.search", ignore_errors=True)
        words = ["search", "r.yaml", "--trials", "4", "--json"]
        stopped = made.start(words, f"path=/r.search/ calls={CALLS} from={first} errno=28", folder=folder)
        said = stopped.communicate()[1]
        again = made.start(words, folder=folder)
        told = again.communicate()[0]
        count = len(json.loads(told).get("trials", []))
        print(f"full from call {first}: exit {stopped.returncode}, then {again.returncode} with {count} trials")
        if stopped.returncode not in (0, 5) or (stopped.returncode and "hint" not in said) or count != 4:
            faults.append(f"full from call {first}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="kills")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=6.0, help="after which a search is killed at the latest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="disks that are full, in place of kills")
    parser.add_argument("--dir", type=Path, required=True)
    args = parser.parse_args()
    prepare(args.dir.resolve())
    if args.full:
        faults = full(args.dir.resolve())
        if faults:
            sys.exit(f"not as it should be: {', '.join(faults)}")
        shutil.rmtree(args.dir)
        return
    draws = random.Random(args.seed)
    undisturbed = whole(args.dir, "undisturbed", args.trials, 1)
    faults = []
    for jobs in (1, 3):
        out = f"jobs_{jobs}"
        kills = campaign(args.dir, out, args, jobs, draws)
        found = whole(args.dir, out, args.trials, jobs)
        states = {trial["state"] for trial in found}
        left = list((args.dir / out).glob("work/*"))
        same = [(t["values"], t["scores"]) for t in found] == [(t["values"], t["scores"]) for t in undisturbed]
        print(
            f"{jobs} jobs, {kills} kills: {len(found)} trials, all {states}, as undisturbed: {same}, left: {len(left)}"
        )
        if len(found) != args.trials or states != {"done"} or left or (jobs == 1 and not same):
            faults.append(out)
        by_value: dict[str, set[float]] = {}
        for trial in found:
            by_value.setdefault(json.dumps(trial["values"]), set()).add(trial["scores"]["score"])
        if any(len(scores) > 1 for scores in by_value.values()):
            faults.append(f"{out}: one recipe has two scores")
    if faults:
        sys.exit(f"not as it should be: {', '.join(faults)}; see {args.dir}")
    shutil.rmtree(args.dir)


if __name__ == "__main__":
    main()

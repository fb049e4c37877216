"""How much sooner a merge ends when ranks share it: one rank and several in turn, one thread each.

    python benchmarks/ranks.py recipe.yaml --out bench/ranks --ranks 2 --times 5

Prints medians and their ratio to one rank: of the whole command, and of the merge without its start (Python, torch,
the ranks finding each other). The ranks are started by hand, without the seconds that `accelerate launch` takes itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median


def merge(recipe: Path, out: Path, count: int) -> tuple[float, float]:
    """Seconds of the whole command and of the merge itself. Removes the result. Raises SystemExit where it fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, "-m", "mergekit_lite", "run", str(recipe), "--out", str(out), "--threads", "1", "--json"]
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    began = time.perf_counter()
    ranks = [
        subprocess.Popen(words, env=os.environ | place | {"RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in range(count)
    ]
    said, *_ = [rank.communicate()[0] for rank in ranks]
    whole = time.perf_counter() - began
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a run failed")
    shutil.rmtree(out)
    return whole, json.loads(said)["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, removed after each run")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--times", type=int, default=5)
    given = parser.parse_args()
    found: dict[int, list[tuple[float, float]]] = {1: [], given.ranks: []}
    for _ in range(given.times):
        for count, times in found.items():
            times.append(merge(given.recipe, given.out, count))
    for count, times in found.items():
        whole, inner = (median(column) for column in zip(*times, strict=True))
        first = [median(column) for column in zip(*found[1], strict=True)]
        ratios = f"ratio {whole / first[0]:.2f} and {inner / first[1]:.2f}"
        print(f"{count} rank{'s' * (count > 1)}: command {whole:.2f} s, merge {inner:.2f} s, {ratios}")


if __name__ == "__main__":
    main()

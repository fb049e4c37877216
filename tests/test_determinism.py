"""One recipe, one digest: for every recipe of the project, whatever the number of threads and ranks, the size of a
block, and whether the run was stopped and went on."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mergekit_lite import Result, load_recipe, plan, run
from mergekit_lite.run.progress import Progress
from tests.conftest import ROOT, Demo

# Not those whose models are on the Hub: tests/vocabulary has the like of a transplant, tests/run that of `moe`.
RECIPES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "recipes").rglob("*.yaml")
    if path.parent.name != "families" and path.name not in ("transplant.yaml", "moe.yaml")
)
THREADS = (1, 2)
BLOCKS = (97, 1 << 10, 1 << 18)  # elements; the networks' largest tensor has some thousands
PARTS = 4  # of the recipes, so that the tests of several ranks can run side by side

# Every rank runs this: the recipes, one after the other, each in a folder of its own. What rank 0 sees goes to a file.
SCRIPT = """
import json, os, sys
from tests.test_determinism import result_of
from mergekit_lite.run.ranks import launched

ranks, found = launched(), {}
for number, (recipe, threads, block, stop) in enumerate(json.loads(sys.argv[1])):
    os.chdir(f"at/{number}")
    found[f"{recipe} {threads} {block} {stop}"] = result_of(recipe, threads, block, stop, ranks)
    os.chdir("../..")
if not ranks.number:
    with open("found", "w") as file:
        json.dump(found, file)
"""


class Unplugged(Exception):
    pass


def shards(result: Result) -> dict[str, str]:
    """The digests of all files by path."""
    return {f"{to}/{file}": digest for to, files in result.shards.items() for file, digest in files.items()}


def result_of(recipe: str, threads: int, block: int, stop: bool, ranks: Any = None) -> dict[str, str]:
    """What a run in the working directory gives; with `stop` it is stopped after its first unit and goes on."""
    options: dict[str, Any] = {"threads": threads, "block": block, "ranks": ranks}

    def make() -> Any:
        return plan(load_recipe(recipe), threads=threads, block=block)

    made = ranks.agree(make) if ranks is not None else make()

    def unplug(progress: Progress) -> None:
        if progress.phase == "merge":
            raise Unplugged

    if stop:
        try:
            run(made, progress=unplug, **options)
        except Exception as fault:
            # Another rank's end is told as an error of ours.
            if not isinstance(fault, Unplugged) and "Unplugged" not in str(fault):
                raise
        else:
            raise AssertionError(f"{recipe} was not stopped")
        if ranks is not None:
            ranks.together(lambda: None, lambda nothing: None)  # all of them have let go of their journals
    return shards(run(made, resume=stop, **options))


def in_folder(folder: Path, demo: Demo) -> Path:
    """A working directory for the demo's recipes."""
    folder.mkdir(parents=True)
    for name in ("demo", "recipes"):
        (folder / name).symlink_to(demo.folder / name)
    return folder


def expected(recipe: str, folder: Path, demo: Demo, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(in_folder(folder, demo))
    return result_of(recipe, 1, BLOCKS[-1], False)


@pytest.mark.parametrize("recipe", RECIPES)
def test_threads_blocks_and_a_stop_change_nothing(
    recipe: str, demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = expected(recipe, tmp_path / "first", demo, monkeypatch)
    assert first
    for number, (threads, block, stop) in enumerate(itertools.product(THREADS, BLOCKS, (False, True))):
        monkeypatch.chdir(in_folder(tmp_path / str(number), demo))
        assert result_of(recipe, threads, block, stop) == first, (threads, block, stop)


@pytest.mark.parametrize("part", range(PARTS))
def test_ranks_change_nothing(part: int, demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = list(itertools.product(RECIPES[part::PARTS], THREADS, BLOCKS, (False, True)))
    for number in range(len(work)):
        in_folder(tmp_path / "at" / str(number), demo)
    found = _two_ranks(work, tmp_path)
    assert len(found) == len(work)
    wanted = {recipe: expected(recipe, tmp_path / recipe, demo, monkeypatch) for recipe in RECIPES[part::PARTS]}
    for name, digests in found.items():
        assert digests == wanted[name.split()[0]], name


def _two_ranks(work: list[tuple[str, int, int, bool]], folder: Path) -> Mapping[str, dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, json.dumps(work)],
            env=os.environ | place | {"PYTHONPATH": str(ROOT), "RANK": rank, "LOCAL_RANK": rank},
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        ended = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(ended)
    found: dict[str, dict[str, str]] = json.loads((folder / "found").read_text())
    return found

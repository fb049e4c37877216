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
import torch

from mergekit_lite import Result, load_recipe, plan, run
from mergekit_lite.run.progress import Progress
from tests.conftest import ROOT, Demo

RECIPES = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "families"
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


@pytest.fixture(scope="module")
def places(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """What recipes name, by where: the demo's networks, and language models in place of those on the Hub."""
    # Here, since every rank imports this file.
    from tests.run.dense_models import write_dense, write_states

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import vocabulary_models as maker

    monkeypatch.undo()
    folder = tmp_path_factory.mktemp("elsewhere")
    before = torch.get_rng_state()
    for seed, name in enumerate(("base", "math", "code")):
        write_dense(folder / "org" / name, "llama", seed)
    for seed, name in enumerate(("math", "code")):
        (folder / "stats" / name).mkdir(parents=True)
        write_states(folder / "stats" / name / "hidden.safetensors", seed)
    maker.write(folder / "org" / "small-model", maker.byte_level(maker.prose(), 420), 1)
    maker.write(folder / "org" / "large-model", maker.byte_level(maker.code(), 500), 2, hidden=24)
    torch.set_rng_state(before)
    of_demo = {name: demo.folder / name for name in ("demo", "recipes")}
    return of_demo | {name: folder / name for name in ("org", "stats")}


def in_folder(folder: Path, places: Mapping[str, Path]) -> Path:
    """A working directory for the project's recipes."""
    folder.mkdir(parents=True)
    for name, place in places.items():
        (folder / name).symlink_to(place)
    return folder


def expected(recipe: str, folder: Path, places: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(in_folder(folder, places))
    return result_of(recipe, 1, BLOCKS[-1], False)


@pytest.mark.parametrize("recipe", RECIPES)
def test_threads_blocks_and_a_stop_change_nothing(
    recipe: str, places: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = expected(recipe, tmp_path / "first", places, monkeypatch)
    assert first
    for number, (threads, block, stop) in enumerate(itertools.product(THREADS, BLOCKS, (False, True))):
        monkeypatch.chdir(in_folder(tmp_path / str(number), places))
        assert result_of(recipe, threads, block, stop) == first, (threads, block, stop)


@pytest.mark.parametrize("part", range(PARTS))
def test_ranks_change_nothing(
    part: int, places: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = list(itertools.product(RECIPES[part::PARTS], THREADS, BLOCKS, (False, True)))
    for number in range(len(work)):
        in_folder(tmp_path / "at" / str(number), places)
    found = _two_ranks(work, tmp_path)
    assert len(found) == len(work)
    wanted = {recipe: expected(recipe, tmp_path / recipe, places, monkeypatch) for recipe in RECIPES[part::PARTS]}
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

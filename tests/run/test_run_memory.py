"""Runs under `--memory`, each in a process of its own whose anonymous memory is watched."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from mergekit_lite import UsageError, load_recipe, plan, run
from mergekit_lite.plan.budget import memory_bytes, within
from mergekit_lite.plan.model import Unit
from mergekit_lite.plan.peak import block_bytes
from mergekit_lite.run.admission import Admission
from tests.faults.memory import STEPS, digests, merge, named_figure, write_models, write_recipe

LINUX = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the kernel does not say how much memory a process has"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of 6 million parameters, most of them in two matrices that come one after the other."""
    return write_models(tmp_path_factory.mktemp("memory") / "models", hidden=512, inner=640, layers=2, vocabulary=3000)


def recipe(models: Path, name: str, to: Path) -> Path:
    return write_recipe(to.with_suffix(".yaml"), models, STEPS[name], to)


@LINUX
@pytest.mark.parametrize(
    ("name", "more", "what"),
    [
        # Without a choice of threads and blocks it would take some 30 MB more than the figure.
        ("ties_global", (), "blocks of `lm_head.weight` of 4 models"),
        # Two threads that took up the two large matrices at once would take some 100 MB more.
        ("iso_c", ("--threads", "2"), "the whole of `lm_head.weight` of 4 models at once"),
    ],
)
def test_the_figure_of_a_refusal_is_kept(
    name: str, more: tuple[str, ...], what: str, models: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    path = recipe(models, name, out)
    refused = merge("run", str(path), "--memory", "90MB", *more)
    assert refused.code == 3 and f"`m` needs {what}" in refused.err
    assert not list(tmp_path.glob("out*[!l]")) and json.loads(refused.out)["error"]["exit_code"] == 3
    figure = named_figure(refused)
    assert figure is not None
    kept = merge("run", str(path), "--memory", figure, *more)
    assert kept.code == 0, kept.err
    assert 90_000_000 < kept.peak <= memory_bytes(figure)
    free = run(plan(load_recipe(path), out=tmp_path / "free"))
    assert digests(kept) == [digest for files in free.shards.values() for digest in files.values()]


@LINUX
def test_copies_need_no_torch(models: Path, tmp_path: Path) -> None:
    kept = merge("run", str(recipe(models, "stack", tmp_path / "out")), "--memory", "90MB")
    assert kept.code == 0 and kept.peak <= 90_000_000, kept.err


def test_a_plan_shows_what_it_has_chosen(models: Path, tmp_path: Path) -> None:
    path = recipe(models, "dare_ties", tmp_path / "out")
    shown = json.loads(merge("plan", str(path), "--memory", "4GB", "--threads", "1", "--block", "70000").out)
    assert (shown["threads"], shown["block"], shown["memory"]["budget"]) == (1, 70000, 4_000_000_000)
    assert shown["memory"]["peak"] <= 4_000_000_000


def test_a_run_does_not_go_beyond_its_plan(models: Path, tmp_path: Path) -> None:
    made = plan(load_recipe(recipe(models, "linear", tmp_path / "out")), memory="4GB", threads=2, block=100_000)
    for more in ({"threads": 3}, {"block": 100_001}, {"device": "cuda"}):
        with pytest.raises(UsageError):
            run(made, **more)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    run(made, threads=1)


def test_matrices_wait_for_room(models: Path, tmp_path: Path) -> None:
    """Of many threads only as many are at work as there is room for, and all get their turn."""
    free = plan(load_recipe(recipe(models, "iso_c", tmp_path / "out")))
    made = within(free, 500_000_000, 50_000_000, 8, None)
    assert made.memory is not None
    needs = {unit.id: block_bytes(unit.nodes, made.block, 4) for unit in made.units}
    assert sum(needs.values()) > made.memory.room
    admission, lock = Admission(made, lambda: None), threading.Lock()
    taken = [0]
    most = [0]

    def work(unit: Unit) -> None:
        with admission.of(unit):
            with lock:
                taken[0] += needs[unit.id]
                most[0] = max(most[0], taken[0])
            time.sleep(0.005)
            with lock:
                taken[0] -= needs[unit.id]

    threads = [threading.Thread(target=work, args=(unit,)) for unit in [*made.units, *made.units]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert taken[0] == 0 and max(needs.values()) <= most[0] <= made.memory.room


def test_a_unit_that_waits_is_stopped(models: Path, tmp_path: Path) -> None:
    free = plan(load_recipe(recipe(models, "iso_c", tmp_path / "out")))
    largest = max(free.units, key=lambda unit: block_bytes(unit.nodes, free.block, 4))
    made = within(free, 100_000_000 + 50_000_000 + block_bytes(largest.nodes, free.block, 4), 100_000_000, 1, None)

    def stopped() -> None:
        raise KeyboardInterrupt

    admission = Admission(made, stopped)
    with admission.of(largest), pytest.raises(KeyboardInterrupt), admission.of(largest):
        pass
    with admission.of(largest):  # what was taken is given back
        pass

"""Runs killed, torn, taken over: the bytes in the end are those of an undisturbed run, or nothing is touched."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from recipes_for_runs import STEPS as ENGINE_STEPS
from recipes_for_runs import digests as shard_digests
from recipes_for_runs import write_models as write_small_models
from recipes_for_runs import write_recipe as write_small_recipe

from mergekit_lite import InterruptedRun, RecipeError, StoppedError, load_recipe, plan, run
from mergekit_lite.plan.model import Plan
from mergekit_lite.run import execute, finish, journal, perform, sink, start
from mergekit_lite.run.journal import Journal
from tests.faults import kill
from tests.faults.kill import STEPS, Whole, digests, partial, units


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    kill.write_models(folder)
    return folder


@pytest.fixture(scope="module")
def whole(models: Path) -> Callable[[str], tuple[Path, Path, Whole]]:
    """`whole("ties")`: a recipe, its output folder, and what an undisturbed run of it gives."""
    known: dict[str, tuple[Path, Path, Whole]] = {}

    def get(name: str) -> tuple[Path, Path, Whole]:
        if name not in known:
            out = models / f"out_{name}"
            recipe = kill.write_recipe(models / f"{name}.yaml", models, STEPS[name], out)
            known[name] = (recipe, out, kill.undisturbed(recipe, out, 2))
        return known[name]

    return get


@pytest.mark.parametrize(
    "name, threads, seed",
    [("ties", 1, 1), ("ties", 2, 2), ("dare", 1, 3), ("linear", 2, 4), ("iso_c", 2, 5), ("permute", 1, 6)],
)
def test_killed_at_a_random_moment(
    name: str, threads: int, seed: int, whole: Callable[[str], tuple[Path, Path, Whole]]
) -> None:
    recipe, out, expected = whole(name)
    delay = random.Random(seed).uniform(0.1, 0.8) * expected.seconds
    killed = kill.kill_and_resume(recipe, out, threads, [delay])
    assert killed.digests == expected.digests
    assert not partial(out).exists()


def test_killed_twice_while_writing(whole: Callable[[str], tuple[Path, Path, Whole]]) -> None:
    recipe, out, expected = whole("dare")
    seen = [0]
    for flags in ((), ("--resume",)):
        code, *_ = kill.finish(kill.start(recipe, "--threads", "1", *flags, signal_at=f"unit 2 {signal.SIGKILL}"))
        assert code == -signal.SIGKILL
        seen.append(units(out))
    assert 0 < seen[1] < seen[2] and not out.exists()
    code, text, err = kill.finish(kill.start(recipe, "--resume"))
    assert code == 0, err
    assert json.loads(text)["resumed"] == seen[2]
    assert digests(out) == expected.digests
    shutil.rmtree(out)


def test_two_runs_into_one_output(whole: Callable[[str], tuple[Path, Path, Whole]]) -> None:
    """The second one stops, names the first, and harms nothing."""
    recipe, out, expected = whole("ties")
    made = plan(load_recipe(recipe))
    first = kill.start(recipe, signal_at=f"begin 1 {signal.SIGSTOP}")
    os.waitid(os.P_PID, first.pid, os.WSTOPPED)
    try:
        for resume in (False, True):
            with pytest.raises(StoppedError, match=rf"another run \(process {first.pid} on ") as stopped:
                run(made, resume=resume)
            # Never the advice to remove what another run is writing.
            assert stopped.value.exit_code == 5
            assert str(partial(out)) in str(stopped.value) and "remove" not in str(stopped.value)
    finally:
        first.send_signal(signal.SIGCONT)
    code, _, err = kill.finish(first)
    assert code == 0, err
    assert digests(out) == expected.digests
    # Nothing is left to resume, and a whole output is not touched.
    with pytest.raises(RecipeError, match="exists and is not empty"):
        plan(load_recipe(recipe))
    for resume in (False, True):
        with pytest.raises(StoppedError, match="has been taken since the plan was made"):
            run(made, resume=resume)
    assert not partial(out).exists()
    assert digests(out) == expected.digests
    shutil.rmtree(out)


# The journal and the files of a run that was stopped half way


class Unplugged(Exception):
    pass


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, a recipe `r.yaml`, and the remains of its run after seven units."""
    folder = tmp_path_factory.mktemp("stopped")
    write_small_models(folder / "models")
    recipe = write_small_recipe(folder / "r.yaml", folder / "models", ENGINE_STEPS["ties"], folder / "out")
    made = plan(load_recipe(recipe), threads=1)
    (folder / "expected").write_text(json.dumps(shard_digests(run(made, threads=1))))
    shutil.rmtree(folder / "out")

    def unplug(progress: execute.Progress) -> None:
        if progress.phase == "merge" and progress.tensors == 7:
            raise Unplugged

    with pytest.raises(Unplugged):
        run(made, threads=1, progress=unplug)
    (folder / "out.partial").rename(folder / "kept")
    return folder


@pytest.fixture
def remains(stopped: Path) -> Path:
    """The partial folder of the stopped run, fresh; `out` is gone."""
    for left in ("out", "out.partial"):
        shutil.rmtree(stopped / left, ignore_errors=True)
    shutil.copytree(stopped / "kept", stopped / "out.partial")
    return stopped / "out.partial"


def go_on(folder: Path, recipe: str = "r.yaml") -> tuple[list[str], int]:
    """Resume: the digests of the shards and the units taken over."""
    result = run(plan(load_recipe(folder / recipe), threads=1), threads=1, resume=True)
    return shard_digests(result), result.resumed


def test_a_torn_journal(stopped: Path, remains: Path) -> None:
    expected = json.loads((stopped / "expected").read_text())
    data = (stopped / "kept" / "journal.jsonl").read_bytes()
    head = data.index(b"\n") + 1
    first, last = data.index(b'{"unit"'), data.rindex(b'{"unit"')
    rng = random.Random(8)
    cuts = [len(data) - 1, *rng.sample(range(last, len(data)), 3), *rng.sample(range(first, last), 3)]
    cuts += [*rng.sample(range(head, first), 2), head, head - 5, 0]
    taken = []
    for cut in cuts:
        shutil.rmtree(stopped / "out", ignore_errors=True)
        shutil.copytree(stopped / "kept", remains, dirs_exist_ok=True)
        (remains / "journal.jsonl").write_bytes(data[:cut])
        found, resumed = go_on(stopped)
        assert found == expected, cut
        whole = data[: data.rfind(b"\n", 0, cut) + 1]
        assert resumed == whole.count(b'{"unit"')
        taken.append(resumed)
    assert max(taken) >= 6 and min(taken) == 0


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "where",
    [
        (perform, "check_tied"),
        (start, "_make_folder"),
        (sink.Files, "create"),
        (Journal, "begin"),
        (Journal, "pool"),
        (Journal, "unit"),
        (Journal, "safe"),
        (perform, "shard_digests"),
        (finish, "copy_extras"),
        (os, "rename"),
    ],
)
def test_stopped_by_ctrl_c(
    where: tuple[Any, str], late: bool, stopped: Path, remains: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it comes, the hint says what to do next, and that works."""
    shutil.rmtree(remains)
    owner, name = where
    original = getattr(owner, name)

    def interrupted(*arguments: Any, **options: Any) -> None:
        if late:
            original(*arguments, **options)
        raise KeyboardInterrupt

    made = plan(load_recipe(stopped / "r.yaml"), threads=1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(InterruptedRun) as found:
            run(made, threads=1)
    assert found.value.exit_code == 130
    (hint,) = [problem.hint for problem in found.value.problems]
    expected = json.loads((stopped / "expected").read_text())
    if hint == f"it had ended already: `{stopped / 'out'}` is whole":
        assert where == (os, "rename") and late
        assert [blake3(f.read_bytes()).hexdigest() for f in (stopped / "out").glob("*.safetensors")] == expected
        return
    resume = {"the same command with `--resume` goes on": True, "nothing was written: start it again": False}[
        hint or ""
    ]
    assert shard_digests(run(made, threads=2, resume=resume)) == expected


def test_a_machine_that_went_down(stopped: Path, remains: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was only written when the machine went down is done again; what was safe is not. Where it runs on, both are
    taken over."""
    expected = json.loads((stopped / "expected").read_text())
    lines = (remains / "journal.jsonl").read_bytes().splitlines(keepends=True)
    units = [line for line in lines if line.startswith(b'{"unit"')]
    rest = [line for line in lines[1:] if not line.startswith((b'{"unit"', b'{"safe"'))]
    told = [lines[0], *rest, *units[:4]]
    mark = len(b"".join(told))
    # Those behind the mark have no more than their line in the journal.
    text = b"".join([*told, b'{"safe":%d}\n' % mark, *units[4:]])
    boot = journal.boot()
    assert boot.encode() in text
    taken = {}
    for now in (boot, "another", ""):
        shutil.rmtree(stopped / "out", ignore_errors=True)
        shutil.copytree(stopped / "kept", remains, dirs_exist_ok=True)
        (remains / "journal.jsonl").write_bytes(text)
        if now != boot:
            _spoil(remains, plan(load_recipe(stopped / "r.yaml")), [json.loads(line)["unit"] for line in units[:4]])
        monkeypatch.setattr(journal, "boot", lambda now=now: now)
        found, taken[now] = go_on(stopped)
        assert found == expected, now
    assert taken == {boot: len(units), "another": 4, "": 4} and len(units) > 4


def _spoil(folder: Path, made: Plan, kept: list[int]) -> None:
    """Lose the bytes of all units but those `kept`."""
    safe = {(tensor.shard, tensor.start + byte) for unit in made.units if unit.id in kept for _, tensor in unit.targets
            for byte in range(unit.start * 4, unit.stop * 4)}  # fmt: skip
    for number, shard in enumerate(made.outputs[0].shards):
        data = bytearray((folder / shard.file).read_bytes())
        for place in range(len(shard.header), len(data)):
            if (number, place) not in safe:
                data[place] = 0xEE
        (folder / shard.file).write_bytes(data)


def test_a_disk_that_refuses_late(stopped: Path, remains: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes were taken by the system, which could not bring them to the disk: their units are done again, though a
    second attempt to sync would have gone well."""
    shutil.rmtree(remains)
    made = plan(load_recipe(stopped / "r.yaml"), threads=1)
    calls = []

    def sync(files: sink.Files) -> None:
        calls.append(files)
        if len(calls) == 3:  # 1: the new files; 2: after the first unit
            _spoil(remains, made, first)
            raise StoppedError("the disk refuses")
        original(files)

    def told(unit: execute.Progress) -> None:
        if unit.phase == "merge" and unit.tensors == 1:
            first.extend(units_of(remains))

    first: list[int] = []
    original = sink.Files.sync
    monkeypatch.setattr(sink.Files, "sync", sync)
    monkeypatch.setattr(execute, "SAFE_SECONDS", 0.0)
    with pytest.raises(StoppedError, match="the disk refuses"):
        run(made, threads=1, progress=told)
    assert first and units_of(remains) == first
    found, resumed = go_on(stopped)
    assert (found, resumed) == (json.loads((stopped / "expected").read_text()), len(first))


def units_of(folder: Path) -> list[int]:
    lines = (folder / "journal.jsonl").read_text().splitlines()
    return [json.loads(line)["unit"] for line in lines if line.startswith('{"unit"')]


def test_what_a_crash_left_is_run_over_again(stopped: Path, remains: Path) -> None:
    """Bytes that the journal does not speak of may be anything."""
    lines = (remains / "journal.jsonl").read_bytes().splitlines(keepends=True)
    units = [line for line in lines if b'"unit"' in line]
    (remains / "journal.jsonl").write_bytes(b"".join(line for line in lines if line not in units))
    for path in remains.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:start] + b"\xff" * (len(data) - start))
    assert go_on(stopped) == (json.loads((stopped / "expected").read_text()), 0)


def test_a_journal_of_another_recipe(stopped: Path, remains: Path) -> None:
    before = {path.name: path.read_bytes() for path in remains.iterdir()}
    write_small_recipe(stopped / "other.yaml", stopped / "models", ENGINE_STEPS["dare_ties"], stopped / "out")
    with pytest.raises(StoppedError, match="has changed since the run in"):
        go_on(stopped, "other.yaml")
    assert {path.name: path.read_bytes() for path in remains.iterdir()} == before


def test_a_journal_that_is_none(stopped: Path, remains: Path) -> None:
    head, rest = (remains / "journal.jsonl").read_bytes().split(b"\n", 1)
    for text in (
        b"no JSON\n" + rest,
        head + b"\n" + b'{"unit": 1}\n' + rest,
        head + b"\n[1]\n" + rest,
        head + b"\n\0\0\0\n" + rest,
    ):
        (remains / "journal.jsonl").write_bytes(text)
        with pytest.raises(StoppedError, match=r"the journal `.*journal.jsonl` is damaged"):
            go_on(stopped)
        assert (remains / "journal.jsonl").read_bytes() == text


@pytest.mark.parametrize("change", [-1, 1, None])
def test_a_shard_of_another_size(change: int | None, stopped: Path, remains: Path) -> None:
    (shard,) = remains.glob("*.safetensors")
    if change is None:
        shard.unlink()
    else:
        data = shard.read_bytes()
        shard.write_bytes(data + b"x" if change > 0 else data[:change])
    with pytest.raises(StoppedError, match=r"model.safetensors`"):
        go_on(stopped)
    assert (remains / "journal.jsonl").exists() and not (stopped / "out").exists()


def test_an_input_that_changed_meanwhile(stopped: Path, remains: Path) -> None:
    path = next((stopped / "models" / "b").glob("*.safetensors"))
    data = path.read_bytes()
    found = path.stat()
    path.write_bytes(data[:-1] + b"\x01")
    try:
        with pytest.raises(StoppedError, match="an input has changed since the run in"):
            go_on(stopped)
    finally:
        path.write_bytes(data)
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert go_on(stopped)[0] == json.loads((stopped / "expected").read_text())

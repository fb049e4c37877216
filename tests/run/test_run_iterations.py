"""Methods that iterate for minutes in one tensor: they tell how far they are, and stop when they are asked to."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_for_runs import digests, write_folder, write_recipe

from mergekit_lite import InputError, InterruptedRun, load_recipe, plan, run
from mergekit_lite.checkpoint.meta import TensorMeta
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.methods import wudi
from mergekit_lite.run import execute

STEPS = 40
ENDLESS = 300_000  # half a minute


@pytest.fixture
def models(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(1)
    for name in ("base", "a", "b", "c"):
        write_folder(tmp_path / name, {f"layers.{i}.weight": torch.randn(6, 5, generator=draw) for i in range(2)})
    return tmp_path


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of steps of the iterations that came to their end."""
    found: list[int] = []
    descend = wudi.descend

    def watched(start: torch.Tensor, gram: torch.Tensor, pull: torch.Tensor, steps: int, *rest: Any) -> torch.Tensor:
        result = descend(start, gram, pull, steps, *rest)
        found.append(steps)
        return result

    monkeypatch.setattr(wudi, "descend", watched)
    return found


def recipe(models: Path, steps: int, to: str = "out") -> Path:
    text = f"m: {{use: wudi, base: base, of: [a, b], with: {{steps: {steps}}}}}"
    return write_recipe(models / f"{to}.yaml", models, text, models / to)


def test_progress_within_a_tensor_changes_no_byte(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = digests(run(plan(load_recipe(recipe(models, STEPS, "silent"))), threads=1))
    monkeypatch.setattr(execute, "WITHIN_SECONDS", 0.0)
    seen: list[execute.Progress] = []
    made = plan(load_recipe(recipe(models, STEPS)))
    assert digests(run(made, threads=1, progress=seen.append)) == silent
    for i in range(2):
        within = [p for p in seen if p.within and p.label == f"layers.{i}.weight"]
        assert [p.within for p in within] == [(step, STEPS) for step in range(1, STEPS + 1)]
        # One tensor of two: its share of the bytes, on top of those of the tensor before.
        assert [p.done for p in within] == [120 * i + 120 * step // STEPS for step in range(1, STEPS + 1)]
    assert [p.done for p in seen if not p.within] == [120, 240]


def test_a_failure_while_statistics_are_measured_ends_a_long_iteration(
    models: Path, ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The magnitudes that `ties` ranks over all tensors are those of the iterations' results."""
    text = (
        f"w: {{use: wudi, base: base, of: [a, b], with: {{steps: {ENDLESS}}}}}\n"
        "  m: {use: ties, base: base, of: {w: {density: 0.5}}}"
    )
    file = write_recipe(models / "pool.yaml", models, text, models / "pool")
    made = plan(load_recipe(file), threads=2)
    assert made.pools
    read = Reader.read_bytes

    def unplugged(self: Reader, meta: TensorMeta, start: int, stop: int, buffer: memoryview) -> None:
        if meta.name == "layers.1.weight":
            raise InputError("unplugged")
        read(self, meta, start, stop, buffer)

    monkeypatch.setattr(Reader, "read_bytes", unplugged)
    with pytest.raises(InputError, match="unplugged"):
        run(made, threads=2)
    assert not ended


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_ends_a_long_iteration(models: Path, ended: list[int], threads: int) -> None:
    def interrupt(progress: execute.Progress) -> None:
        if progress.within:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRun, match="stopped by Ctrl-C"):
        run(plan(load_recipe(recipe(models, ENDLESS))), threads=threads, progress=interrupt)
    assert not ended


def test_a_failure_elsewhere_ends_a_long_iteration(models: Path, ended: list[int]) -> None:
    for name in ("base", "a", "b"):
        weights = {"layers.0.weight": torch.randn(6, 5), "layers.1.weight": torch.full((6, 5), torch.nan)}
        shutil.rmtree(models / name)
        write_folder(models / name, weights)
    with pytest.raises(InputError, match=r"layers\.1\.weight"):
        run(plan(load_recipe(recipe(models, ENDLESS))), threads=2, strict=True)
    assert not ended


def test_a_method_that_catches_everything_stops_all_the_same(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def stubborn(start: torch.Tensor, *settings: object) -> torch.Tensor:
        report = settings[-1]
        assert callable(report)
        for step in range(ENDLESS):
            time.sleep(1e-4)
            try:
                report(step, ENDLESS)
            except Exception:
                continue
        ended.append(ENDLESS)
        return start

    monkeypatch.setattr(wudi, "descend", stubborn)

    def interrupt(progress: execute.Progress) -> None:
        if progress.within:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRun):
        run(plan(load_recipe(recipe(models, ENDLESS))), threads=1, progress=interrupt)
    assert not ended

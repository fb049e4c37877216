"""Recipes, losses and inputs that no weights are learned of, and the memory that learning takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from learn_models import FACTORS, SOUP, STEPS, Models, Write, labelled
from safetensors.torch import save_file
from torch import Tensor

import mergekit_lite
from mergekit_lite.errors import MergeError, RecipeError, StoppedError, UsageError
from tests.cli.cli_process import environ


@pytest.mark.parametrize(
    ("step", "more", "said"),
    [
        ("{use: ties, base: base, of: {learned: [a, b]}}", "", "`ties` is no weighted sum"),
        ("{use: slerp, of: {learned: [a, b]}, with: {t: 0.5}}", "", "`slerp` is no weighted sum"),
        ("{use: linear, of: {learned: [a]}}", "", "at least two inputs"),
        ("{use: linear, of: {learned: [a, {model: b}]}}", "", "is a name, not"),
        ("{use: linear, of: {learned: [a, b], by: block}}", "", "`by` is model, layer or tensor"),
        ("{use: linear, of: {learned: [a, b], loss: mse}}", "", "`loss` is labels or entropy"),
        ("{use: linear, of: {learned: [a, b], epochs: 0}}", "", "`epochs` must be"),
        ("{use: linear, of: {learned: [a, b], rate: -1}}", "", "`rate` must be"),
        ("{use: linear, of: {learned: [a, b], accept: ge}}", "", "no key `accept`"),
        ("{use: linear, of: {learned: [a, b]}, with: {weight: 1}}", "", "`weight` is what is learned"),
        ("{use: linear, of: {learned: [a, nobody]}}", "", "nobody"),
        ("{use: linear, of: {learned: [a, b]}, with: {normalize: {choice: [true, false]}}}", "", "no other hole"),
        ("{use: task_arithmetic, base: base, of: {learned: [a, b]}, with: {lambda: 0}}", "", "other than 0"),
        ("{use: task_arithmetic, base: base, of: {learned: [a, b]}}", "", "needs `lambda`"),
        (
            "{use: task_arithmetic, base: base, of: {learned: [a, b]}, with: {lambda: 1, normalize: true}}",
            "",
            "not normalised",
        ),
        (
            "{use: linear, of: {learned: [a, b]}}",
            'score: {command: "s {model}", goal: max}\n',
            "from data, not by a score",
        ),
        ("{use: linear, of: {greedy: [a, b]}}", "", "no weights to be learned"),
        ("{use: linear, of: {learned: [a, b]}}", "  n: {use: linear, of: [m, c]}\n", "where it is what is saved"),
    ],
)
def test_recipes_that_cannot_be_learned(models: Models, write: Write, step: str, more: str, said: str) -> None:
    with pytest.raises(RecipeError) as fault:
        mergekit_lite.learn(write(step, more=more), labelled, models=models)
    assert any(said in problem.message for problem in fault.value.problems), fault.value.problems


def test_a_score_learns_no_weights(models: Models, write: Write) -> None:
    with pytest.raises(RecipeError, match="from data, not by a score"):
        mergekit_lite.search(write(SOUP), score=lambda tensors: 1.0, models=models)


def zeros(tensors: Mapping[str, Tensor], what: str) -> Mapping[str, Tensor]:
    return {what: torch.zeros(3)}


@pytest.mark.parametrize(
    ("loss", "batches", "kind", "said"),
    [
        (labelled, [], UsageError, "no data"),
        (lambda tensors: 0.5, None, UsageError, "a float, of which there is no gradient"),
        (lambda tensors: tensors["layers.0.bias"], None, UsageError, "no gradient"),
        (lambda tensors: labelled(tensors).detach(), None, UsageError, "does not depend"),
        (lambda tensors: labelled(tensors) / 0, None, StoppedError, "the loss is inf"),
        (lambda tensors: (1.0, zeros(tensors, "layers.0.bias")), None, UsageError, "do not fit: `layers.0.bias`"),
        (lambda tensors: (1.0, zeros(tensors, "other")), None, UsageError, "do not fit: `other`"),
        (None, None, UsageError, "by a loss or from data"),
    ],
)
def test_losses_that_cannot_be_learned_by(
    models: Models, write: Write, loss: Any, batches: Any, kind: type[MergeError], said: str
) -> None:
    with pytest.raises(kind) as fault:
        mergekit_lite.learn(write(SOUP), loss, batches=batches, models=models)
    assert said in fault.value.problems[0].message


def test_inputs_of_other_shapes_are_refused_by_name(models: Models, write: Write) -> None:
    models["b"]["layers.1.weight"] = torch.zeros(8, 3, dtype=torch.float64)
    with pytest.raises(MergeError, match=re.escape("layers.1.weight")):
        mergekit_lite.learn(write(SOUP), labelled, models=models)
    del models["b"]["layers.1.weight"]
    for missing in ("error", "skip"):  # of what is skipped there is nothing to learn, and the loss misses it
        step = SOUP.replace("}}", f"}}, missing: {missing}}}")
        with pytest.raises((MergeError, KeyError), match=re.escape("layers.1.weight")):
            mergekit_lite.learn(write(step), labelled, models=models)
    step = FACTORS.replace("with:", "missing: base, with:")
    with pytest.raises(RecipeError, match=r"`layers.1.weight` of the merge is not in `b`"):
        mergekit_lite.learn(write(step), labelled, models=models)


CHILD = """\
import sys, torch, mergekit_lite
def loss(tensors):
    return sum(t.sum().item() for t in tensors.values()), dict(tensors)
mergekit_lite.learn(sys.argv[1], loss, threads=1)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not say how much memory there is")
@pytest.mark.parametrize("kind", ["soup", "factors"])
def test_memory_does_not_grow_with_the_models(tmp_path: Path, kind: str) -> None:
    size = 6_000_000
    draw = torch.Generator().manual_seed(0)
    names = [f"m{i}" for i in range(8)]
    for name in names:
        (tmp_path / name).mkdir()
        tensors = {f"layers.{i}.w": torch.randn(size // 3, generator=draw) for i in range(3)}
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
    peaks = []
    for count in (2, 7):
        step = STEPS[kind].replace("a, b, c", ", ".join(names[1 : 1 + count])).replace("base: base", "base: m0")
        path = tmp_path / "r.yaml"
        models = json.dumps({name: str(tmp_path / name) for name in names[: 1 + count]})
        text = f"version: 1\nmodels: {models}\nsteps:\n  m: {step.replace('BESIDE', ', epochs: 2, by: layer')}\n"
        path.write_text(text, encoding="utf-8")
        peaks.append(peak([sys.executable, "-c", CHILD, str(path)]))
    assert peaks[0] > 4 * size  # the mix at least was seen
    assert peaks[1] - peaks[0] < 4 * size  # one of the five models that came to it


def peak(words: list[str]) -> int:
    """The largest RssAnon of a process that ends well, in bytes."""
    process = subprocess.Popen(words, env=environ(), stderr=subprocess.PIPE, text=True)
    largest, status = 0, Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        found = re.search(r"RssAnon:\s+(\d+)", status.read_text(encoding="utf-8"))
        largest = max(largest, int(found[1]) * 1024 if found else 0)
        time.sleep(0.002)
    assert process.returncode == 0, process.communicate()[1]
    return largest

"""A folder whose lock is not what a run writes: `doctor` finds a fault in it, and nothing worse."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mergekit_lite.report.promise import check_lock

DIGEST = "0" * 64


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def elsewhere(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def circle(path: Path) -> None:
    path.symlink_to(path.name)


def endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**11)


@pytest.mark.parametrize("trick", [pipe, device, elsewhere, circle, endless], ids=lambda f: f.__name__)
def test_a_lock_that_is_no_file_of_the_folder(trick: Callable[[Path], None], tmp_path: Path) -> None:
    trick(tmp_path / "recipe.lock.yaml")
    found = list(check_lock(tmp_path, 1))
    assert [check.verdict for check in found] == ["fail"]
    assert "root:" not in found[0].detail


OUTPUTS = [
    None, 3, "x", [3], [[3]], [None], [{}], [{"shards": None}], [{"shards": 3}], [{"shards": [{}]}], [[{"file": "x"}]],
    [[{"blake3": DIGEST}]], [[{"file": ["x"], "blake3": DIGEST}]], [[{"file": {}, "blake3": {}}]], {"a": 1},
    [[{"file": "../x", "blake3": DIGEST}]], [[{"file": "/etc/passwd", "blake3": DIGEST, "bytes": None}]],
]  # fmt: skip


@pytest.mark.parametrize("outputs", OUTPUTS, ids=json.dumps)
def test_a_lock_that_says_what_no_lock_says(outputs: object, tmp_path: Path) -> None:
    text = {"version": 1, "models": {"a": "./a"}, "save": {"step": "a", "to": "out"}, "lock": {"outputs": outputs}}
    (tmp_path / "recipe.lock.yaml").write_text(json.dumps(text))
    assert {check.verdict for check in check_lock(tmp_path, 1)} <= {"fail", "warn"}

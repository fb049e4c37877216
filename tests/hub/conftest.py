"""A Hub on loopback, and commands that use it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_process import TOKEN, Ran, environ
from server import Hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub without repositories; `TOKEN` is the token of the user `me`."""
    with Hub() as made:
        made.users[TOKEN] = "me"
        yield made


@pytest.fixture
def merge(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """`merge("run", "r.yaml", HF_TOKEN=TOKEN)` runs a command in a process of its own, in `tmp_path`, on the `hub`.

    In a process, since huggingface_hub reads its environment when it is imported.
    """
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, **more: str) -> Ran:
        words = [sys.executable, "-m", "mergekit_lite", *arguments]
        environment = environ(hub, tmp_path / "home", **more)
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        return Ran(done.returncode, done.stdout, done.stderr)

    return run

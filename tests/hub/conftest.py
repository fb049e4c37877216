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


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process in `tmp_path`, with `hub` as its Hub, a cache of its own, and waits of no time."""
    from huggingface_hub import constants

    from mergekit_lite.checkpoint import retry

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.001)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    return tmp_path

"""A loopback Hub that keeps the bodies that were sent to it, and outputs to push."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "hub"))
from hub_process import TOKEN, Ran, environ
from server import Hub, _Handler


class Watched(Hub):
    """A Hub with `bodies`: method, path and body of every request that had one."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: list[tuple[str, str, bytes]] = []
        for server in self._servers:
            server.RequestHandlerClass = _Keeping

    def sent_up(self, path: str = "/uploads/") -> int:
        """Bytes of weights that came in whole requests."""
        return sum(len(body) for method, where, body in list(self.bodies) if method == "PUT" and path in where)


class _Keeping(_Handler):
    def _read_body(self) -> bytes:
        body = super()._read_body()
        if body:
            self.server.hub.bodies.append((self.command, self.path, body))  # type: ignore[attr-defined]
        return body


@pytest.fixture
def hub() -> Iterator[Watched]:
    with Watched() as made:
        made.users[TOKEN] = "me"
        yield made


@pytest.fixture
def environment(hub: Watched, tmp_path: Path) -> dict[str, str]:
    return environ(hub, tmp_path / "home", HF_TOKEN=TOKEN)


@pytest.fixture
def merge(
    hub: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """`merge("push", "out", "me/x")` runs a command in this process, in `tmp_path`, as the user `me` of the `hub`."""
    import huggingface_hub.constants as constants
    from huggingface_hub.hf_api import HfApi
    from huggingface_hub.utils import _http

    from mergekit_lite import redact
    from mergekit_lite.cli.app import execute
    from mergekit_lite.publish import answers

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    plain = HfApi.__init__
    monkeypatch.setattr(
        HfApi, "__init__", lambda self, endpoint=None, **more: plain(self, endpoint or hub.address, **more)
    )
    monkeypatch.setattr(answers, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)

    def run(*arguments: str) -> Ran:
        capsys.readouterr()
        code = execute(arguments)
        out, err = capsys.readouterr()
        redact.refresh()
        return Ran(code, out, err)

    return run

"""`merge doctor` and a Hub on loopback: reach, token and cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_process import TOKEN, Ran
from server import Fault, Hub

from mergekit_lite.report import reach
from mergekit_lite.report.check import Check

Merge = Callable[..., Ran]
BAD = "hf_nobodysTOKEN9876543210"


def checks(offline: bool = False) -> dict[str, Check]:
    return {check.name: check for check in reach.reach(offline)}


def told(ran: Ran) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in json.loads(ran.out)["environment"]}


@pytest.fixture
def closed() -> str:
    """An address where nobody listens any more."""
    with Hub() as gone:
        return gone.address


@pytest.mark.parametrize(
    ("token", "verdict", "words"),
    [
        (TOKEN, "ok", "HF_TOKEN, valid, of the user `me`, kind `write`"),
        (BAD, "fail", "HF_TOKEN, refused by the Hub with 401"),
        (None, "ok", "none, and public models need none"),
    ],
)
def test_the_token(
    hub: Hub, here: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, verdict: str, words: str
) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    found = checks()
    assert found["token"].verdict == verdict and words in found["token"].detail
    assert found["hub"].verdict == "ok" and re.search(r"answers in \d", found["hub"].detail)
    assert [request.token for request in hub.log if request.path == "/api/whoami-v2"] == [token]
    assert BAD not in str(found) and TOKEN not in str(found)


def test_a_token_of_the_login_is_found_and_never_shown(hub: Hub, merge: Merge, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/token").write_text(BAD)
    ran = merge("doctor")
    assert ran.code == 1 and BAD not in ran.out + ran.err
    assert "of `hf auth login`, refused" in ran.out and f"{hub.address}/settings/tokens" in ran.out


def test_a_hub_that_cannot_be_reached(here: Path, monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    """A failure, unless offline work is asked for: then nothing is asked, and there is a warning."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", closed)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    found = checks()
    assert found["hub"].verdict == "fail" and "ConnectError" in found["hub"].detail
    assert found["token"].verdict == "warn"
    found = checks(offline=True)
    assert found["hub"].verdict == "warn" and "`--offline`" in found["hub"].detail
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = checks()
    assert found["hub"].verdict == "warn" and "HF_HUB_OFFLINE" in found["hub"].detail
    assert (found["token"].verdict, found["token"].detail) == ("ok", "HF_TOKEN, not checked")


def test_offline_asks_nothing(hub: Hub, here: Path) -> None:
    assert checks(offline=True)["hub"].verdict == "warn"
    assert hub.log == []


def test_a_sandbox_asks_nothing_and_writes_inside(hub: Hub, merge: Merge, tmp_path: Path) -> None:
    (tmp_path / "box").mkdir()
    ran = merge("doctor", "--sandbox", "box", "--json")
    assert (ran.code, told(ran)["hub"]["verdict"]) == (0, "warn"), ran.out + ran.err
    assert str(tmp_path / "box") in told(ran)["disk"]["detail"] and "write" in told(ran)["disk speed"]["detail"]
    assert hub.log == [] and list((tmp_path / "box").iterdir()) == []


def test_a_slow_hub(hub: Hub, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.append(Fault("whoami", delay=0.3))
    monkeypatch.setattr(reach, "SLOW", 0.1)
    assert checks()["hub"].verdict == "warn"
    monkeypatch.setattr(reach, "TIMEOUT", 0.1)
    found = checks()["hub"]
    assert found.verdict == "fail" and "Timeout" in found.detail


@pytest.mark.parametrize(
    ("status", "hub_is", "token_is"),
    [(404, "ok", "warn"), (429, "warn", "warn"), (503, "warn", "warn"), (403, "ok", "fail")],
)
def test_other_answers(
    hub: Hub, here: Path, monkeypatch: pytest.MonkeyPatch, status: int, hub_is: str, token_is: str
) -> None:
    """A mirror that knows no users is a Hub all the same."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.faults.append(Fault("whoami", status=status))
    found = checks()
    assert (found["hub"].verdict, found["token"].verdict) == (hub_is, token_is)


def test_something_else_that_answers(hub: Hub, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of a network that wants a login: 200, and no user's name."""
    hub.faults.append(Fault("whoami", status=200))
    assert checks()["hub"].verdict == "fail"


def test_a_token_that_breaks_off(hub: Hub, here: Path) -> None:
    hub.faults.append(Fault("whoami", cut=3))
    assert checks()["hub"].verdict == "fail"


def test_the_cache(hub: Hub, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "empty" in checks()["cache"].detail
    (here / "cache/models--a/blobs").mkdir(parents=True)
    (here / "cache/models--a/blobs/x").write_bytes(b"0" * 2_000_000)
    (here / "cache/models--a/link").symlink_to("blobs/x")
    assert "2.0 MB in it" in checks()["cache"].detail
    monkeypatch.setattr(reach, "free_bytes", lambda folder: 10**6)
    assert checks()["cache"].verdict == "warn"
    (here / "a-file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "a-file" / "hub"))
    assert checks()["cache"].verdict == "fail"

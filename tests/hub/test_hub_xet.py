"""A Hub whose large files lie in Xet: streams need nothing of it, and pushes go through `hf_xet` or without."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_models import model, recipe, weights
from hub_process import TOKEN, Ran, environ
from server import Fault, Hub

import mergekit_lite

FILES = {name: model(seed) for seed, name in enumerate(("base", "math", "code"))}
OF_XET = r"/xet-read-token/|/xet-write-token/|/v[12]/|/xorbs/"
# Its own waits between tries are seconds.
QUICK = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2", "HF_XET_CLIENT_RETRY_BASE_DELAY": "1ms"}
Merge = Callable[..., Ran]


@pytest.fixture
def models(hub: Hub) -> Hub:
    hub.xet = True
    for name, files in FILES.items():
        hub.add(f"org/{name}", files)
    return hub


def run(merge: Merge, fetch: str, out: str, **variables: str) -> list[str]:
    """The digests of a merge of `org/math` and `org/code`."""
    Path("r.yaml").write_text(recipe("linear"))
    ran = merge("run", "r.yaml", "--fetch", fetch, "--out", out, "--json", **variables)
    assert ran.code == 0, ran.err
    return [shard["blake3"] for shard in json.loads(ran.out)["outputs"][0]["shards"]]


def paths(hub: Hub, pattern: str) -> set[str]:
    return {request.path for request in hub.log if re.search(pattern, request.path)}


@pytest.mark.parametrize("variables", [{}, {"HF_HUB_DISABLE_XET": "1"}], ids=["with", "without"])
def test_ranges_come_through_the_bridge(variables: dict[str, str], models: Hub, merge: Merge) -> None:
    streamed = run(merge, "stream", "far", **variables)
    assert paths(models, OF_XET) == set() and paths(models, "/objects/") == set()
    headers = sum(r.sent for r in models.log if r.range == "bytes=0-65535")
    needed = weights(FILES["math"]) + weights(FILES["code"])
    assert needed <= models.sent("/xet-bridge-us/") <= needed + headers + 2 * 4
    assert {request.token for request in models.log if "/xet-bridge-us/" in request.path} == {None}
    assert run(merge, "cache", "near", **variables) == streamed
    assert bool(paths(models, "/v1/reconstructions/")) == (not variables)  # the Hub's client takes what is there


def test_an_address_of_the_bridge_may_be_over(models: Hub, here: Path) -> None:
    def merged(to: str) -> list[str]:
        Path("r.yaml").write_text(recipe("linear"))
        plan = mergekit_lite.plan(mergekit_lite.load_recipe("r.yaml"), out=to, fetch="stream")
        return list(mergekit_lite.run(plan).shards[to].values())

    models.faults[:] = [Fault("/xet-bridge-us/", status=403, times=1, after=after) for after in range(4, 20, 4)]
    streamed = merged("far")
    assert sum(request.status == 403 for request in models.log) > 2
    models.faults.clear()
    assert merged("again") == streamed


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output of two models in folders."""
    folder = tmp_path_factory.mktemp("output")
    for name in ("math", "code"):
        (folder / name).mkdir()
        for file, data in FILES[name].items():
            (folder / name / file).write_bytes(data)
    text = recipe("linear").replace("org/", f"{folder}/")
    (folder / "r.yaml").write_text(text)
    mergekit_lite.run(mergekit_lite.plan(mergekit_lite.load_recipe(folder / "r.yaml"), out=folder / "out"))
    return folder / "out"


@pytest.mark.parametrize("variables", [{}, {"HF_HUB_DISABLE_XET": "1"}], ids=["with", "without"])
def test_a_push(variables: dict[str, str], models: Hub, merge: Merge, output: Path) -> None:
    for words in (["me/x"], ["me/y", "--pr", "--public"]):
        ran = merge("push", str(output), *words, HF_TOKEN=TOKEN, **variables)
        assert ran.code == 0 and "pushed to" in ran.out, ran.err
        assert models.signature not in ran.out + ran.err and TOKEN not in ran.out + ran.err
    assert bool(models.xorbs) == bool(paths(models, "/v1/shards")) == (not variables)
    assert bool(paths(models, "/uploads/")) == bool(variables)
    for repo, ref in (("me/x", "main"), ("me/y", "refs/pr/1")):
        files = models.repos[repo].at(ref).files
        for path in output.glob("*.safetensors"):
            assert files[path.name].large and files[path.name].data == path.read_bytes()
    commits = len(models.repos["me/x"].commits)
    again = merge("push", str(output), "me/x", HF_TOKEN=TOKEN, **variables)
    assert "nothing has changed" in again.out and len(models.repos["me/x"].commits) == commits


def test_refusals_of_xet(models: Hub, merge: Merge, output: Path) -> None:
    """What `hf_xet` raises is of no class of the Hub's client and has the status in its words alone. What is told holds
    no secret, and the same command goes well later."""
    for where, fault, code, says in (
        ("/xet-write-token/", {"status": 401}, 4, "does not accept the token"),
        ("/v1/xorbs/", {"status": 500}, 5, "answered 500"),
        ("/v1/xorbs/", {"cut": 0}, 5, "the connection to the Hub failed"),
        ("/v1/shards", {"status": 429, "headers": {"Retry-After": "1"}}, 5, "asks for fewer requests"),
    ):
        models.faults[:] = [made := Fault(where, **fault)]
        ran = merge("push", str(output), "me/x", HF_TOKEN=TOKEN, **QUICK)
        assert made.hit and ran.code == code and says in ran.err, ran.err
        assert "hint: " in ran.err and "Traceback" not in ran.err
        for secret in (TOKEN, "xetTOKENof", models.signature, "http://", "127.0.0.1"):
            assert secret not in ran.out + ran.err
        assert set(models.repos["me/x"].files) == {".gitattributes"}
    models.faults.clear()
    assert merge("push", str(output), "me/x", HF_TOKEN=TOKEN).code == 0


def test_ctrl_c_ends_an_upload(models: Hub, output: Path, tmp_path: Path) -> None:
    models.faults[:] = [Fault("/v1/xorbs/", delay=60.0)]
    push = subprocess.Popen(
        [sys.executable, "-m", "mergekit_lite", "push", str(output), "me/x"],
        env=environ(models, tmp_path / "home", HF_TOKEN=TOKEN),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while push.poll() is None and not models.faults[0].hit:
        time.sleep(0.01)
    time.sleep(0.3)
    push.send_signal(signal.SIGINT)
    try:
        _, err = push.communicate(timeout=30)
    finally:
        push.kill()
    assert push.returncode == 130 and "Traceback" not in err, err
    assert set(models.repos["me/x"].files) == {".gitattributes"}

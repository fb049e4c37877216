"""Several processes that stream one merge from the Hub, and recipes of which some models lie on this disk."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hub_models import model, weights
from hub_process import environ
from server import Fault, Hub

import mergekit_lite
from mergekit_lite.merge import Fetch

FILES = {name: model(seed) for seed, name in enumerate(("base", "math", "code"))}
COUNT = 2
# Two models on the Hub, one of them at a branch, and one in a folder.
MIXED = (
    "version: 1\nmodels: {base: ./base, math: org/math, code: org/code@dev}\n"
    "steps:\n"
    "  m: {use: task_arithmetic, base: base, of: {math: {weight: 0.7}, code: {weight: 0.4}}, with: {lambda: 1.0}}\n"
    "save: {to: out, shard: 300KB, dtype: bfloat16}\n"
)


@pytest.fixture
def mixed(hub: Hub, here: Path) -> Hub:
    """`math` and the branch `dev` of `code` on the Hub, `base` in a folder, and `r.yaml` of the three."""
    for name in ("math", "code"):
        hub.add(f"org/{name}", FILES[name])
    hub.repos["org/code"].put({"config.json": FILES["base"]["config.json"]}, "dev")
    Path("base").mkdir()
    for file, data in FILES["base"].items():
        Path("base", file).write_bytes(data)
    Path("r.yaml").write_text(MIXED)
    return hub


def digests(to: str, fetch: Fetch) -> list[str]:
    plan = mergekit_lite.plan(mergekit_lite.load_recipe("r.yaml"), out=to, threads=2, fetch=fetch)
    return list(mergekit_lite.run(plan, threads=2).shards[to].values())


def start_ranks(hub: Hub, folder: Path, *words: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    place = {"WORLD_SIZE": str(COUNT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "mergekit_lite", "run", "r.yaml", "--fetch", "stream", "--threads", "1", *words],
            env=environ(hub, folder / "home", **place, RANK=str(rank), LOCAL_RANK=str(rank)), cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(COUNT)
    ]  # fmt: skip


def end(ranks: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    try:
        return [(rank.wait(timeout=120), *rank.communicate(timeout=10)) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def made(text: str) -> list[str]:
    return [shard["blake3"] for shard in json.loads(text)["outputs"][0]["shards"]]


def test_models_here_and_there(mixed: Hub, here: Path) -> None:
    streamed = digests("far", "stream")
    headers = sum(request.sent for request in mixed.log if request.range == "bytes=0-65535")
    needed = weights(FILES["math"]) + weights(FILES["code"])
    assert needed <= mixed.sent("/objects/") <= needed + headers + 2 * 4
    lock = mergekit_lite.load_recipe("far/recipe.lock.yaml")
    assert lock.lock is not None
    kinds = {name: sorted(files[0].keys() - {"file", "bytes"}) for name, files in lock.lock["inputs"].items()}
    assert kinds == {"base": ["blake3"], "math": ["sha256"], "code": ["sha256"]}
    assert lock.models["code"].revision == mixed.repos["org/code"].refs["dev"]
    assert digests("near", "cache") == streamed


def test_ranks_share_what_is_fetched(mixed: Hub, here: Path) -> None:
    """Each rank fetches its stretch of the files, and all of the headers: the blocks at the seam twice."""
    from mergekit_lite.checkpoint.remote import block_size

    alone = digests("alone", "cache")
    mixed.log.clear()
    (code, out, err), (other, _, more) = end(start_ranks(mixed, here, "--json"))
    assert (code, other) == (0, 0), err + more
    assert made(out) == alone
    headers = sum(request.sent for request in mixed.log if request.range == "bytes=0-65535")
    fetched = mixed.sent("/objects/") - headers
    needed = weights(FILES["math"]) + weights(FILES["code"])
    last = 2 * COUNT * 4  # the last byte of each file, before and after
    assert needed - headers <= fetched <= needed + 2 * block_size(2) + last
    # Told after all have merged: their own looks at the end are not in it.
    assert fetched - 4 * COUNT <= json.loads(out)["bytes_fetched"] <= fetched


def test_a_rank_that_is_killed(mixed: Hub, here: Path) -> None:
    """The other one stops and says which; one process goes on and gives the same bytes."""
    alone = digests("alone", "stream")
    late = [mixed.repos[f"org/{name}"].files["model-00002-of-00002.safetensors"].sha256 for name in ("math", "code")]
    # Beyond the headers, the looks of both ranks at the last bytes.
    mixed.faults[:] = [Fault("|".join(late), after=4 * COUNT, delay=30.0)]
    ranks = start_ranks(mixed, here)
    partial = here / "out.partial"

    def units() -> int:
        return sum(path.read_text().count('"unit"') for path in partial.glob("journal*.jsonl"))

    while all(rank.poll() is None for rank in ranks) and not (mixed.faults[0].hit and units()):
        time.sleep(0.02)
    ranks[1].kill()
    mixed.faults.clear()
    (code, _, err), (killed, _, _) = end(ranks)
    assert (code, killed) == (5, -signal.SIGKILL), err
    assert "rank 1" in err and "`--resume` goes on" in err
    kept = units()
    plan = mergekit_lite.plan(mergekit_lite.load_recipe("r.yaml"), fetch="stream")
    result: Any = mergekit_lite.run(plan, threads=1, resume=True)
    assert result.resumed == kept > 0 and list(result.shards["out"].values()) == alone

"""Looking at models on the Hub: what `merge inspect` and `merge diff` fetch, and that they see what is seen on disk."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_models import large_shard, model, weights
from hub_process import environ
from server import Fault, Hub

from mergekit_lite.cli.app import execute
from tests.adapter_files import factors, write_adapter

FILES = {name: model(seed) for seed, name in enumerate(("math", "code"))}
Told = Callable[..., Any]


@pytest.fixture
def told(here: Path, capsys: pytest.CaptureFixture[str]) -> Told:
    """`told("inspect", "org/math")` is what a command says as JSON; its exit code stands under `exit`."""

    def run(*words: str) -> Any:
        capsys.readouterr()
        code = execute([*words, "--json"])
        out, err = capsys.readouterr()
        assert code < 2, err + out
        return {**json.loads(out), "exit": code}

    return run


@pytest.fixture
def models(hub: Hub, here: Path) -> Hub:
    """`org/math` and `org/code` on the Hub, and the same two in folders `math` and `code`."""
    for name, files in FILES.items():
        hub.add(f"org/{name}", files)
        Path(name).mkdir()
        for file, data in files.items():
            Path(name, file).write_bytes(data)
    return hub


def without_place(seen: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in seen.items() if key not in ("location", "revision", "a", "b")}


def is_kept(folder: Path) -> bool:
    """Whether weights have been downloaded."""
    return any(folder.rglob("*.safetensors"))


def test_inspect_reads_headers_alone(hub: Hub, told: Told, here: Path) -> None:
    size = large_shard(here / "model.safetensors", 64 << 20).stat().st_size
    hub.add("org/large", {"model.safetensors": here / "model.safetensors", "config.json": b"{}", "vocab.txt": b"a\n"})
    seen = told("inspect", "org/large@main", "--tensors")
    assert seen["bytes"] == 64 << 20 and size > 1000 * 65_536
    assert hub.sent() < 65_536 + 5_000  # the first part of the file, and what the Hub says of the model
    assert seen["revision"] == hub.repos["org/large"].refs["main"]
    assert seen["beside"] == {"config.json": 2, "vocab.txt": 2}
    assert not is_kept(here / "cache")


@pytest.mark.parametrize("fetch", ["stream", "cache"])
def test_what_is_seen_there_is_what_is_seen_here(fetch: str, models: Hub, told: Told, here: Path) -> None:
    for words in ([], ["--tensors"], ["--spaces"], ["--stats", "--fetch", fetch]):
        assert without_place(told("inspect", "org/math", *words)) == without_place(told("inspect", "math", *words))
    assert is_kept(here / "cache") == (fetch == "cache")


def test_statistics_are_streamed_once(models: Hub, told: Told) -> None:
    told("inspect", "org/math", "--stats", "--fetch", "stream")
    headers = sum(r.sent for r in models.log if r.range == "bytes=0-65535")
    assert models.sent("/objects/") - headers <= weights(FILES["math"])


@pytest.mark.parametrize("ends", [["org/math", "org/code"], ["math", "org/code"], ["org/math", "org/math"]])
def test_a_diff_is_streamed_once(ends: list[str], models: Hub, told: Told, here: Path) -> None:
    near = told("diff", *(end.removeprefix("org/") for end in ends), "--all")
    assert models.log == []
    far = told("diff", *ends, "--all", "--fetch", "stream")
    assert without_place(far) == without_place(near) and far["exit"] == near["exit"] == (ends[0] != ends[1])
    headers = sum(r.sent for r in models.log if r.range == "bytes=0-65535")
    needed = sum(weights(FILES[end.removeprefix("org/")]) for end in set(ends) if end.startswith("org/"))
    assert 0.9 * needed < models.sent("/objects/") - headers <= needed
    assert not is_kept(here / "cache")
    assert without_place(told("diff", *ends, "--all")) == without_place(near) and is_kept(here / "cache")


def test_a_late_difference_is_not_fetched_twice(
    hub: Hub, told: Told, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that differs in its last number alone, with blocks of which hardly any fit into memory."""
    import torch
    from safetensors.torch import save

    from mergekit_lite.checkpoint import remote

    for name, value in (("AHEAD", 1 << 14), ("_LEAST", 1 << 12), ("_MOST", 1 << 12)):
        monkeypatch.setattr(remote, name, value)
    values = torch.arange(400_000, dtype=torch.float32)
    total = 0
    for name, last in (("one", 1.0), ("two", 2.0)):
        data = save({"w": torch.cat([values, torch.tensor([last])])})
        total += len(data)
        hub.add(f"org/{name}", {"model.safetensors": data})
    found = told("diff", "org/one", "org/two", "--fetch", "stream", "--threads", "1")
    assert found["tensors"][0]["differing"] == 1 and found["max_abs"] == 1.0
    assert hub.sent("/objects/") <= total + 2 * 65_536


def test_an_adapter_is_seen_and_merged_by_its_header(models: Hub, told: Told, here: Path) -> None:
    shapes = {f"model.layers.{n}.self_attn.q_proj": (64, 64) for n in range(3)}
    folder = write_adapter(here / "lora", factors(shapes, rank=16))
    models.add("org/lora", folder)
    size = (folder / "adapter_model.safetensors").stat().st_size
    near = told("inspect", str(folder), "--tensors")
    assert without_place(told("inspect", "org/lora", "--tensors")) == without_place(near)
    recipe = "version: 1\nmodels: {m: {path: org/math, adapter: org/lora}}\nsave: {step: m, to: OUT}\n"
    made = {}
    for fetch in ("stream", "cache"):
        Path(f"{fetch}.yaml").write_text(recipe.replace("OUT", f"out/{fetch}"))
        planned = told("plan", f"{fetch}.yaml") if fetch == "stream" else {}
        ran = told("run", f"{fetch}.yaml", "--fetch", fetch)
        made[fetch] = [shard["blake3"] for shard in ran["outputs"][0]["shards"]]
        if fetch == "stream":
            assert planned["bytes_fetched"] == weights(FILES["math"]) - header_bytes() + adapter_bytes(near)
            assert not is_kept(here / "cache")
            headers = [r for r in models.log if r.range and r.range.startswith("bytes=0-")]
            assert models.sent("/objects/") <= weights(FILES["math"]) + sum(r.sent for r in headers) + size + 12
    assert made["stream"] == made["cache"]


def header_bytes() -> int:
    files = [data for name, data in FILES["math"].items() if name.endswith(".safetensors")]
    return sum(8 + int.from_bytes(data[:8], "little") for data in files)


def adapter_bytes(seen: Any) -> int:
    return sum(tensor["bytes"] for tensor in seen["list"])


@pytest.mark.parametrize("words", [["inspect", "org/math"], ["diff", "org/math", "org/code", "--fetch", "stream"]])
@pytest.mark.parametrize("after", [0, 3])
def test_ctrl_c_does_not_wait(words: list[str], after: int, models: Hub, here: Path) -> None:
    """Amid the headers, and amid the weights, of a Hub that asks to wait for minutes."""
    if after and words[0] == "inspect":
        words = [*words, "--stats", "--fetch", "stream"]
    models.faults[:] = [Fault("/objects/", after=after, status=429, headers={"Retry-After": "500"})]
    run = subprocess.Popen(
        [sys.executable, "-m", "mergekit_lite", *words],
        env=environ(models, here / "home"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while run.poll() is None and not models.faults[0].hit:
        time.sleep(0.01)
    time.sleep(0.3)
    run.send_signal(signal.SIGINT)
    try:
        _, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130 and "Traceback" not in err and models.signature not in err, err

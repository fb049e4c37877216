"""Pipelines and sentence-transformers models from the Hub: what is fetched of them, and what comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from form_files import WEIGHTS, Files, files_of, pipeline, put, sentences, stored, tensors
from hub_process import TOKEN, Ran
from safetensors.torch import save
from server import Hub

import mergekit_lite
from mergekit_lite.merge import Fetch
from mergekit_lite.report.verify import verify

RECIPE = """version: 1
models: {a: org/a, b: org/b}
steps: {m: {use: linear, of: {a: {weight: 1}, b: {weight: 1}}}}
save: {step: m, to: out}
"""
OURS = {"README.md", "recipe.yaml", "recipe.lock.yaml"}
# What repositories of pipelines hold too: the same weights in one file and for other runtimes, and code.
LARGE = save({"x": tensors(1, x=(300, 300))["x"]})
UNUSED = {
    "sd.safetensors": LARGE, "unet_old/model.safetensors": LARGE, "unet/model.onnx": LARGE, "vae/old.bin": LARGE,
    "unet/diffusion_pytorch_model.fp16.safetensors": LARGE, "pipeline.py": b"raise SystemExit", "big.json": b"[]",
}  # fmt: skip


def merged(fetch: Fetch, to: str, offline: bool = False) -> Files:
    Path("r.yaml").write_text(RECIPE)
    plan = mergekit_lite.plan(mergekit_lite.load_recipe("r.yaml"), out=to, threads=1, fetch=fetch, offline=offline)
    mergekit_lite.run(plan, threads=1)
    assert verify(to).faults == ()
    return files_of(Path(to))


@pytest.mark.parametrize("form", [pipeline, sentences])
def test_streamed_cached_and_local_merges_are_one(form: Callable[[int], Files], hub: Hub, here: Path) -> None:
    files = {"a": form(1), "b": form(2)}
    for name, data in files.items():
        hub.add(f"org/{name}", data | UNUSED)
    streamed = merged("stream", "streamed")
    assert not list((here / "cache").rglob("*.safetensors"))
    assert not [path for path in (here / "cache").rglob("*") if path.name in {Path(name).name for name in UNUSED}]
    before = hub.sent()
    cached = merged("cache", "cached")
    assert hub.sent() - before < len(LARGE)
    assert stored(merged("cache", "offline", offline=True)).keys() == stored(cached).keys()
    for name, data in files.items():
        put(here / "org" / name, data)  # now the folders are meant
    local = merged("cache", "local")
    assert set(streamed) == set(cached) == set(local) == OURS | set(files["a"])
    for name in set(local) - {"README.md", "recipe.lock.yaml"}:
        assert streamed[name] == cached[name], name
    assert stored(streamed).keys() == stored(local).keys()
    for home, found in stored(local).items():
        assert all(found[name].equal(stored(streamed)[home][name]) for name in found)


def test_a_plan_reads_the_headers_of_components(hub: Hub, merge: Callable[..., Ran], tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        hub.add(f"org/{name}", pipeline(seed) | {f"vae/{WEIGHTS}": LARGE})
    (tmp_path / "r.yaml").write_text(RECIPE)
    ran = merge("plan", "r.yaml", "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert [shard["file"] for shard in told["outputs"][0]["shards"]] == [
        "text_encoder/model.safetensors", f"unet/{WEIGHTS}", f"vae/{WEIGHTS}"
    ]  # fmt: skip
    assert hub.sent() < len(LARGE)


def test_a_pushed_pipeline_is_one_at_the_hub_and_overwrites_none(
    hub: Hub, merge: Callable[..., Ran], tmp_path: Path
) -> None:
    for seed, name in enumerate(("a", "b")):
        hub.add(f"org/{name}", pipeline(seed))
    (tmp_path / "r.yaml").write_text(RECIPE)
    assert merge("run", "r.yaml").code == 0
    hub.add("me/theirs", {f"unet/{WEIGHTS}": LARGE})
    ran = merge("push", "out", "me/theirs", HF_TOKEN=TOKEN)
    assert ran.code == 4 and f"unet/{WEIGHTS}" in ran.err, ran.err
    ran = merge("push", "out", "me/merged", HF_TOKEN=TOKEN)
    assert ran.code == 0, ran.err
    (tmp_path / "again.yaml").write_text("version: 1\nmodels: {m: me/merged}\nsave: {step: m, to: again}\n")
    again = merge("run", "again.yaml", "--fetch", "stream", HF_TOKEN=TOKEN)
    assert again.code == 0, again.err
    ours, theirs = (stored(files_of(tmp_path / name)) for name in ("out", "again"))
    assert all(ours[home][name].equal(theirs[home][name]) for home in ours for name in ours[home])
    assert "library_name: diffusers" in (tmp_path / "out" / "README.md").read_text()

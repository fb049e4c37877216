"""Merges of pipelines, of sentence-transformers and timm models, and of single files: what comes out, and where."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from form_files import Files, files_of, index, pipeline, put, sentences, stored, tensors, text, timm
from safetensors import safe_open
from safetensors.torch import save, save_file

import mergekit_lite
from mergekit_lite import MergeError, RecipeError
from mergekit_lite.plan.model import Plan
from mergekit_lite.report.verify import verify

OURS = {"README.md", "recipe.yaml", "recipe.lock.yaml"}
HALF = "{use: linear, of: {a: {weight: 1}, b: {weight: 1}}}"


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    monkeypatch.chdir(tmp_path)

    def make(a: Files, b: Files, step: str = HALF, save: str = "to: out") -> Plan:
        for name, files in (("a", a), ("b", b)):
            put(tmp_path / name, files)
        (tmp_path / "r.yaml").write_text(
            f"version: 1\nmodels: {{a: ./a, b: ./b}}\nsteps: {{m: {step}}}\nsave: {{step: m, {save}}}\n"
        )
        return mergekit_lite.plan(mergekit_lite.load_recipe("r.yaml"), threads=1)

    return make


@pytest.fixture
def merged(planned: Callable[..., Plan]) -> Callable[..., Files]:
    def make(*arguments: str, **more: str) -> Files:
        mergekit_lite.run(planned(*arguments, **more), threads=1)
        assert verify("out").faults == ()
        return files_of(Path("out"))

    return make


@pytest.mark.parametrize("form", [pipeline, sentences, timm])
def test_every_part_is_merged_and_lies_where_it_lay(form: Callable[[int], Files], merged: Callable[..., Files]) -> None:
    a, b = form(1), form(2)
    made = merged(a, b)
    assert set(made) - OURS == set(a)
    for home, found in stored(made).items():
        ours, theirs = stored(a)[home], stored(b)[home]
        assert found.keys() == ours.keys()
        for name, values in found.items():
            assert torch.equal(values, ((ours[name].double() + theirs[name].double()) / 2).float()), (home, name)
    for name, data in a.items():
        if name.endswith(".json") and name != "config.json":
            assert json.loads(made[name]) == json.loads(data), name
    if form is timm:
        assert json.loads(made["config.json"]) == json.loads(a["config.json"])  # it knows no dtype


def test_components_are_chosen_by_pattern_and_sharded_with_an_index(merged: Callable[..., Files]) -> None:
    a, b = pipeline(1), pipeline(2)
    t = "{'unet.mid.*': 1, 'text_encoder.layers.*': {across: [0, 1]}, else: 0}"
    step = f"{{use: interpolate, of: [a, b], with: {{t: {t}}}}}"
    made = merged(a, b, step, "to: out, dtype: bfloat16, shard: 600")
    ours, theirs, found = stored(a), stored(b), stored(made)
    for home, name, source in [
        ("unet", "conv.in", ours), ("unet", "mid.b", theirs), ("vae", "conv.in", ours),
        ("text_encoder", "layers.0.w", ours), ("text_encoder", "layers.1.w", theirs), ("text_encoder", "conv.in", ours),
    ]:  # fmt: skip
        assert torch.equal(found[home][name], source[home][name].bfloat16()), (home, name)
    told = json.loads(made["unet/diffusion_pytorch_model.safetensors.index.json"])
    assert len(set(told["weight_map"].values())) == 3
    for name, file in told["weight_map"].items():
        assert name in stored({f"unet/{file}": made[f"unet/{file}"]})["unet"]
    assert told["metadata"]["total_size"] == sum(t.numel() * 2 for t in found["unet"].values())
    assert json.loads(made["text_encoder/config.json"])["dtype"] == "bfloat16"
    assert json.loads(made["unet/config.json"]) == json.loads(a["unet/config.json"])


def test_an_output_is_a_pipeline_again(merged: Callable[..., Files], tmp_path: Path) -> None:
    merged(pipeline(1), pipeline(2), save="to: out, shard: 600")
    (tmp_path / "again.yaml").write_text("version: 1\nmodels: {m: ./out}\nsave: {step: m, to: again}\n")
    mergekit_lite.run(mergekit_lite.plan(mergekit_lite.load_recipe("again.yaml")))
    first, second = (stored(files_of(tmp_path / name)) for name in ("out", "again"))
    assert all(torch.equal(first[home][name], second[home][name]) for home in first for name in first[home])
    assert {home: set(found) for home, found in first.items()} == {home: set(found) for home, found in second.items()}


def test_a_model_that_is_never_divided(merged: Callable[..., Files]) -> None:
    assert "model.safetensors" in merged(timm(1), timm(2), save="to: out, shard: 100")


def test_a_single_file_stays_one_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = {"modelspec.architecture": "stable-diffusion-xl-v1-base", "modelspec.prediction_type": "v"}
    lost = {"modelspec.hash_sha256": "0x1", "modelspec.date": "2024-01-01", "ss_dataset_dirs": "{}"}
    made = {}
    for seed, name in enumerate(("one", "two")):
        made[name] = {
            **tensors(seed, model_diffusion=(9, 9), first_stage=(4,)),
            "v_pred": torch.empty(0),
            "ids": torch.arange(5) + seed,
        }
        save_file(made[name], f"{name}.safetensors", {"format": "pt", **kept, **lost})
    Path("tokenizer.json").write_text("of another model")
    Path("r.yaml").write_text(
        "version: 1\nmodels: {a: one.safetensors, b: two.safetensors}\n"
        f"steps: {{m: {HALF}}}\nsave: {{to: out, shard: 100}}\n"
    )
    mergekit_lite.run(mergekit_lite.plan(mergekit_lite.load_recipe("r.yaml")))
    assert {path.name for path in Path("out").iterdir()} == OURS | {"one.safetensors"}
    assert verify("out").faults == ()
    with safe_open("out/one.safetensors", "pt") as opened:
        metadata = opened.metadata()
        assert metadata.pop("mergekit_lite.recipe") and metadata == {"format": "pt", **kept}
        for name in ("model.diffusion", "first.stage"):
            wanted = (made["one"][name].double() + made["two"][name].double()) / 2
            assert torch.equal(opened.get_tensor(name), wanted.float())
        assert opened.get_tensor("v_pred").shape == (0,)
        assert torch.equal(opened.get_tensor("ids"), torch.arange(5))


def test_a_run_that_is_resumed(planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_lite.run import finish

    plan = planned(pipeline(1), pipeline(2))
    with monkeypatch.context() as patch:
        patch.setattr(finish, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(MergeError):
            mergekit_lite.run(plan)
    assert not (tmp_path / "out").exists()
    mergekit_lite.run(plan, resume=True)
    assert verify("out").faults == () and not (tmp_path / "out.partial").exists()


def test_a_mount_that_renames_no_folders(planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def files_only(source: Path, target: Path) -> None:
        if Path(source).is_dir():
            raise OSError(errno.EXDEV, "no folders")
        rename(source, target)

    monkeypatch.setattr(os, "rename", files_only)
    mergekit_lite.run(planned(pipeline(1), pipeline(2)))
    assert verify("out").faults == () and not Path("out.partial").exists()
    assert set(files_of(Path("out"))) - OURS == set(pipeline(1))


# What verify sees


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        (
            "vae/diffusion_pytorch_model.fp16.safetensors",
            save({"x": torch.ones(1)}),
            "weights that the run did not write",
        ),
        ("unet/code.py", b"import os", "was not written by the run"),
        ("text_encoder/generation_config.json", b"{}", "was not written by the run"),
        ("scheduler/scheduler_config.json", b'{"_class_name": "X"}', "the lock says"),
        ("vae/config.json", None, "is missing"),
        ("model_index.json", b"{}", "the lock says"),
        ("unet/diffusion_pytorch_model.safetensors", None, "is missing"),
    ],
)
def test_damage_in_a_component_is_seen(name: str, data: bytes | None, told: str, merged: Callable[..., Files]) -> None:
    merged(pipeline(1), pipeline(2))
    if data is None:
        (Path("out") / name).unlink()
    else:
        (Path("out") / name).write_bytes(data)
    assert [name, True] in [[fault.file, told in fault.message] for fault in verify("out").faults]


# What cannot be merged


def _without(files: Files, component: str) -> Files:
    named = {key: value for key, value in json.loads(files["model_index.json"]).items() if key != component}
    return {**{n: d for n, d in files.items() if not n.startswith(f"{component}/")}, "model_index.json": text(named)}


REFUSED: dict[str, tuple[Files, str, str, str]] = {
    "component lacking": (_without(pipeline(2), "vae"), HALF, "to: out", "`b` has no `vae`, which `a` has"),
    "component too many": (
        {**pipeline(2), "extra/model.safetensors": save(tensors(1, a=(2,))),
         "model_index.json": index(**{**{k: v for k, v in json.loads(pipeline(2)["model_index.json"]).items()
                                         if isinstance(v, list)}, "extra": ["transformers", "X"]})},
        HALF, "to: out", "`a` has no `extra`, which `b` has",
    ),
    "another class": (
        {**pipeline(2), "model_index.json": pipeline(2)["model_index.json"].replace(b"UNet2DC", b"Other")},
        HALF, "to: out", "`unet` of `b` is a `OtheronditionModel`, that of `a` a `UNet2DConditionModel`",
    ),
    "no pipeline": (timm(2), HALF, "to: out", "`b` has no `text_encoder`, `unet`, `vae`, which `a` has"),
    "skipped": (
        _without(pipeline(2), "vae"), HALF.replace("}}}", "}}, missing: skip}"), "to: out",
        "`m` has no tensors of `vae`",
    ),
    "an adapter": (pipeline(2), HALF, "to: out, as: lora, base: a, rank: 2", "an adapter is one of a model"),
    "a vocabulary": (pipeline(2), HALF, "to: out, tokenizer: union", "`tokenizer` is for language models"),
    "a stack": (
        pipeline(2), "{use: stack, of: [{model: a, layers: [0, 1]}, {model: b, layers: [1, 2]}], rest: a}", "to: out",
        "`a` has not one stack of layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_told_with_its_line(name: str, planned: Callable[..., Plan]) -> None:
    other, step, saved, told = REFUSED[name]
    with pytest.raises(RecipeError) as caught:
        planned(pipeline(1), other, step, saved)
    found = [problem for problem in caught.value.problems if told in problem.message]
    assert found and found[0].mark is not None and found[0].hint, caught.value.problems


def test_a_base_stands_in_for_a_component(merged: Callable[..., Files]) -> None:
    step = "{use: task_arithmetic, base: a, of: [b], with: {lambda: 1.0}, missing: base}"
    made = stored(merged(pipeline(1), _without(pipeline(2), "vae"), step))
    assert torch.equal(made["vae"]["conv.in"], stored(pipeline(1))["vae"]["conv.in"])
    assert torch.allclose(made["unet"]["mid.a"], stored(pipeline(2))["unet"]["mid.a"], atol=1e-6)

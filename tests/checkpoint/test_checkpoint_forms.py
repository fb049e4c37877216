"""Checkpoints in other layouts than that of transformers: what is read, and what a stranger's is refused for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from form_files import COMPONENTS, WEIGHTS, Files, index, pipeline, put, sentences, stored, tensors, text, timm
from safetensors.torch import save, save_file

from mergekit_lite.checkpoint.find import open_checkpoint
from mergekit_lite.errors import InputError


def test_the_tensors_of_a_pipeline_have_their_components_before_their_names(tmp_path: Path) -> None:
    opened = open_checkpoint(str(put(tmp_path / "a", pipeline(1))), None)
    wanted = {f"{home}.{name}" for home, found in stored(pipeline(1)).items() for name in found}
    assert set(opened.tensors) == wanted and {meta.name for meta in opened.tensors.values()} == wanted
    assert opened.form is not None and opened.form.kind == "diffusers"
    assert [shard.name for shard in opened.shards] == [
        "text_encoder/model.safetensors",
        *(f"{c}/{WEIGHTS}" for c in ("unet", "vae")),
    ]
    assert set(opened.form.beside) == {
        "model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"
    }  # fmt: skip


def test_modules_behind_a_model_have_their_folder_before_their_names(tmp_path: Path) -> None:
    opened = open_checkpoint(str(put(tmp_path / "a", sentences(1))), None)
    assert set(opened.tensors) == {
        "encoder.layer.0.w", "encoder.layer.1.w", "2_Dense.linear.weight", "2_Dense.linear.bias"
    }  # fmt: skip
    assert opened.config["model_type"] == "bert"


def test_a_router_chooses_among_folders_of_its_own(tmp_path: Path) -> None:
    files = sentences(1)
    router = {"types": {"query_0_Dense": "sentence_transformers.models.Dense"}, "structure": {}}
    entry = {"idx": 0, "name": "0", "path": "0_Router", "type": "sentence_transformers.models.Router"}
    made = {
        "modules.json": text([entry]),
        "0_Router/router_config.json": text(router),
        **{f"0_Router/query_0_Dense/{n.partition('/')[2]}": d for n, d in files.items() if n.startswith("2_Dense")},
    }
    opened = open_checkpoint(str(put(tmp_path / "a", made)), None)
    assert set(opened.tensors) == {f"0_Router.query_0_Dense.linear.{part}" for part in ("weight", "bias")}
    assert opened.form is not None and "0_Router/router_config.json" in opened.form.beside


def test_which_variant_of_a_component_is_read(tmp_path: Path) -> None:
    files = pipeline(1)
    plain = files[f"vae/{WEIGHTS}"]
    both = {**files, "vae/diffusion_pytorch_model.fp16.safetensors": save(tensors(7, other=(2,)))}
    assert "vae.conv.in" in open_checkpoint(str(put(tmp_path / "both", both)), None).tensors
    del both[f"vae/{WEIGHTS}"]
    half = open_checkpoint(str(put(tmp_path / "half", both)), None)
    assert "vae.other" in half.tensors
    assert half.form is not None and half.form.parts[-1].stem == "diffusion_pytorch_model"
    with pytest.raises(InputError, match=r"vae` holds several variants of its weights: `fp16`, `non_ema`"):
        open_checkpoint(
            str(put(tmp_path / "two", {**both, "vae/diffusion_pytorch_model.non_ema.safetensors": plain})), None
        )


def test_a_component_in_shards_of_a_variant(tmp_path: Path) -> None:
    files = pipeline(1)
    found = stored(files)["unet"]
    del files[f"unet/{WEIGHTS}"]
    parts = {
        f"diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors": n for i, n in ((1, ["conv.in"]), (2, ["mid.a"]))
    }
    files |= {f"unet/{file}": save({name: found[name] for name in names}) for file, names in parts.items()}
    weight_map = {name: file for file, names in parts.items() for name in names}
    files["unet/diffusion_pytorch_model.safetensors.index.fp16.json"] = text({"weight_map": weight_map})
    opened = open_checkpoint(str(put(tmp_path / "a", files)), None)
    assert [name for name in opened.tensors if name.startswith("unet.")] == ["unet.conv.in", "unet.mid.a"]


def test_a_component_by_itself_and_a_model_of_timm(tmp_path: Path) -> None:
    one = {
        "config.json": text({"_class_name": "AutoencoderKL", "_diffusers_version": "0"}),
        WEIGHTS: save(tensors(1, a=(2,))),
    }
    vae = open_checkpoint(str(put(tmp_path / "vae", one)), None)
    assert vae.form is not None and vae.form.parts[0].stem == "diffusion_pytorch_model"
    image = open_checkpoint(str(put(tmp_path / "timm", timm(1))), None)
    assert image.form is not None and image.form.kind == "timm"


@pytest.mark.parametrize(
    ("metadata", "config", "form"),
    [({}, False, True), ({"modelspec.title": "t"}, True, True), ({}, True, False)],
)
def test_which_single_files_are_whole_checkpoints(
    metadata: dict[str, str], config: bool, form: bool, tmp_path: Path
) -> None:
    save_file(tensors(1, a=(2,)), tmp_path / "xl.safetensors", {"format": "pt", **metadata})
    if config:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    opened = open_checkpoint(str(tmp_path / "xl.safetensors"), None)
    assert (opened.form is not None) == form == (not opened.config)


# What strangers may try


def _without(name: str) -> Callable[[Files], Files]:
    return lambda files: {file: data for file, data in files.items() if not file.startswith(name)}


def _named(name: str) -> Callable[[Files], Files]:
    return lambda files: {**files, "model_index.json": index(**COMPONENTS, **{name: ["diffusers", "X"]})}


REFUSED: dict[str, tuple[Callable[[Files], Files], str]] = {
    "parent": (_named("../outside"), r"names a component `\.\./outside`, which cannot be one"),
    "absolute": (_named("/etc"), "names a component `/etc`"),
    "dots": (_named(".."), r"names a component `\.\.`"),
    "backslash": (_named("a\\b"), "names a component"),
    "a prefix of two": (_named("unet.x"), r"names a component `unet\.x`"),
    "class": (lambda f: {**f, "model_index.json": index(unet=["../x", "X"])}, r"names a class `\.\./x`"),
    "deep": (lambda f: {**f, "model_index.json": b'{"a":' * 5000 + b"1" + b"}" * 5000}, "nested too deeply"),
    "large": (lambda f: {**f, "model_index.json": b'{"a": "' + b"x" * 2**20 + b'"}'}, "too many for a file"),
    "many": (
        lambda f: {**f, **{f"c{i}/x": b"" for i in range(101)},
                   "model_index.json": index(**{f"c{i}": ["diffusers", "X"] for i in range(101)})},
        "names 101 components",
    ),
    "twice": (lambda f: {**f, "model_index.json": b'{"unet": ["a", "B"], "unet": ["c", "D"]}'}, "stands twice"),
    "list": (lambda f: {**f, "model_index.json": b"[]"}, "is not a JSON object"),
    "no folder": (_without("vae/"), "lacks folders that its model_index.json names: `vae`"),
    "no weights": (lambda f: {n: d for n, d in f.items() if not n.endswith(".safetensors")}, "a model, and no weights"),
    "a component without weights": (_without(f"unet/{WEIGHTS}"), "unet` has the configuration of a model, and no"),
    "pickled": (
        lambda f: {**_without(f"vae/{WEIGHTS}")(f), "vae/diffusion_pytorch_model.bin": b"x"}, "holds pickled weights"
    ),
    "other names": (lambda f: {**_without(f"vae/{WEIGHTS}")(f), "vae/x.safetensors": b"x"}, "files of other names"),
    "index": (
        lambda f: {**_without(f"unet/{WEIGHTS}")(f), "unet/diffusion_pytorch_model.safetensors.index.json":
                   text({"weight_map": {"conv.in": "../vae/diffusion_pytorch_model.safetensors"}})},
        "names a file outside its folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_pipeline_is_refused(name: str, tmp_path: Path) -> None:
    change, told = REFUSED[name]
    put(tmp_path / "outside", {WEIGHTS: save(tensors(1, a=(2,))), "config.json": b"{}"})
    with pytest.raises(InputError, match=told):
        open_checkpoint(str(put(tmp_path / "a", change(pipeline(1)))), None)


@pytest.mark.parametrize("what", ["vae", f"vae/{WEIGHTS}", "tokenizer", "scheduler/scheduler_config.json"])
def test_a_link_out_of_a_pipeline_is_refused(what: str, tmp_path: Path) -> None:
    from mergekit_lite.checkpoint.extras import find_extras

    folder = put(tmp_path / "a", pipeline(1))
    place = folder / what
    moved = tmp_path / "secret"
    place.rename(moved)
    place.symlink_to(moved)
    with pytest.raises(InputError, match="outside its folder"):
        find_extras(open_checkpoint(str(folder), None), {})


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([{"path": "../x", "type": "a.B"}], r"names a folder `\.\./x`"),
        ([{"path": "/etc", "type": "a.B"}], "names a folder `/etc`"),
        ([{"path": "", "type": "os.system('x')"}], "names a class"),
        ([{"path": "", "type": "a.B"}, {"path": "", "type": "a.B"}], "names a folder twice"),
        ([{"path": 3, "type": "a.B"}], "an entry that is no module"),
        (["x"], "an entry that is no module"),
        ({"path": ""}, "is not a JSON list"),
    ],
)
def test_modules_are_refused(entries: object, told: str, tmp_path: Path) -> None:
    folder = put(tmp_path / "a", {**sentences(1), "modules.json": text(entries)})
    with pytest.raises(InputError, match=told):
        open_checkpoint(str(folder), None)


def test_a_tensor_that_two_parts_have(tmp_path: Path) -> None:
    made = {**sentences(1), "model.safetensors": save({"2_Dense.linear.bias": tensors(1, a=(2,))["a"]})}
    with pytest.raises(InputError, match=r"holds tensors twice: 2_Dense\.linear\.bias"):
        open_checkpoint(str(put(tmp_path / "a", made)), None)


def test_code_is_told_of_and_left_out(tmp_path: Path) -> None:
    code = b"raise SystemExit('ran')"
    made = {**pipeline(1), "pipeline.py": code, "unet/my_unet.py": code}
    made["model_index.json"] = index(**{**COMPONENTS, "unet": ["my_unet", "MyUNet"]})
    opened = open_checkpoint(str(put(tmp_path / "a", made)), None)
    assert ["neither run nor copied: `pipeline.py`, `unet/my_unet.py`" in note.message for note in opened.notes] == [
        True
    ]
    assert opened.form is not None and not any(name.endswith(".py") for name in opened.form.beside)
    strange = sentences(1)
    strange["modules.json"] = strange["modules.json"].replace(b"sentence_transformers.models.Dense", b"custom_st.Dense")
    opened = open_checkpoint(str(put(tmp_path / "b", strange)), None)
    assert ["`custom_st.Dense`" in note.message for note in opened.notes] == [True]


def test_secrets_in_the_files_of_a_pipeline_do_not_reach_an_output(tmp_path: Path) -> None:
    from mergekit_lite.checkpoint.extras import copy_extras

    secret = "hf_" + "Ab1" * 12
    made = pipeline(1)
    for name in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"):
        made[name] = text({**json.loads(made[name]), "note": secret})
    opened = open_checkpoint(str(put(tmp_path / "a", made)), None)
    to = tmp_path / "out"
    to.mkdir()
    names = copy_extras(opened, to, {})
    assert set(names) == {name for name in made if not name.endswith(".safetensors")}
    assert not [name for name in names if secret in (to / name).read_text()]
    assert json.loads((to / "model_index.json").read_text()) == json.loads(pipeline(1)["model_index.json"])

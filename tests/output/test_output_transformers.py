"""What a run writes, read by transformers: it loads whole, computes, and is the model that the recipe describes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import KINDS, LAYER_TYPES, TEMPLATE, TEXT, write_kind
from torch import Tensor
from transformers import AutoTokenizer

from mergekit_lite import Result, load_recipe, plan, run

STEPS = {
    "linear": "{use: linear, of: [a, b]}",
    "ties": "{use: ties, base: base, of: [a, b]}",
    "dare_ties": "{use: dare_ties, base: base, of: [a, b], with: {drop_rate: 0.5}}",
    "slerp": "{use: slerp, of: [a, b], with: {t: {across: [0.2, 0.8], else: 0.5}}}",
}
DEPTH = {kind: config().num_hidden_layers for kind, (config, *_) in KINDS.items()}


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        write_kind(folder / kind, kind)
    return folder


def merge(models: Path, step: str, to: Path, save: str = "") -> Result:
    """Run a recipe of one step over the models of one kind."""
    names = ", ".join(f"{name}: {models / name}" for name in ("base", "a", "b"))
    recipe = to.with_suffix(".yaml")
    recipe.write_text(
        f"version: 1\nseed: 5\nmodels: {{{names}}}\nsteps: {{m: {step}}}\nsave: {{to: {to}{save}}}\n", encoding="utf-8"
    )
    return run(plan(load_recipe(recipe), threads=2), threads=2)


def load(kind: str, folder: Path, **options: Any) -> Any:
    """The model that transformers makes of a folder, in the folder's dtype, with nothing amiss."""
    model, info = KINDS[kind][1].from_pretrained(folder, output_loading_info=True, dtype="auto", **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not info.get("error_msgs"), info
    return model.eval()


def works(kind: str, model: Any, folder: Path) -> None:
    """Logits are finite, tied tensors are one, and a decoder goes on with a text."""
    tokens = AutoTokenizer.from_pretrained(folder)(TEXT[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.isfinite(model(tokens).logits).all()
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = model.config.tie_word_embeddings
    assert (embeddings.data_ptr() == head.data_ptr()) is tied
    if kind != "bert":
        # As many as the base's generation config asks for, unless the end comes first.
        grown = model.generate(tokens, do_sample=False)
        assert tokens.shape[1] < grown.shape[1] <= tokens.shape[1] + 7
        assert torch.equal(grown[:, : tokens.shape[1]], tokens)


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Name -> (file, shape, dtype) of every tensor on disk, in the order of the shards."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                assert name not in found
                found[name] = (path.name, tuple(part.get_shape()), part.get_dtype())
    return found


def parameters(model: Any) -> Mapping[str, Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize("method", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_loads_and_works(kind: str, method: str, parents: Path, tmp_path: Path) -> None:
    merge(parents / kind, STEPS[method], tmp_path / "out")
    model = load(kind, tmp_path / "out")
    # `linear` and `slerp` name no base: the first model is the donor, and it has no tokenizer.
    works(kind, model, parents / kind / "base")
    base = parents / kind / "base"
    ours, theirs = stored(tmp_path / "out"), stored(base)
    assert {n: rest[1:] for n, rest in ours.items()} == {n: rest[1:] for n, rest in theirs.items()}
    # The order on disk stays, shard by shard.
    assert list(plan_order(tmp_path / "out")) == list(plan_order(base))


def plan_order(folder: Path) -> list[str]:
    """The tensors' names by shard and offset, read from the headers as the format states them."""
    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        names += sorted(header, key=lambda name: header[name]["data_offsets"])
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_linear_is_the_mean_of_the_loaded_models(kind: str, parents: Path, tmp_path: Path) -> None:
    """Transformers may rename and fuse what it loads, so this also tells whether every tensor went to its place."""
    step = "{use: linear, of: {a: {weight: 0.25}, b: {weight: 0.75}}}"
    merge(parents / kind, step, tmp_path / "out")
    ours, a, b = (parameters(load(kind, folder)) for folder in (tmp_path / "out", *(parents / kind / n for n in "ab")))
    for name, tensor in ours.items():
        exact = 0.25 * a[name].double() + 0.75 * b[name].double()
        torch.testing.assert_close(tensor.double(), exact.to(tensor.dtype).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "bert", "mixtral", "qwen2"])
def test_a_stack_has_its_layers_and_a_config_to_match(kind: str, parents: Path, tmp_path: Path) -> None:
    depth = DEPTH[kind]
    of = f"[{{model: a, layers: [0, {depth}]}}, {{model: b, layers: [1, {depth}]}}]"
    merge(parents / kind, f"{{use: stack, of: {of}, rest: base}}", tmp_path / "out")
    model = load(kind, tmp_path / "out")
    works(kind, model, tmp_path / "out")
    assert model.config.num_hidden_layers == 2 * depth - 1
    origin = [("a", i) for i in range(depth)] + [("b", i) for i in range(1, depth)]
    parts = {name: parameters(load(kind, parents / kind / name)) for name in ("base", "a", "b")}
    before = "bert.encoder.layer." if kind == "bert" else "model.layers."
    for name, tensor in parameters(model).items():
        source, old = "base", name
        if name.startswith(before):
            number, rest = name.removeprefix(before).split(".", 1)
            source, index = origin[int(number)]
            old = f"{before}{index}.{rest}"
        assert torch.equal(tensor, parts[source][old]), name
    if kind == "qwen2":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["layer_types"] == LAYER_TYPES + LAYER_TYPES[1:]
        assert model.config.layer_types == config["layer_types"]


def test_a_shallower_stack(parents: Path, tmp_path: Path) -> None:
    step = "{use: stack, of: [{model: base, layers: [0, 1]}, {model: a, layers: [3, 4]}], rest: base}"
    merge(parents / "qwen2", step, tmp_path / "out", ", dtype: float16")
    model = load("qwen2", tmp_path / "out")
    works("qwen2", model, tmp_path / "out")
    assert model.config.layer_types == [LAYER_TYPES[0], LAYER_TYPES[3]]
    assert {p.dtype for p in model.parameters()} == {torch.float16}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_config_names_the_dtype_saved_in(dtype: str, parents: Path, tmp_path: Path) -> None:
    merge(parents / "llama_tied", STEPS["ties"], tmp_path / "out", f", dtype: {dtype}")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == dtype
    model = load("llama_tied", tmp_path / "out")
    works("llama_tied", model, tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    before = json.loads((parents / "llama_tied" / "base" / "config.json").read_text())
    assert {k for k in config if config[k] != before.get(k)} <= {"dtype", "torch_dtype"}


def test_what_lies_beside_the_weights(parents: Path, tmp_path: Path) -> None:
    base, out = parents / "llama" / "base", tmp_path / "out"
    merge(parents / "llama", STEPS["ties"], out)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    theirs = {file.name for file in base.iterdir()}
    assert {file.name for file in out.iterdir()} == theirs | {"recipe.yaml", "recipe.lock.yaml", "README.md"}
    assert (out / "recipe.yaml").read_text() == (tmp_path / "out.yaml").read_text()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.apply_chat_template([{"role": "user", "content": "fox"}], tokenize=False) == "<user> fox\n"
    assert load("llama", out).generation_config.max_new_tokens == 7
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("kind, shard", [("llama", "15KB"), ("mixtral", "40KB"), ("bert", "1MB")])
def test_the_index_tells_what_the_shards_hold(kind: str, shard: str, parents: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(parents / kind, STEPS["ties"], out, f", shard: {shard}")
    files = sorted(file.name for file in out.glob("*.safetensors"))
    index = out / "model.safetensors.index.json"
    if kind == "bert":
        assert files == ["model.safetensors"] and not index.exists()
        return
    assert len(files) > 2
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    found = stored(out)
    data = json.loads(index.read_text())
    assert data["weight_map"] == {name: file for name, (file, *_) in found.items()}
    sizes = {"F32": 4}
    assert data["metadata"]["total_size"] == sum(torch.Size(s).numel() * sizes[d] for _, s, d in found.values())
    works(kind, load(kind, out), out)


def test_experts_keep_their_names_on_disk(parents: Path, tmp_path: Path) -> None:
    """In memory transformers fuses the experts of a layer; on disk each has its own matrices, as in the base."""
    merge(parents / "mixtral", STEPS["dare_ties"], tmp_path / "out")
    experts = {f"model.layers.1.block_sparse_moe.experts.{e}.w{w}.weight" for e in range(4) for w in (1, 2, 3)}
    assert experts <= set(stored(tmp_path / "out"))


def test_tied_tensors_are_stored_once(parents: Path, tmp_path: Path) -> None:
    for kind, aliases in (("llama_tied", ["lm_head.weight"]), ("bert", ["cls.predictions.decoder.weight"])):
        merge(parents / kind, STEPS["ties"], tmp_path / kind)
        assert not set(aliases) & set(stored(tmp_path / kind))


def test_a_lock_makes_the_same_model_again(parents: Path, tmp_path: Path) -> None:
    first = merge(parents / "llama", STEPS["dare_ties"], tmp_path / "out")
    lock = load_recipe(tmp_path / "out" / "recipe.lock.yaml")
    again = run(plan(lock, out=tmp_path / "again", threads=1), threads=1)
    assert not again.changed
    assert [*again.shards.values()] == [*first.shards.values()]
    works("llama", load("llama", tmp_path / "again"), tmp_path / "again")

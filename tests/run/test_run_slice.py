"""`slice`, through the whole engine: models cut by name in torch are the measure, and transformers loads what is
written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from mergekit_lite import InputError, RecipeError, load_recipe, plan, run
from mergekit_lite.align.apply import Move, permuted
from mergekit_lite.align.keep import cut, important, kept_shape, kept_spans
from mergekit_lite.cli.run import matched
from mergekit_lite.family.spaces import Space, Use
from mergekit_lite.run import gather
from tests.family.family_models import MODELS
from tests.methods.method_cases import ORACLES, close, tensor

Tensors = dict[str, Tensor]


def write_model(folder: Path, name: str) -> Any:
    """A random model of this name of `MODELS`, all of whose tensors are random, norms and biases included."""
    tiny = MODELS[name]
    torch.manual_seed(1)
    model = getattr(transformers, tiny.kind)(AutoConfig.for_model(tiny.model_type, **tiny.settings)).float()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn(value.shape))
    model.eval().save_pretrained(folder)
    return model


def text(folder: Path, settings: str) -> str:
    steps = f"{{small: {{use: slice, of: big, with: {{{settings}}}}}}}"
    return f"version: 1\nmodels: {{big: {folder}}}\nsteps: {steps}\nsave: {{to: {folder}-out}}\n"


def sliced(folder: Path, settings: str, **options: Any) -> Path:
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text(text(folder, settings), encoding="utf-8")
    run(plan(load_recipe(recipe), **options), **{k: v for k, v in options.items() if k in ("threads", "block")})
    return Path(f"{folder}-out")


def loaded(kind: str, folder: Path) -> Any:
    """The model that transformers loads, which must find every tensor and no other."""
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def inputs(name: str) -> dict[str, Tensor]:
    tokens = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(4))
    if MODELS[name].model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))}
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if MODELS[name].model_type == "t5" else {})}


# What is cut, written out by hand: which coordinates of the stream, rows of heads and hidden units each tensor keeps.
Index = Sequence[int]


def blocks(units: Index, size: int) -> list[int]:
    return [unit * size + j for unit in units for j in range(size)]


def llama(tensors: Tensors, res: Index, kv: Index, mlp: Index) -> Tensors:
    """4 heads of 8 in 2 groups of 2."""
    rows = {
        "q_proj": blocks(kv, 16),
        "k_proj": blocks(kv, 8),
        "v_proj": blocks(kv, 8),
        "gate_proj": mlp,
        "up_proj": mlp,
    }
    columns = {"o_proj": blocks(kv, 16), "down_proj": mlp}
    made = {}
    for name, value in tensors.items():
        part = next((p for p in (*rows, *columns) if p in name), "")
        if "embed" in name or "lm_head" in name:
            made[name] = value[:, res]
        elif part in rows:
            made[name] = value[rows[part]][:, res]
        elif part in columns:
            made[name] = value[res][:, columns[part]]
        else:
            made[name] = value[res]
    return made


def gpt2(tensors: Tensors, res: Index, heads: Index, mlp: Index) -> Tensors:
    """3 heads of 8. Weights are (inputs, outputs), and one tensor holds queries, keys and values."""
    qkv = [24 * part + row for part in range(3) for row in blocks(heads, 8)]
    made = {}
    for name, value in tensors.items():
        rows: Index | None = None
        columns: Index | None = None
        match re.sub(r".*h\.\d\.", "", name).removesuffix(".weight").removesuffix(".bias"):
            case "attn.c_attn":
                rows, columns = res, qkv
            case "attn.c_proj":
                rows, columns = blocks(heads, 8), res
            case "mlp.c_fc":
                rows, columns = res, mlp
            case "mlp.c_proj":
                rows, columns = mlp, res
            case _:
                rows, columns = range(len(value)), res
        made[name] = value[columns] if value.ndim == 1 else value[rows][:, columns]
    return made


def encoder(tensors: Tensors, res: Index, heads: Index, mlp: Index) -> Tensors:
    """BERT and ViT: 3 heads of 8; the pooler is as wide as the stream."""
    made = {}
    for name, value in tensors.items():
        if value.ndim == 1:
            among = {"query": heads, "key": heads, "value": heads}
            part = next((p for p in among if f".{p}." in name), None)
            fixed = name == "cls.predictions.bias" or name.startswith("classifier")
            made[name] = value if fixed else value[blocks(heads, 8) if part else mlp if "intermediate" in name else res]
        elif "embeddings.patch" in name:
            made[name] = value[res]
        elif "embeddings" in name or name.startswith("classifier"):
            made[name] = value[..., res]
        elif re.search(r"\.(query|key|value)\.", name):
            made[name] = value[blocks(heads, 8)][:, res]
        elif "attention.output" in name:
            made[name] = value[res][:, blocks(heads, 8)]
        elif "intermediate" in name:
            made[name] = value[mlp][:, res]
        elif re.search(r"layer\.\d\.output", name):
            made[name] = value[res][:, mlp]
        else:
            made[name] = value[res][:, res]
    return made


CASES: dict[str, tuple[Callable[..., Tensors], str, dict[str, int]]] = {
    "llama": (llama, "width: 16, heads: 2, d_ff: 12", {"hidden_size": 16, "num_attention_heads": 2,
              "num_key_value_heads": 1, "intermediate_size": 12, "head_dim": 8}),
    "gpt2": (gpt2, "width: 16, heads: 2, d_ff: 40", {"n_embd": 16, "n_head": 2, "n_inner": 40}),
    "bert": (encoder, "width: 16, heads: 2, d_ff: 12", {"hidden_size": 16, "num_attention_heads": 2,
             "intermediate_size": 12}),
    "vit": (encoder, "width: 16, heads: 2, d_ff: 12", {"hidden_size": 16, "num_attention_heads": 2,
            "intermediate_size": 12}),
}  # fmt: skip


def reference(name: str, folder: Path, tensors: Tensors, states: Mapping[str, Any]) -> Any:
    """A model that is configured with its new sizes from the start, with these tensors."""
    tiny = MODELS[name]
    config = AutoConfig.for_model(tiny.model_type, **{**tiny.settings, **states})
    config.architectures = [tiny.kind]
    config.save_pretrained(folder)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return loaded(tiny.kind, folder)


@pytest.mark.parametrize("name", CASES)
def test_leading_units_are_those_of_a_model_that_was_cut_by_hand(name: str, tmp_path: Path) -> None:
    by_hand, settings, states = CASES[name]
    big = write_model(tmp_path / "big", name)
    out = sliced(tmp_path / "big", settings)
    first, heads = list(range(16)), [0] if name == "llama" else [0, 1]
    kept = by_hand(load_file(tmp_path / "big/model.safetensors"), first, heads, range(40 if name == "gpt2" else 12))
    written = load_file(out / "model.safetensors")
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in kept.items()}
    assert all(torch.equal(written[n], kept[n]) for n in kept)
    small = loaded(MODELS[name].kind, out)
    assert {key: getattr(small.config, key) for key in states} == states
    expected = reference(name, tmp_path / "cut", kept, states)(**inputs(name)).logits
    assert torch.equal(small(**inputs(name)).logits, expected)
    assert not torch.allclose(big(**inputs(name)).logits, expected, atol=1e-3)


def norms(tensors: Tensors, cuts: Sequence[tuple[str, int, int]], units: int, layer: str = "") -> np.ndarray:
    """The L1 norms of units that have, in tensors whose names hold a text, blocks of a size along an axis."""
    total = np.zeros(units)
    for name, value in tensors.items():
        for part, axis, block in cuts:
            if part in name and layer in name:
                total += value.double().abs().movedim(axis, 0).reshape(units, block, -1).sum(dim=(1, 2)).numpy()
    return total


def first_of(values: np.ndarray, count: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


def test_importance_keeps_the_units_with_the_largest_norms_in_their_order(tmp_path: Path) -> None:
    write_model(tmp_path / "big", "llama")
    tensors = load_file(tmp_path / "big/model.safetensors")
    # Hidden units 3 and 7 of the first layer are alike: only their numbers tell which one counts for more.
    for part in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{part}.weight"][7] = tensors[f"model.layers.0.mlp.{part}.weight"][3]
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    down[:, 7] = down[:, 3]
    save_file(tensors, tmp_path / "big/model.safetensors", {"format": "pt"})
    width = [("embed", 1, 1), ("lm_head", 1, 1), ("norm", 0, 1), ("q_proj", 1, 1), ("k_proj", 1, 1), ("v_proj", 1, 1),
             ("o_proj", 0, 1), ("gate", 1, 1), ("up_proj", 1, 1), ("down", 0, 1)]  # fmt: skip
    groups = [("q_proj", 0, 16), ("k_proj", 0, 8), ("v_proj", 0, 8), ("o_proj", 1, 16)]
    units = [("gate", 0, 1), ("up_proj", 0, 1), ("down", 1, 1)]
    # As many hidden units as let the first layer keep unit 3 and not its double.
    hidden = norms(tensors, units, 20, "layers.0.")
    count = int((hidden > hidden[3]).sum()) + 1
    assert 3 in first_of(hidden, count) and 7 not in first_of(hidden, count)
    res = first_of(norms(tensors, width, 24), 16)
    made = llama({n: t for n, t in tensors.items() if "layers" not in n}, res, [], [])
    for layer in ("layers.0.", "layers.1."):
        kv = first_of(norms(tensors, groups, 2, layer), 1)
        mlp = first_of(norms(tensors, units, 20, layer), count)
        made |= llama({n: t for n, t in tensors.items() if layer in n}, res, kv, mlp)
    settings = f"width: 16, heads: 2, d_ff: {count}, order: importance"
    (tmp_path / "recipe.yaml").write_text(text(tmp_path / "big", settings), encoding="utf-8")
    figures = run(plan(load_recipe(tmp_path / "recipe.yaml"))).alignments["small"]
    out = tmp_path / "big-out"
    streams = norms(tensors, width, 24)
    assert figures["kept"]["residual"] == pytest.approx(streams[res].sum() / streams.sum(), rel=1e-6)
    (told,) = matched(["big"], figures)
    assert re.fullmatch(r"big: the kept units of 5 spaces hold [0-9]+% of their L1 norm", told)
    written = load_file(out / "model.safetensors")
    assert written.keys() == made.keys() and all(torch.equal(written[n], made[n]) for n in made)
    # What was kept can be read beside the output: the permutation puts it in front.
    orders = load_file(out / "permutations/small.safetensors")
    assert orders["residual"][:16].tolist() == res and sorted(orders["residual"].tolist()) == list(range(24))


def test_coordinates_within_a_head_are_cut_where_width_decides_their_number(tmp_path: Path) -> None:
    """BERT's three heads of 8 become three of 4; which coordinates stay is each head's own."""
    write_model(tmp_path / "big", "bert")
    tensors = load_file(tmp_path / "big/model.safetensors")
    out = load_file(sliced(tmp_path / "big", "width: 12, order: importance") / "model.safetensors")
    orders = load_file(Path(f"{tmp_path / 'big'}-out/permutations/small.safetensors"))
    lead = "bert.encoder.layer.1.attention.self."
    for head in range(3):
        rows = slice(8 * head, 8 * head + 8)
        norm = sum(
            tensors[f"{lead}{part}.{kind}"][rows].double().abs().reshape(8, -1).sum(dim=1)
            for part in ("query", "key")
            for kind in ("weight", "bias")
        )
        assert isinstance(norm, Tensor)
        mine = first_of(norm.numpy(), 4)
        for part in ("query", "key"):
            assert torch.equal(
                out[f"{lead}{part}.bias"][4 * head : 4 * head + 4], tensors[f"{lead}{part}.bias"][rows][mine]
            )
            weight = tensors[f"{lead}{part}.weight"][rows][mine][:, orders["residual"][:12]]
            assert torch.equal(out[f"{lead}{part}.weight"][4 * head : 4 * head + 4], weight)


@pytest.mark.parametrize("order", ["leading", "importance"])
@pytest.mark.parametrize("name", ["llama-tied-bias", "gpt2", "bert", "vit"])
def test_full_sizes_give_the_model_back_bit_for_bit(name: str, order: str, tmp_path: Path) -> None:
    write_model(tmp_path / "big", name)
    config = json.loads((tmp_path / "big/config.json").read_text(encoding="utf-8"))
    heads, mlp = (4, 20) if name.startswith("llama") else (3, 96 if name == "gpt2" else 20)
    out = sliced(tmp_path / "big", f"layers: [0, 1], width: 24, heads: {heads}, d_ff: {mlp}, order: {order}")
    assert json.loads((out / "config.json").read_text(encoding="utf-8")) == config
    before, after = load_file(tmp_path / "big/model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[n].numpy().tobytes() == after[n].numpy().tobytes() for n in before)


# Of every sort of layout: fused projections, norms within heads, rotary parts, experts, shared heads, nested sections.
OTHERS = {
    "llama-tied-bias": "layers: [1], width: 16, heads: 2, d_ff: 5",
    "qwen3": "width: 12, d_ff: 5",
    "gemma3-images": "width: 16, heads: 2, d_ff: 5",
    "phi3": "width: 16, heads: 2, d_ff: 5",
    "olmo2": "width: 16, heads: 2, d_ff: 5",
    "olmoe": "width: 12, heads: 2",
    "gpt_neox": "width: 16, heads: 2, d_ff: 5",
    "mixtral": "layers: 1, width: 16, heads: 2, d_ff: 8",
    "deepseek_v3": "layers: [1], width: 16, heads: 2",
    "bert-base": "layers: [0], width: 12",
    "roberta-classifier": "width: 16, heads: 2, d_ff: 5",
    "electra": "width: 16, heads: 2, d_ff: 5",
    "distilbert": "layers: [1], width: 16, heads: 2, d_ff: 5",
    "clip-text": "width: 16, heads: 2, d_ff: 5",
    "t5": "width: 16, heads: 2, d_ff: 5",
}
NOT_RUN = ("deepseek_v3",)  # its experts are too small for a kernel of torch, as they were before


@pytest.mark.parametrize("name", OTHERS)
def test_transformers_loads_what_is_cut_and_runs_it(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "big", name)
    small = loaded(MODELS[name].kind, sliced(tmp_path / "big", OTHERS[name] + ", order: importance"))
    if name not in NOT_RUN:
        found = small(**inputs(name))
        assert all(bool(torch.isfinite(value).all()) for value in found.values() if isinstance(value, Tensor))


def test_layers_are_numbered_anew_and_their_settings_go_with_them(tmp_path: Path) -> None:
    write_model(tmp_path / "big", "deepseek_v2")
    config = json.loads((tmp_path / "big/config.json").read_text(encoding="utf-8"))
    config["layer_types"] = ["full_attention", "sliding_attention"]
    (tmp_path / "big/config.json").write_text(json.dumps(config), encoding="utf-8")
    out = sliced(tmp_path / "big", "layers: [1]")
    made = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert made["num_hidden_layers"] == 1 and made["layer_types"] == ["sliding_attention"]
    assert (config["first_k_dense_replace"], made["first_k_dense_replace"]) == (1, 0)
    before, after = load_file(tmp_path / "big/model.safetensors"), load_file(out / "model.safetensors")
    assert after and all(torch.equal(before[n.replace("layers.0.", "layers.1.")], t) for n, t in after.items())


def test_rows_are_read_where_they_lie_and_blocks_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "big", "gpt2")
    settings = "width: 16, heads: 2, d_ff: 40, order: importance"
    whole = load_file(sliced(tmp_path / "big", settings) / "model.safetensors")
    monkeypatch.setattr(gather, "SMALL", 0)
    for number, (threads, block) in enumerate([(1, 97), (2, 1 << 10)]):
        folder = tmp_path / str(number) / "big"
        write_model(folder, "gpt2")
        parts = load_file(sliced(folder, settings, threads=threads, block=block) / "model.safetensors")
        assert all(torch.equal(whole[n], parts[n]) for n in whole)


def test_fewer_bytes_are_read_than_the_model_has(tmp_path: Path) -> None:
    """Rows that are not kept are not read; of a row that is, all is."""
    write_model(tmp_path / "big", "llama")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text(tmp_path / "big", "d_ff: 5"), encoding="utf-8")
    made = plan(load_recipe(recipe))
    tensors = load_file(tmp_path / "big/model.safetensors")
    skipped = sum(t.nbytes * 15 // 20 for n, t in tensors.items() if "gate_proj" in n or "up_proj" in n)
    assert made.bytes_read == sum(t.nbytes for t in tensors.values()) - skipped


WRONG = {
    "order: leading": ("needs one of `layers`, `width`, `heads`, `d_ff` and `channels`", "slice"),
    "layers: [0, 2]": ("has layers 0 to 1, `layers` names 2", "[0, 2]"),
    "layers: [1, 0]": ("each once and in their order", "slice"),
    "layers: [-1]": ("`layers` are whole numbers from 0, not -1", "[-1]"),
    "layers: []": ("`layers` are whole numbers from 0", "[]"),
    "width: 0": ("`width` must lie in [1, inf)", "0"),
    "width: 32": ("32 is more than the 24 units of `residual`", "32"),
    "width: 18": ("a width of 18 is no multiple of the 4 heads", "18"),
    "heads: 3": ("which 3 would divide", "3"),
    "heads: 8": ("8 is more than the 4 units", "8"),
    "width: {'*': 16}": ("one value for all tensors", "{"),
    "d_ff: {layers.0.mlp: 4}": ("the size of `layers.0.mlp`, here 4, and of `layers.1.mlp`, here 20", "{"),
    "d_ff: {layers.0.mlp: 4, layers.1.mlp: 5}": ("here 4, and of `layers.1.mlp`, here 5", "{"),
    "d_ff: {layers.0.mpl: 4, else: 5}": ("`layers.0.mpl` is no space of `big`", "layers.0.mpl: 4"),
    "d_ff: {across: [4, 5]}": ("`d_ff` is a whole number, not 4.0", "{"),
    "channels: 4": ("no spaces of the kind `channels`", "4"),
    "d_ff: 21": ("21 is more than the 20 units of `layers.0.mlp`", "21"),
    "d_ff: 4, family: nowhere.yaml": ("cannot read the family file nowhere.yaml", "nowhere.yaml"),
    "d_ff: 4, family: bert": ("no rule of the family `bert` names the tensor", "slice"),
}


@pytest.mark.parametrize("settings", WRONG)
def test_what_cannot_be_cut_is_refused_where_it_stands(settings: str, tmp_path: Path) -> None:
    write_model(tmp_path / "big", "llama")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text(tmp_path / "big", settings), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        plan(load_recipe(recipe))
    message, at = WRONG[settings]
    problem = caught.value.problems[0]
    assert message in problem.message
    assert problem.mark is not None and problem.mark.line == 3
    assert recipe.read_text(encoding="utf-8").splitlines()[2][problem.mark.column - 1 :].startswith(at)


OTHER_WRONG = {
    "bert": ("heads: 1", "would have to become 24, and are 8"),
    "vit": ("width: 16", "3 does not divide 16"),
    "stablelm": ("heads: 2", "as large as width / number of heads"),
    "qwen2_moe": ("d_ff: 4", "these have several sizes: 6 in"),
    "resnet-basic": ("width: 4", "the model has no spaces of the kind `residual`"),
    "t5": ("layers: [0]", "has not one stack of layers"),
    "llama-mqa": ("heads: 2", "share keys and values by 4"),
}


@pytest.mark.parametrize("name", OTHER_WRONG)
def test_what_an_architecture_does_not_allow_is_refused(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "big", name)
    settings, message = OTHER_WRONG[name]
    with pytest.raises(RecipeError) as caught:
        sliced(tmp_path / "big", settings)
    problem = caught.value.problems[0]
    assert message in problem.message and problem.mark is not None


def test_numbers_that_are_not_finite_have_no_importance(tmp_path: Path) -> None:
    write_model(tmp_path / "big", "llama")
    tensors = load_file(tmp_path / "big/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "big/model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp"):
        sliced(tmp_path / "big", "d_ff: 4, order: importance")
    shutil.rmtree(tmp_path / "big-out.partial")
    sliced(tmp_path / "big", "d_ff: 4")


@pytest.mark.parametrize("case", ["subnet/slice", "subnet/importance_sorted"])
def test_against_the_oracles(case: str) -> None:
    given, params = ORACLES[case]["inputs"], ORACLES[case]["params"]
    w = tensor(given["w"])
    shapes = {"w": tuple(w.shape), "importance": (len(w),)}
    spaces = [Space("out", "mlp", len(w), (Use("w", 0, weighed=False), Use("importance", 0)))]
    keep = {"out": params["out"]}
    if "in" in params:
        spaces.append(Space("in", "mlp", w.shape[1], (Use("w", 1),)))
        keep["in"] = params["in"]
    move = Move("w")
    if params["rule"] == "importance":
        orders, _ = important(spaces, keep, lambda name: tensor(given[name]), shapes=shapes)
        assert orders["out"][: params["out"]].tolist() == ORACLES[case]["expected"]["kept"]
        move = Move("w", {0: orders["out"]})
    kept = kept_spans(spaces, keep, shapes)["w"]
    got = permuted(Move("w", cut(move, kept, shapes["w"])), w)
    assert tuple(got.shape) == kept_shape(shapes["w"], kept)
    close(got, case, "w", torch.float64)

"""Family files of one's own, checkpoints that are refused, and names that transformers writes no more."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from family_models import MODELS, build, saved
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mergekit_lite.align.apply import moves, permuted
from mergekit_lite.errors import InputError
from mergekit_lite.family import expression
from mergekit_lite.family.axes import spaces_of
from mergekit_lite.family.data import FamilyData, families, load_family, parse
from mergekit_lite.family.spaces import Space, Use

DOCUMENT = Path(__file__).parents[2] / "docs/families.md"
LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_hidden_layers": 1}  # fmt: skip
Shapes = dict[str, tuple[int, ...]]


def llama(layers: int = 1) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (11, 8), "lm_head.weight": (11, 8), "model.norm.weight": (8,)}
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj.weight": (8, 8),
            f"model.layers.{i}.self_attn.k_proj.weight": (4, 8),
            f"model.layers.{i}.self_attn.v_proj.weight": (4, 8),
            f"model.layers.{i}.self_attn.o_proj.weight": (8, 8),
            f"model.layers.{i}.mlp.gate_proj.weight": (6, 8),
            f"model.layers.{i}.mlp.up_proj.weight": (6, 8),
            f"model.layers.{i}.mlp.down_proj.weight": (8, 6),
            f"model.layers.{i}.input_layernorm.weight": (8,),
            f"model.layers.{i}.post_attention_layernorm.weight": (8,),
        }
    return shapes


def state(net: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def shuffled(net: nn.Module, spaces: tuple[Space, ...]) -> nn.Module:
    """A copy of the network with every space permuted at random."""
    rng, tensors = np.random.default_rng(0), net.state_dict()
    changed = moves(spaces, {space.name: rng.permutation(space.size) for space in spaces}, state(net))
    twin = copy.deepcopy(net)
    twin.load_state_dict(tensors | {name: permuted(move, tensors[move.source]) for name, move in changed.items()})
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    return twin


def randomised(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    net.double().eval()
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.1)
    return net


def test_the_spaces_of_a_llama_in_full():
    found = {space.name: space for space in spaces_of(LLAMA, llama())}
    assert list(found) == [
        "residual", "layers.0.heads", "layers.0.heads.0.vo", "layers.0.heads.1.vo", "layers.0.mlp",
    ]  # fmt: skip
    lead = "model.layers.0.self_attn."
    assert found["layers.0.heads"] == Space(
        "layers.0.heads",
        "heads",
        4,
        (
            Use(lead + "k_proj.weight", 0, block=2, grouped=True),
            Use(lead + "o_proj.weight", 1, block=2),
            Use(lead + "q_proj.weight", 0, block=2),
            Use(lead + "v_proj.weight", 0, block=2, grouped=True),
        ),
        group=2,
    )
    assert found["layers.0.heads.1.vo"] == Space(
        "layers.0.heads.1.vo",
        "vo",
        2,
        (
            Use(lead + "o_proj.weight", 1, start=4),
            Use(lead + "o_proj.weight", 1, start=6),
            Use(lead + "v_proj.weight", 0, start=2),
        ),
        parent="layers.0.heads",
        slot=1,
    )
    residual = {(use.tensor, use.axis) for use in found["residual"].uses}
    assert residual == {(n, i) for n, shape in llama().items() for i, length in enumerate(shape)
                        if length == 8 and not re.search(r"q_proj\.weight0|o_proj\.weight1", f"{n}{i}")}  # fmt: skip


def test_parents_and_layers_stand_in_order():
    names = [space.name for space in spaces_of(LLAMA | {"num_hidden_layers": 12}, llama(12))]
    layers = [int(name.split(".")[1]) for name in names[1:]]
    assert names[0] == "residual" and layers == sorted(layers) and set(layers) == set(range(12))


@pytest.mark.parametrize("rename", [{"lm_head.weight": None}, {}], ids=["stored once", "stored twice"])
def test_a_tied_tensor_counts_where_it_is_stored(rename: Mapping[str, None]):
    shapes = {name: shape for name, shape in llama().items() if name not in rename}
    (residual, *_) = spaces_of(LLAMA | {"tie_word_embeddings": True}, shapes)
    assert {"model.embed_tokens.weight", "lm_head.weight"} & {use.tensor for use in residual.uses} == (
        {"model.embed_tokens.weight", "lm_head.weight"} - set(rename)
    )


@pytest.mark.parametrize("key_of_base", ["LlamaModel", "MistralModel"])
def test_without_a_head_the_residual_stream_stays(key_of_base: str):
    shapes = {name.removeprefix("model."): shape for name, shape in llama().items() if name != "lm_head.weight"}
    found = spaces_of(LLAMA | {"architectures": [key_of_base]}, shapes)
    assert {space.kind for space in found} == {"heads", "vo", "mlp"}


@pytest.mark.parametrize(
    ("config", "shapes", "message"),
    [
        ({"model_type": "never heard of"}, {}, "model type `never heard of` are unknown"),
        ({}, {}, "names no model type"),
        ({}, {"model.layers.0.self_attn.sinks": (4,)}, "names no model type"),
        (LLAMA, {"model.layers.0.self_attn.sinks": (4,)}, r"no rule .*`llama`.*`model\.layers\.0\.self_attn\.sinks`"),
        (LLAMA, {"model.layers.0.mlp.up_proj.weight": (7, 8)}, r"up_proj\.weight` has 7 entries along axis 0.* 6"),
        (LLAMA, {"model.layers.0.mlp.up_proj.weight": (6, 8, 1)}, r"up_proj\.weight` has 3 axes"),
        (LLAMA, {"model.layers.0.self_attn.k_proj.weight": (8, 8)}, r"k_proj\.weight` has 8 entries"),
        (LLAMA | {"num_attention_heads": 3}, {}, "3 does not divide 8"),
        (LLAMA | {"num_key_value_heads": 3, "head_dim": 2}, {}, "has 4 entries"),
        (LLAMA | {"num_attention_heads": 0}, {}, "divides by zero"),
        (LLAMA | {"hidden_size": None}, {}, "does not state `hidden_size`"),
        (LLAMA | {"intermediate_size": [6]}, {}, "does not state `intermediate_size`"),
        (LLAMA | {"intermediate_size": -6}, {}, "gives -6"),
    ],
)
def test_what_does_not_fit_is_refused(config: dict[str, object], shapes: Shapes, message: str):
    with pytest.raises(InputError, match=message):
        spaces_of(config, llama() | shapes)


def test_every_unknown_tensor_is_named_up_to_a_few():
    with pytest.raises(InputError) as caught:
        spaces_of(LLAMA, llama() | {f"model.layers.0.extra.{i}": (1,) for i in range(9)})
    assert len(caught.value.problems) == 6 and "4 further" in caught.value.problems[-1].message


def test_experts_must_be_whole(tmp_path: Path):
    config, tensors = saved(build(MODELS["mixtral"]), tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    del shapes["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    with pytest.raises(InputError, match=r"`layers\.1\.experts` has 4 members, of which 3 have a tensor"):
        spaces_of(config, shapes)


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}),
        ("gpt2", {"transformer.h.0.attn.bias": (1, 1, 32, 32), "transformer.h.0.attn.masked_bias": ()}),
        ("gpt_neox", {"gpt_neox.layers.0.attention.bias": (1, 1, 32, 32),
                      "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (2,)}),
        ("bert", {"bert.embeddings.position_ids": (1, 32), "cls.predictions.decoder.bias": (48,)}),
        ("clip", {"text_model.embeddings.position_ids": (1, 32), "vision_model.embeddings.position_ids": (1, 5)}),
        ("t5", {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": (4, 3)}),
    ],
)  # fmt: skip
def test_buffers_of_older_releases_stay_in_place(name: str, old: Shapes, tmp_path: Path):
    config, tensors = saved(build(MODELS[name]), tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert spaces_of(config, shapes | old) == spaces_of(config, shapes)


def test_other_names_of_older_releases_and_other_homes(tmp_path: Path):
    config, tensors = saved(build(MODELS["bert"]), tmp_path / "bert")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    ends = re.compile("|".join(map(re.escape, older)))
    renamed = {ends.sub(lambda match: older[match[0]], name): shape for name, shape in shapes.items()}
    assert renamed.keys() != shapes.keys()
    assert [s.name for s in spaces_of(config, renamed)] == [s.name for s in spaces_of(config, shapes)]

    # The layout of a Gemma 3 inside its wrapper before and after it was turned around.
    config, tensors = saved(build(MODELS["gemma3-images"]), tmp_path / "gemma")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    turned = {"language_model.model.": "model.language_model.", "vision_tower.": "model.vision_tower.",
              "multi_modal_projector.": "model.multi_modal_projector."}  # fmt: skip
    lead = re.compile("^(" + "|".join(map(re.escape, turned)) + ")")
    renamed = {lead.sub(lambda match: turned[match[0]], name): shape for name, shape in shapes.items()}
    assert renamed.keys() != shapes.keys()
    assert [s.name for s in spaces_of(config, renamed)] == [s.name for s in spaces_of(config, shapes)]


def test_a_sparse_configuration_of_clip_has_the_sizes_of_the_smallest_model():
    vision = {"hidden_size": 12, "num_attention_heads": 2}
    config = {"model_type": "clip", "text_config": {"model_type": "clip_text_model"}, "vision_config": vision}
    found = spaces_of(config, {
        "text_model.encoder.layers.0.self_attn.q_proj.weight": (512, 512),
        "text_model.encoder.layers.0.self_attn.k_proj.weight": (512, 512),
        "vision_model.encoder.layers.0.self_attn.q_proj.weight": (12, 12),
    })  # fmt: skip
    assert {space.name: space.size for space in found if space.kind in ("residual", "heads")} == {
        "text.residual": 512, "vision.residual": 12, "text.layers.0.heads": 8, "vision.layers.0.heads": 2,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["resnet-basic", "resnet-bottleneck"])
def test_torchvision_names_give_the_spaces_of_the_same_network(name: str, tmp_path: Path):
    config, tensors = saved(build(MODELS[name]), tmp_path)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}

    def renamed(key: str) -> str:
        key = key.replace("resnet.embedder.embedder.convolution", "conv1").replace("classifier.1", "fc")
        key = key.replace("resnet.embedder.embedder.normalization", "bn1")
        block = re.fullmatch(r"resnet\.encoder\.stages\.(\d)\.layers\.(\d)\.(.*)", key)
        if block is None:
            return key
        rest = (
            block[3].replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
        )
        rest = re.sub(r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}", rest)
        rest = re.sub(r"layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}", rest)
        return f"layer{int(block[1]) + 1}.{block[2]}.{rest}"

    here = spaces_of(config, shapes)
    there = spaces_of({}, {renamed(key): shape for key, shape in shapes.items()}, load_family("resnet_torchvision"))
    assert {frozenset((renamed(use.tensor), use.axis, use.weighed) for use in s.uses) for s in here} == {
        frozenset((use.tensor, use.axis, use.weighed) for use in s.uses) for s in there
    }


@pytest.mark.parametrize("prefix", ["", "net."])
def test_a_plain_mlp_by_the_name_of_its_family(prefix: str):
    net = randomised(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.GELU(), nn.Linear(6, 6), nn.ReLU(),
                                   nn.Linear(6, 3)))  # fmt: skip
    found = spaces_of({}, {prefix + name: shape for name, shape in state(net).items()}, load_family("mlp"))
    assert [(s.name, s.size) for s in found] == [("hidden.0", 7), ("hidden.2", 6), ("hidden.4", 6)]
    inputs = torch.randn(9, 5).double()
    found = spaces_of({}, state(net), load_family("mlp"))
    assert torch.allclose(net(inputs), shuffled(net, found)(inputs), rtol=1e-12)


def documented() -> str:
    (text, *_) = re.findall(r"^```yaml\n(name:.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.M | re.S)
    return str(text)


def test_the_network_of_the_document(tmp_path: Path):
    front = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten())
    net = randomised(nn.Sequential(*front, nn.Linear(5 * 4 * 4, 6), nn.Tanh(), nn.Linear(6, 2)))
    (tmp_path / "cnn.yaml").write_text(documented())
    found = spaces_of({}, state(net), load_family(tmp_path / "cnn.yaml"))
    assert [(s.name, s.size) for s in found] == [("first", 4), ("hidden", 6), ("second", 5)]
    assert {use.block for space in found for use in space.uses} == {1, 16}
    assert {use.tensor for space in found for use in space.uses if not use.weighed} == {
        "1.running_mean",
        "1.running_var",
    }
    inputs = torch.randn(3, 3, 6, 6).double()
    assert torch.allclose(net(inputs), shuffled(net, found)(inputs), rtol=1e-12)
    with pytest.raises(InputError, match=r"`6\.weight` has 81 entries"):
        spaces_of({}, state(net) | {"6.weight": (6, 81)}, load_family(tmp_path / "cnn.yaml"))


GOOD = """\
name: x
model_types: [x]
spaces:
  units: {name: "layers.{i}.units", size: width, groups: {groups: n}, member: j}
  inner: {name: "layers.{i}.units.{j}.inner", of: units, size: 2}
axes:
  "layers.{i}.weight": [units * inner, fixed]
"""


@pytest.mark.parametrize(
    ("old", "new", "message", "line"),
    [
        ("size: width", "size: width ** 2", "is no size", 4),
        ("size: width", "sise: width", "(?s)no key `sise`.*did you mean `size`", 4),
        ("units * inner", "units * iner", "`iner` of .* is no space", 7),
        ("units * inner", "units - inner", "is no axis", 7),
        ("units * inner", "inner * 2", "`inner` of .* does not stand inside `units`", 7),
        (", size: 2}", "}", "`inner` lies inside `units` and needs a size", 5),
        ("units * inner", "'units[k - 1]'", "no number `k`", 7),
        ("layers.{i}.weight", "layers.weight", "lacks the number `i`", 7),
        ("layers.{i}.weight", "layers.{i}.{i}.weight", "one placeholder twice", 7),
        ("of: units", "of: unit", "names no space that has a `member`", 5),
        ("{groups: n}", "n", "is a mapping", 4),
        ("[units * inner, fixed]", "units", "has a list of axes or `fixed`", 7),
        ("spaces:", "sizes: {units: 2}\nspaces:", "`units` must be a word, and mean one thing only", 3),
        ("axes:", "cases: [{lacks: a}]\naxes:", "a condition and what follows", 6),
        ("axes:", "cases: [{lacks: a, fixed: uints}]\naxes:", "`fixed: uints` names no space", 6),
        ("axes:", "axes:\n  a: fixed\n  a: []", "`a` stands here a second time", 8),
        ("axes:", "axes: [", "no YAML", None),
        ("model_types: [x]", "model_type: [x]", "no key `model_type`", 2),
    ],
)
def test_a_fault_in_a_file_is_shown_where_it_stands(old: str, new: str, message: str, line: int | None, tmp_path: Path):
    file = tmp_path / "family.yaml"
    file.write_text(GOOD)
    assert load_family(file).layout is not None
    assert old in GOOD
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(InputError, match=message) as caught:
        load_family(file)
    (problem,) = caught.value.problems
    assert problem.mark is not None and problem.mark.file == str(file)
    assert line is None or problem.mark.line == line


def test_a_file_that_is_not_there_and_a_name_nobody_has(tmp_path: Path):
    with pytest.raises(InputError, match="cannot read the family file"):
        load_family(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="did you mean `llama`"):
        load_family("lama")
    assert load_family("llama") is families()["mistral"]


def test_cases_of_the_configuration_refuse_and_hold():
    raw = yaml.safe_load(GOOD) | {"cases": [{"config": {"odd": True}, "refuse": "odd heads are mixed"}]}
    data: FamilyData = parse(raw, "x.yaml")
    config = {"model_type": "x", "width": 4, "n": 2}
    assert [s.name for s in spaces_of(config, {"layers.0.weight": (8, 3)}, data)] == [
        "layers.0.units", "layers.0.units.0.inner", "layers.0.units.1.inner",
    ]  # fmt: skip
    with pytest.raises(InputError, match="odd heads are mixed"):
        spaces_of(config | {"odd": True}, {"layers.0.weight": (8, 3)}, data)


def test_a_family_without_spaces_says_so():
    with pytest.raises(InputError, match="family `x` states no spaces"):
        spaces_of({"model_type": "x"}, {}, parse({"name": "x", "model_types": ["x"]}, "x.yaml"))


@given(st.dictionaries(st.sampled_from(["a", "b", "c.d"]), st.integers(0, 60)), st.data())
def test_sizes_are_arithmetic(values: dict[str, int], data: st.DataObject):
    a, b, c = (values.get(key) for key in ("a", "b", "c.d"))
    assert expression.size("a or b or 7", values.get) == next((v for v in (a, b, 7) if v is not None), None)
    total = expression.size("a * 2 + c.d", values.get)
    assert total == (None if a is None or c is None else a * 2 + c)
    if a is not None and b:
        if a % b:
            with pytest.raises(ValueError, match="does not divide"):
                expression.size("a / b", values.get)
        else:
            assert expression.size("a / b", values.get) == a // b
    assert expression.keys("a or c.d * 2") == ("a", "c.d")


def test_what_stands_behind_a_stated_key_need_not_come_out_even():
    """A model whose width is no multiple of its heads states the size of a head."""
    assert expression.size("a or b / c", {"a": 8, "b": 18, "c": 4}.get) == 8


@pytest.mark.parametrize(
    "text", ["__import__('os')", "a if b else c", "[a]", "a[0]", "'a'", "a(", "a.b()", "True", "a < b"]
)
def test_only_arithmetic_is_a_size(text: str):
    with pytest.raises(ValueError, match="is no"):
        expression.check_size(text)

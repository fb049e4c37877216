"""Spaces read off a graph: those that a person would write down, and none that the network does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_lite.align.prove import prove
from mergekit_lite.align.trace import trace_spaces
from mergekit_lite.errors import InputError
from mergekit_lite.family.spaces import Space

Uses = set[tuple[str, int, int, int]]
IMAGE = torch.randn(2, 3, 8, 8)
ROWS = torch.randn(3, 5)
SEQUENCE = torch.randn(2, 4, 6)


def traced(module: nn.Module, inputs: Any) -> list[Space]:
    """The spaces of a module, proved."""
    spaces = trace_spaces(module, inputs)
    assert [found.detail for found in prove(spaces, module, inputs) if found.verdict != "ok"] == []
    return list(spaces)


def uses(space: Space) -> Uses:
    return {(use.tensor, use.axis, use.block, use.start) for use in space.uses}


def plain(*axes: str) -> Uses:
    """`0.weight 1` is axis 1 of that tensor, all of it."""
    return {(text.split()[0], int(text.split()[1]), 1, 0) for text in axes}


class Of(nn.Module):
    """A module of parts and a function of them and the input."""

    def __init__(self, function: Callable[..., Any], **parts: Any):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def test_an_mlp() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 6), nn.LayerNorm(6), nn.GELU(),
                          nn.Linear(6, 4), nn.Softmax(-1))  # fmt: skip
    first, second = traced(model, ROWS)
    assert (first.name, first.kind, first.size) == ("0", "mlp", 7)
    assert uses(first) == plain("0.weight 0", "0.bias 0", "3.weight 1")
    assert uses(second) == plain("3.weight 0", "3.bias 0", "4.weight 0", "4.bias 0", "6.weight 1")


def test_a_cnn_with_batch_norm_and_a_flattened_end() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5))  # fmt: skip
    first, second = traced(model, IMAGE)
    assert first.kind == second.kind == "channels"
    norm = plain("1.weight 0", "1.bias 0", "1.running_mean 0", "1.running_var 0")
    assert uses(first) == plain("0.weight 0", "0.bias 0", "4.weight 1") | norm
    assert {use.tensor for use in first.uses if not use.weighed} == {"1.running_mean", "1.running_var"}
    assert uses(second) == plain("4.weight 0", "4.bias 0") | {("7.weight", 1, 4, 0)}


class Block(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.bn2(self.conv2(inner)))


def test_a_residual_network_with_a_shortcut() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Block(4, 4), Block(4, 6), Of(lambda m, x: m.head(x.mean((2, 3))),
                          head=nn.Linear(6, 5)))  # fmt: skip
    spaces = traced(model, IMAGE)
    streams = [space for space in spaces if space.kind == "residual"]
    assert [(space.name, space.size) for space in streams] == [("0", 4), ("2.conv2", 6)]
    norm = plain("1.bn2.weight 0", "1.bn2.bias 0", "1.bn2.running_mean 0", "1.bn2.running_var 0")
    into = plain("1.conv1.weight 1", "2.conv1.weight 1", "2.shortcut.weight 1")
    assert uses(streams[0]) == plain("0.weight 0", "0.bias 0", "1.conv2.weight 0") | norm | into
    inner = [space for space in spaces if space.kind == "channels"]
    assert [(space.name, space.size) for space in inner] == [("1.conv1", 4), ("2.conv1", 6)]


def test_a_depthwise_convolution_belongs_to_its_input() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU6(), nn.Conv2d(6, 4, 1))
    (space,) = traced(model, IMAGE)
    assert uses(space) == plain("0.weight 0", "0.bias 0", "1.weight 0", "1.bias 0", "3.weight 1")


def test_groups_of_channels() -> None:
    """Groups change places as wholes, and channels within all groups alike."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, groups=2), nn.Conv2d(4, 5, 1))
    by_size = {space.size: uses(space) for space in traced(model, IMAGE) if space.size == 3}
    assert by_size[3] == plain("1.weight 1") | {(n, 0, 1, start) for n in ("0.weight", "0.bias") for start in (0, 3)}
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 5, 1))
    wholes, within = sorted(traced(model, IMAGE), key=lambda space: space.size)
    assert (wholes.size, within.size) == (2, 3) and ("1.weight", 0, 3, 0) in uses(wholes)


def test_a_transposed_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 4, 2, stride=2), nn.ReLU(), nn.Conv2d(4, 2, 1))
    first, second = traced(model, IMAGE)
    assert uses(first) == plain("0.weight 0", "0.bias 0", "1.weight 0")
    assert uses(second) == plain("1.weight 1", "1.bias 0", "3.weight 1")


def test_channels_that_come_last_when_flattened() -> None:
    model = Of(
        lambda m, x: m.fc(m.conv(x).permute(0, 2, 3, 1).flatten(1)), conv=nn.Conv2d(3, 4, 7), fc=nn.Linear(16, 2)
    )
    (space,) = traced(model, IMAGE)
    assert uses(space) == plain("conv.weight 0", "conv.bias 0") | {("fc.weight", 1, 1, 4 * i) for i in range(4)}


def test_fused_and_concatenated_parts() -> None:
    def gated(m: Any, x: Tensor) -> Tensor:
        a, b = m.up(x).chunk(2, -1)
        out: Tensor = m.down(torch.cat([F.silu(a) * b, m.side(x)], -1))
        return out

    spaces = traced(Of(gated, up=nn.Linear(5, 8), side=nn.Linear(5, 3), down=nn.Linear(7, 2)), ROWS)
    fused = {("up.weight", 0, 1, 0), ("up.weight", 0, 1, 4), ("up.bias", 0, 1, 0), ("up.bias", 0, 1, 4)}
    assert uses(spaces[0]) == fused | plain("down.weight 1")
    assert uses(spaces[1]) == plain("side.weight 0", "side.bias 0") | {("down.weight", 1, 1, 4)}


def test_an_lstm() -> None:
    """The gates are four parts of one axis, tied to one hidden state."""
    spaces = traced(
        Of(lambda m, x: m.head(m.lstm(x)[0]), lstm=nn.LSTM(6, 5, batch_first=True), head=nn.Linear(5, 3)), SEQUENCE
    )
    (space,) = spaces
    gates = {(f"lstm.{name}_l0", 0, 1, 5 * gate) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
             for gate in range(4)}  # fmt: skip
    assert uses(space) == gates | plain("lstm.weight_hh_l0 1", "head.weight 1")


class Attention(nn.Module):
    """Pre-norm attention and feed-forward on a residual stream, with the projections fused as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(6, 12), nn.Parameter(torch.randn(1, 4, 12))
        self.norm, self.qkv, self.out = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(8, 12)
        self.up, self.down, self.head = nn.Linear(12, 10), nn.Linear(10, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place
        q, k, v = self.qkv(self.norm(x)).reshape(2, 4, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(2, 4, 8))
        out: Tensor = self.head((x + self.down(F.gelu(self.up(x)))).mean(1))
        return out


def test_attention() -> None:
    spaces = {space.kind: space for space in traced(Attention(), SEQUENCE)}
    assert {kind: space.size for kind, space in spaces.items()} == {"residual": 12, "heads": 2, "vo": 4, "mlp": 10}
    fused = {(name, 0, 4, 8 * part) for name in ("qkv.weight", "qkv.bias") for part in range(3)}
    assert uses(spaces["heads"]) == fused | {("out.weight", 1, 4, 0)}
    assert {("place", 2, 1, 0), ("embed.weight", 0, 1, 0), ("head.weight", 1, 1, 0)} <= uses(spaces["residual"])


def test_tied_tensors_go_by_their_first_name() -> None:
    model = Of(lambda m, x: m.head(m.back(F.relu(m.embed(x)))), embed=nn.Embedding(7, 5), back=nn.Linear(5, 5),
               head=nn.Linear(5, 7, bias=False))  # fmt: skip
    model.head.weight = model.embed.weight
    (space,) = traced(model, torch.randint(7, (2, 3)))
    assert uses(space) == plain("embed.weight 1", "back.weight 1", "back.weight 0", "back.bias 0")


@pytest.mark.parametrize(
    "middle",
    [
        lambda x: x.cumsum(-1),
        lambda x: x.roll(1, -1),
        lambda x: x.flip(-1),
        lambda x: x.sort(-1).values,
        lambda x: torch.fft.rfft(x).real,
        lambda x: x * torch.arange(8.0),
        lambda x: x[..., ::2],
        lambda x: x + x.argmax(-1, keepdim=True),
        lambda x: x.unfold(-1, 4, 2).flatten(1),
    ],
)  # fmt: skip
def test_what_sees_the_order_fixes_it(middle: Callable[[Tensor], Tensor]) -> None:
    width = middle(torch.randn(3, 8)).shape[-1]
    model = Of(lambda m, x: m.last(F.relu(m.second(middle(m.first(x))))), first=nn.Linear(5, 8),
               second=nn.Linear(width, 6), last=nn.Linear(6, 2))  # fmt: skip
    (space,) = traced(model, ROWS)
    assert space.name == "second"


def test_what_halves_and_pads_leaves_free_what_it_can() -> None:
    def halves(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        out: Tensor = m.last(F.pad(torch.cat([-y[..., 4:], y[..., :4]], -1), (1, 2)))
        return out

    spaces = traced(Of(halves, first=nn.Linear(5, 8), last=nn.Linear(11, 2)), ROWS)
    assert [space.size for space in spaces if ("first.weight", 0, 1, 0) in uses(space)] == [4]
    assert [space.size for space in spaces if ("first.weight", 0, 1, 4) in uses(space)] == [4]


def test_inputs_by_name_and_modes_are_kept() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 2)).train()
    model[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (space,) = trace_spaces(model, {"input": ROWS})
    assert space.size == 7
    assert [part.training for part in model] == [False, True, True] and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_cannot_be_traced() -> None:
    model = Of(lambda m, x: m.a(x) if x.sum().item() > 0 else m.a(-x), a=nn.Linear(5, 2))
    with pytest.raises(InputError, match=r"torch.export cannot trace Of") as raised:
        trace_spaces(model, ROWS)
    assert "family file" in str(raised.value)


def test_the_graph_of_a_decoder_tells_what_its_family_file_does() -> None:
    """Two ways to the same spaces: heads, hidden units and the residual stream of a Llama, tensor by tensor."""
    pytest.importorskip("transformers")
    from mergekit_lite.family.axes import spaces_of
    from mergekit_lite.report.quiet import quiet
    from mergekit_lite.report.tiny import tiny_model, transformers

    with quiet(transformers()):
        tiny = tiny_model({"model_type": "llama", "num_key_value_heads": 32}, parameters=0)
    model = Of(lambda m, ids: m.llama(input_ids=ids, use_cache=False).logits, llama=tiny.model)
    found = {space.kind: uses(space) for space in trace_spaces(model, tiny.inputs["input_ids"])}
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny.model.state_dict().items()}
    stated = {space.kind: uses(space) for space in spaces_of(tiny.config, shapes)}
    for kind in ("heads", "mlp", "residual"):
        assert found[kind] == {(f"llama.{name}", *rest) for name, *rest in stated[kind]}

"""Proofs: what is a symmetry passes, whatever is missing or too much is caught."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_lite.align.prove import Finding, coordinates, prove, prove_state
from mergekit_lite.errors import InputError
from mergekit_lite.family.spaces import Space, Use

ROWS = torch.randn(3, 5)
TOKENS = torch.randint(11, (2, 6))
MLP = Space("hidden", "mlp", 7, (Use("0.weight", 0), Use("0.bias", 0), Use("2.weight", 1)))


def mlp() -> nn.Module:
    """Zero biases, as many networks start with: they hide what is missing until they are drawn anew."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))
    nn.init.zeros_(model[0].bias)
    return model


def verdicts(found: list[Finding]) -> dict[str, str]:
    return {finding.space: finding.verdict for finding in found}


def test_a_space_and_the_network_stays_as_it_was() -> None:
    model = mlp().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (found,) = prove([MLP], model, ROWS)
    assert found.verdict == "ok" and found.change < 1e-12 and found.idle == ()
    assert model.training and all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert prove([MLP], model, ROWS, seed=3) == prove([MLP], model, ROWS, seed=3)


@pytest.mark.parametrize("missing", range(3))
def test_a_missing_use(missing: int) -> None:
    less = replace(MLP, uses=MLP.uses[:missing] + MLP.uses[missing + 1 :])
    (found,) = prove([less], mlp(), ROWS)
    assert found.verdict == "fail" and found.change > 0.01


@pytest.mark.parametrize(
    "wrong",
    [
        replace(MLP, uses=(*MLP.uses, Use("2.bias", 0)), size=4),
        replace(MLP, size=3, uses=(Use("0.weight", 0, 2), Use("0.bias", 0, 2), Use("2.weight", 1))),
        replace(MLP, size=6, uses=(Use("0.weight", 0), Use("0.bias", 0), Use("2.weight", 1, start=1))),
    ],
    ids=["an output", "blocks of two widths", "a shifted start"],
)
def test_a_wrong_use(wrong: Space) -> None:
    assert verdicts(prove([wrong], mlp(), ROWS)) == {"hidden": "fail"}


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (Use("3.weight", 0), "`3.weight`, which the network does not have"),
        (Use("2.weight", 2), "place 7 of axis 2"),
        (Use("2.weight", 1, start=1), "place 8 of axis 1"),
        (Use("2.weight", 1, block=2), "place 14 of axis 1"),
    ],
)
def test_a_place_that_is_not_there(use: Use, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prove([replace(MLP, uses=(*MLP.uses, use))], mlp(), ROWS)


def test_a_network_that_ignores_its_weights_proves_nothing() -> None:
    class Deaf(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * super().forward(x)

    (found,) = prove([MLP], Deaf(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)), ROWS)
    assert found.verdict == "fail" and "nothing is proved" in found.detail


def test_a_network_without_finite_outputs() -> None:
    with pytest.raises(InputError, match="no finite output"):
        prove_state([MLP], mlp().state_dict(), lambda state: [state["0.bias"] * float("inf")])


def test_spaces_that_hold_alone_but_not_together() -> None:
    """A function that sees whether both of its tensors were moved, and else only what is in them."""

    def evaluate(state: Mapping[str, Tensor]) -> list[Tensor]:
        pairs = [(state[name].sort().values, state[name]) for name in ("a", "b")]
        moved = [bool((start[name] != tensor).any()) for name, (_, tensor) in zip(start, pairs, strict=True)]
        return [torch.cat([pairs[0][0], pairs[1][0]]) * (2.0 if all(moved) else 1.0)]

    start: dict[str, Tensor] = {}

    def remembered(state: Mapping[str, Tensor]) -> list[Tensor]:
        start.update({} if start else state)
        return evaluate(state)

    spaces = [Space(name, "mlp", 5, (Use(name, 0),)) for name in ("a", "b")]
    found = prove_state(spaces, {"a": torch.randn(5), "b": torch.randn(5)}, remembered)
    assert verdicts(found) == {"a": "ok", "b": "ok", "all together": "fail"}


def test_tied_tensors_count_once_under_any_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight
            self.inner = nn.Linear(6, 6)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(torch.tanh(self.inner(self.embed(ids))))
            return out

    inner = (Use("inner.weight", 0), Use("inner.bias", 0), Use("inner.weight", 1))
    for names in (["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]):
        space = Space("stream", "residual", 6, (*inner, *(Use(name, 1) for name in names)))
        assert verdicts(prove([space], Tied(), TOKENS)) == {"stream": "ok"}


class Experts(nn.Module):
    """Two of four experts for each row, chosen by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(5, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.router(x).topk(2, -1)
        every = torch.stack([expert(x) for expert in self.experts], 1)
        picked = every.gather(1, chosen[..., None].expand(-1, -1, 3))
        return (picked * scores.softmax(-1)[..., None]).sum(1)


def test_experts_are_renamed() -> None:
    parts = ["0.weight", "0.bias", "2.weight", "2.bias"]
    renames = tuple(tuple(f"experts.{e}.{part}" for e in range(4)) for part in parts)
    whole = Space("experts", "experts", 4, (Use("router.weight", 0),), renames=renames)
    inner = [
        Space(f"experts.{e}.mlp", "mlp", 6, tuple(
            Use(f"experts.{e}.{part}", axis) for part, axis in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1))
        ), parent="experts", slot=e)
        for e in range(4)
    ]  # fmt: skip
    x = torch.randn(40, 5)
    assert set(verdicts(prove([whole, *inner], Experts(), x)).values()) == {"ok"}
    assert verdicts(prove([replace(whole, renames=renames[:3])], Experts(), x)) == {"experts": "fail"}
    assert verdicts(prove([replace(whole, uses=())], Experts(), x)) == {"experts": "fail"}


class Attention(nn.Module):
    """Four heads of four coordinates on two heads of keys and values, with or without rotary positions."""

    def __init__(self, rotary: bool):
        super().__init__()
        self.rotary, self.embed = rotary, nn.Embedding(11, 9)
        self.q, self.k, self.v = nn.Linear(9, 16), nn.Linear(9, 8), nn.Linear(9, 8)
        self.o = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.rotary:
            angles = torch.arange(ids.shape[1])[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
            q, k = (torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)
                    for a, b in (part.chunk(2, -1) for part in (q, k)))  # fmt: skip
        mixed = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


def attention_spaces() -> tuple[Space, list[Space], list[Space]]:
    """The heads, and within each group of them what value and output share, and what query and key share."""
    rows = [f"{name}.{part}" for name in "qkv" for part in ("weight", "bias")]
    uses = tuple(Use(name, 0, 4, grouped=not name.startswith("q")) for name in rows)
    heads = Space("heads", "heads", 4, (*uses, Use("o.weight", 1, 4)), group=2)
    vo, qk = [], []
    for j in range(2):
        values = [Use("v.weight", 0, start=4 * j), Use("v.bias", 0, start=4 * j)]
        keys = [Use("k.weight", 0, start=4 * j), Use("k.bias", 0, start=4 * j)]
        queries = [Use(f"q.{part}", 0, start=8 * j + 4 * i) for part in ("weight", "bias") for i in range(2)]
        outs = [Use("o.weight", 1, start=8 * j + 4 * i) for i in range(2)]
        vo.append(Space(f"vo.{j}", "vo", 4, (*values, *outs), parent="heads", slot=j))
        qk.append(Space(f"qk.{j}", "qk", 4, (*keys, *queries), parent="heads", slot=j))
    return heads, vo, qk


def test_heads_and_what_is_within_them() -> None:
    heads, vo, qk = attention_spaces()
    found = prove([heads, *vo, *qk], Attention(rotary=False), TOKENS)
    assert set(verdicts(found).values()) == {"ok"}
    # Every query adds the same to all its scores whatever a key's bias is, and softmax does not see it.
    assert {finding.space: finding.idle for finding in found if finding.idle} == {
        "heads": ("k.bias",), "qk.0": ("k.bias",), "qk.1": ("k.bias",),
    }  # fmt: skip


def test_rotary_coordinates_keep_their_places() -> None:
    heads, vo, qk = attention_spaces()
    model = Attention(rotary=True)
    (inner,) = coordinates([heads, *vo])
    found = verdicts(prove([heads, *vo], model, TOKENS, none=[inner]))
    assert set(found.values()) == {"ok"} and "heads.coordinates" in found
    declared = verdicts(prove([heads, *vo, *qk], model, TOKENS))
    assert [name for name, verdict in declared.items() if verdict == "fail"] == ["qk.0", "qk.1", "all together"]
    # Without rotary positions the same coordinates are free, and a table that leaves them out is told so.
    assert verdicts(prove([heads], Attention(rotary=False), TOKENS, none=[inner]))["heads.coordinates"] == "warn"
    assert coordinates([heads, *qk]) == ()


def test_keys_that_move_without_their_queries() -> None:
    heads, _, _ = attention_spaces()
    keys_alone = replace(heads, uses=tuple(use for use in heads.uses if not use.tensor.startswith("q")))
    assert verdicts(prove([keys_alone], Attention(rotary=True), TOKENS)) == {"heads": "fail"}
    one_group = replace(heads, group=4)
    assert verdicts(prove([one_group], Attention(rotary=True), TOKENS)) == {"heads": "fail"}
    ungrouped = replace(heads, group=1, uses=tuple(u for u in heads.uses if not u.grouped))
    assert verdicts(prove([ungrouped], Attention(rotary=True), TOKENS)) == {"heads": "fail"}


def test_running_statistics_move_with_their_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    space = Space("channels", "channels", 4, (*(Use(name, 0) for name in names), Use("3.weight", 1)))
    images = torch.randn(2, 3, 5, 5)
    assert verdicts(prove([space], model, images)) == {"channels": "ok"}
    for name in names:
        less = replace(space, uses=tuple(use for use in space.uses if use.tensor != name))
        assert verdicts(prove([less], model, images)) == {"channels": "fail"}

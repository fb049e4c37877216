"""Small networks as lists of spaces and shapes, random tensors for them and random members of their symmetry groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mergekit_lite.align.apply import Order, moves, permuted
from mergekit_lite.family.spaces import Space, Use


@dataclass
class Net:
    spaces: list[Space]
    shapes: dict[str, tuple[int, ...]]
    kinds: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.kinds = {space.kind for space in self.spaces}

    def tensors(self, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in self.shapes.items()}

    def member(self, seed: int, kinds: set[str] | None = None) -> dict[str, Order]:
        """A random member of the group: every space of `kinds` in random order, children too."""
        random = np.random.default_rng(seed)
        chosen = [space for space in self.spaces if space.kind in (kinds or self.kinds)]
        return {space.name: shuffled(space, random) for space in chosen}

    def apply(self, permutations: Mapping[str, Order], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = moves(self.spaces, permutations, self.shapes)
        return {
            name: permuted(found[name], tensors[found[name].source]) if name in found else tensor
            for name, tensor in tensors.items()
        }


def shuffled(space: Space, random: np.random.Generator) -> Order:
    groups = random.permutation(space.groups)
    inner = [random.permutation(space.group) for _ in groups]
    return np.concatenate([j * space.group + order for j, order in zip(groups, inner, strict=True)]).astype(np.int64)


def product(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Sequence[str] | None = None) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in names or a)


class Reads:
    """Tensors by name; how often each was asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors, self.count = tensors, dict.fromkeys(tensors, 0)

    def __call__(self, name: str) -> Tensor:
        self.count[name] += 1
        return self.tensors[name].clone()


def mlp(widths: Sequence[int]) -> Net:
    spaces: list[Space] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (rows, columns) in enumerate(zip(widths[1:], widths, strict=False)):
        shapes |= {f"{i}.weight": (rows, columns), f"{i}.bias": (rows,)}
        if i < len(widths) - 2:
            uses = (Use(f"{i}.weight", 0), Use(f"{i}.bias", 0), Use(f"{i + 1}.weight", 1))
            spaces.append(Space(f"h{i}", "mlp", rows, uses))
    return Net(spaces, shapes)


def conv_net() -> Net:
    """Two stages: a stem and a block each with an inner convolution, BatchNorm everywhere, a flattened head."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, out: int, into: int, size: int) -> list[Use]:
        shapes[f"{name}.weight"] = (out, into, size, size)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = (out,)
        still = ("running_mean", "running_var")
        return [Use(f"{name}.weight", 0)] + [
            Use(f"{name}.bn.{p}", 0, weighed=p not in still) for p in ("weight", "bias", *still)
        ]

    stage = conv("stem", 6, 3, 3)
    inner = conv("block.1", 8, 6, 3)
    stage += [Use("block.1.weight", 1), *conv("block.2", 6, 8, 3)]
    inner += [Use("block.2.weight", 1)]
    following = conv("down", 7, 6, 1)
    stage += [Use("down.weight", 1)]
    shapes["head.weight"] = (5, 28)
    following += [Use("head.weight", 1, block=4)]
    return Net(
        [
            Space("stage", "residual", 6, tuple(stage)),
            Space("inner", "mlp", 8, tuple(inner)),
            Space("next", "residual", 7, tuple(following)),
        ],
        shapes,
    )


def decoder(layers: int = 2, *, kv: int = 2, group: int = 2, head: int = 4, width: int = 12, hidden: int = 10) -> Net:
    """Llama's layout: residual stream, grouped heads with value coordinates inside them, gated feed-forward parts."""
    heads = kv * group
    shapes: dict[str, tuple[int, ...]] = {"embed": (30, width), "head": (30, width), "norm": (width,)}
    residual = [Use("embed", 1), Use("head", 1), Use("norm", 0)]
    spaces: list[Space] = []
    for i in range(layers):
        shapes |= {f"{i}.q": (heads * head, width), f"{i}.k": (kv * head, width), f"{i}.v": (kv * head, width)}
        shapes |= {f"{i}.v.bias": (kv * head,), f"{i}.o": (width, heads * head), f"{i}.norm": (width,)}
        shapes |= {f"{i}.up": (hidden, width), f"{i}.down": (width, hidden)}
        residual += [Use(f"{i}.{t}", 1) for t in ("q", "k", "v", "up")]
        residual += [Use(f"{i}.{t}", 0) for t in ("o", "down", "norm")]
        uses = (
            Use(f"{i}.q", 0, head),
            Use(f"{i}.k", 0, head, grouped=True),
            Use(f"{i}.v", 0, head, grouped=True),
            Use(f"{i}.v.bias", 0, head, grouped=True),
            Use(f"{i}.o", 1, head),
        )
        spaces.append(Space(f"{i}.heads", "heads", heads, uses, group))
        for j in range(kv):
            inside = [Use(f"{i}.v", 0, start=j * head), Use(f"{i}.v.bias", 0, start=j * head)]
            inside += [Use(f"{i}.o", 1, start=(j * group + a) * head) for a in range(group)]
            spaces.append(Space(f"{i}.vo.{j}", "vo", head, tuple(inside), parent=f"{i}.heads", slot=j))
        spaces.append(Space(f"{i}.mlp", "mlp", hidden, (Use(f"{i}.up", 0), Use(f"{i}.down", 1))))
    return Net([Space("residual", "residual", width, tuple(residual)), *spaces], shapes)


def encoder(heads: int = 3, head: int = 4, width: int = 9, *, fused: bool = False) -> Net:
    """BERT's attention: heads with free query-key and value-output coordinates. `fused`: one tensor for all three."""
    n = heads * head
    shapes: dict[str, tuple[int, ...]] = {"embed": (20, width), "transform": (width, width), "o": (width, n)}
    if fused:
        shapes |= {"qkv": (3 * n, width), "qkv.bias": (3 * n,)}
    else:
        shapes |= dict.fromkeys("qkv", (n, width)) | {f"{name}.bias": (n,) for name in "qkv"}

    def at(part: str, offset: int, block: int) -> list[Use]:
        if fused:
            start = "qkv".index(part) * n + offset
            return [Use("qkv", 0, block, start), Use("qkv.bias", 0, block, start)]
        return [Use(part, 0, block, offset), Use(f"{part}.bias", 0, block, offset)]

    uses = [use for part in "qkv" for use in at(part, 0, head)] + [Use("o", 1, head)]
    spaces = [Space("heads", "heads", heads, tuple(uses))]
    for j in range(heads):
        qk = at("q", j * head, 1) + at("k", j * head, 1)
        vo = [*at("v", j * head, 1), Use("o", 1, start=j * head)]
        spaces.append(Space(f"qk.{j}", "qk", head, tuple(qk), parent="heads", slot=j))
        spaces.append(Space(f"vo.{j}", "vo", head, tuple(vo), parent="heads", slot=j))
    into = ["qkv"] if fused else list("qkv")
    residual = [Use(name, 1) for name in ("embed", *into)] + [Use("o", 0), Use("transform", 0), Use("transform", 1)]
    return Net([Space("residual", "residual", width, tuple(residual)), *spaces], shapes)


def experts(count: int = 4, hidden: int = 6, width: int = 7) -> Net:
    """A mixture of experts: the router, the experts' names and the hidden units inside each."""
    shapes: dict[str, tuple[int, ...]] = {"embed": (20, width), "gate": (count, width)}
    for e in range(count):
        shapes |= {f"{e}.up": (hidden, width), f"{e}.down": (width, hidden), f"{e}.out": (width,)}
    renames = tuple(tuple(f"{e}.{part}" for e in range(count)) for part in ("up", "down", "out"))
    residual = [Use("embed", 1), Use("gate", 1)]
    residual += [Use(f"{e}.{p}", axis) for e in range(count) for p, axis in (("up", 1), ("down", 0), ("out", 0))]
    return Net(
        [
            Space("residual", "residual", width, tuple(residual)),
            Space("experts", "experts", count, (Use("gate", 0),), renames=renames),
            *(
                Space(f"mlp.{e}", "mlp", hidden, (Use(f"{e}.up", 0), Use(f"{e}.down", 1)), parent="experts", slot=e)
                for e in range(count)
            ),
        ],
        shapes,
    )


NETS: dict[str, Callable[[], Net]] = {
    "mlp": lambda: mlp([6, 9, 8, 7, 4]),
    "conv": conv_net,
    "decoder": decoder,
    "decoder with groups of five": lambda: decoder(1, group=5, head=3),
    "encoder": encoder,
    "fused encoder": lambda: encoder(fused=True),
    "experts": experts,
}

"""A small Vision Transformer on 8x8 digits, as plain functions of its weights: the encoder of the tasks that interfere
more (`make reproduce`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

PATCH, SIDE, HEADS, GROWTH = 2, 8, 4, 4  # GROWTH: the width between the two layers of an MLP, in widths
FIRST = "encoder.patches.weight"  # by which an encoder of this kind is known
DEVIATION = 0.02  # of the initial weights, ViT's own


def initial(width: int, layers: int) -> dict[str, Tensor]:
    """Initial weights, drawn from torch's generator: truncated normal, biases 0."""

    def drawn(*shape: int) -> Tensor:
        return torch.nn.init.trunc_normal_(torch.empty(shape), std=DEVIATION)

    def layer(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        return {f"{name}.weight": drawn(rows, columns), f"{name}.bias": torch.zeros(rows)}

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}

    found = layer("encoder.patches", width, PATCH * PATCH)
    found["encoder.class"] = drawn(width)
    found["encoder.positions"] = drawn(1 + (SIDE // PATCH) ** 2, width)
    for index in range(layers):
        block = f"encoder.layers.{index}"
        found |= norm(f"{block}.norm1") | layer(f"{block}.qkv", 3 * width, width) | layer(f"{block}.out", width, width)
        found |= norm(f"{block}.norm2") | layer(f"{block}.up", GROWTH * width, width)
        found |= layer(f"{block}.down", width, GROWTH * width)
    return found | norm("encoder.norm")


def features(encoder: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
    """What images (n, 64) have at the class token behind the last norm, (n, width)."""

    def through(name: str, x: Tensor) -> Tensor:
        return linear(x, encoder[f"{name}.weight"], encoder[f"{name}.bias"])

    def normed(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], encoder[f"{name}.weight"], encoder[f"{name}.bias"])

    count, across = len(pixels), SIDE // PATCH
    patches = pixels.reshape(count, across, PATCH, across, PATCH).transpose(2, 3).reshape(count, -1, PATCH * PATCH)
    tokens = torch.cat([encoder["encoder.class"].expand(count, 1, -1), through("encoder.patches", patches)], 1)
    x = tokens + encoder["encoder.positions"]
    index = 0
    while (block := f"encoder.layers.{index}") + ".out.weight" in encoder:
        q, k, v = (
            through(f"{block}.qkv", normed(f"{block}.norm1", x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        )
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + through(f"{block}.out", attended)
        x = x + through(f"{block}.down", gelu(through(f"{block}.up", normed(f"{block}.norm2", x))))
        index += 1
    return normed("encoder.norm", x[:, 0])

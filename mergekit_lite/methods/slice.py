"""Smaller models within a larger one: one cut out, several mixed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.permute import FAMILY
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import REQUIRED, Block, Param, Params


def _check(params: Params, inputs: int) -> str | None:
    if all(params[name] is None for name in ("layers", "width", "heads", "d_ff", "channels")):
        return "`slice` needs one of `layers`, `width`, `heads`, `d_ff` and `channels`: what is kept."
    layers = params["layers"]
    if isinstance(layers, tuple) and any(a >= b for a, b in itertools.pairwise(layers)):
        return "`layers` are numbers of layers to keep, each once and in their order; `stack` repeats and moves layers."
    return None


@method(
    Param("layers", "integers", None, "numbers of the layers that are kept, counted from 0", low=0),
    Param("width", "integer", None, "coordinates of the residual stream to keep; all if left out", low=1),
    Param("heads", "integer", None, "heads that every layer keeps, whole groups of them; all if left out", low=1),
    Param(
        "d_ff", "integer", None, "hidden units that every feed-forward part keeps; all if left out", 1, by_space=True
    ),
    Param("channels", "integer", None, "channels that convolutions keep; all if left out", 1, by_space=True),
    Param("order", "choice", "leading", "which units are kept", choices=("leading", "importance")),
    FAMILY,
    name="slice",
    reach="alignment",
    inputs=(1, 1),
    check=_check,
    paper="AutoDistil, NeurIPS 2022, arXiv 2201.12507",
)
def slice_(xs: Sequence[Tensor], **settings: object) -> Tensor:
    """Cut a smaller model out of a larger one: fewer layers, less width, fewer heads, hidden units or channels.

    out = x[I_1, I_2, ...] for every tensor, with the units I_k kept along its axis k: of the residual stream, of heads
    (keys and values by whole groups), of the hidden units of feed-forward parts, of the channels of convolutions with
    what a batch norm holds of them. What belongs together is data of the family, as for `permute`; config.json
    follows. What is not named stays whole.

    - Where the spaces of a kind differ in size, each has its own number, by the names that `merge inspect --spaces`
      shows: `channels: {stem: 32, "stages.0": 128}`. What config.json works out from these (the narrow part of a
      block of three convolutions) follows.
    - `order: leading` keeps the first units, as networks do that were trained to be sliced (supernets). `importance`
      keeps those with the largest L1 norm over everything that the model holds of them (ties: the lower number); they
      stay in their order. Groups of heads count as wholes.
    - The size of a head stays what it is where config.json can state it (`head_dim`, `d_kv`). Where it follows from
      width and number of heads (BERT, ViT, GPT-2) it is cut too, within each head; it can not grow.
    - The norms of a model are sums over its width, so a narrower model that was not trained for it is of little use
      before some training.

    Takes one model (or a delta) of a known family. Numbers are copied, not computed; full sizes give the model itself
    back bit for bit. The permutation that puts the important units first is saved beside the output.

    Sources: Xu et al., AutoDistil, NeurIPS 2022, arXiv 2201.12507; Li et al., BossNAS, ICCV 2021, arXiv 2103.12424.
    """
    raise TypeError("`slice` looks at whole models; the run carries it out")


def _check_sizes(params: Params, inputs: int) -> str | None:
    if params["normalize"] and math.fsum(params["weight"]) == 0:
        return "the weights add up to 0, so they cannot be normalised: change them, or set `normalize: false`"
    return None


@method(
    Param("weight", "number", 1.0, "share of this input in the sum: its beta", per_input=True),
    Param(
        "width", "integer", None, "coordinates of the residual stream that count; all if left out", 1, per_input=True
    ),
    Param("heads", "integer", None, "heads that count, whole groups of them; all if left out", 1, per_input=True),
    Param("d_ff", "integer", None, "hidden units that count; all if left out", 1, per_input=True, by_space=True),
    Param("channels", "integer", None, "channels that count; all if left out", 1, per_input=True, by_space=True),
    Param("normalize", "flag", True, "divide the weights by their sum"),
    FAMILY,
    reach="alignment",
    inputs=(1, None),
    check=_check_sizes,
    paper="TangleNAS, AutoML 2024, arXiv 2312.10440",
)
def mix_widths(xs: Sequence[Tensor], **settings: object) -> Tensor:
    """Mix slices of several sizes into one tensor of full size: an entangled mixture.

    out = sum_i beta_i pad(x_i[:o_i, :n_i]), with the leading slice that `width`, `heads`, `d_ff` and `channels` of
    input i leave, zeros around it, and beta_i = weight_i, or weight_i / sum_j weight_j where `normalize` is true. The
    inputs may be one model several times, as in a supernet whose smaller networks are parts of the larger ones. Which
    axes a size means is data of the family, as for `slice`.

    Takes one or more models (or deltas) of one known family and one shape, and gives that shape and config.json. An
    input that alone counts with all of its units is copied bit for bit.

    Source: Sukthanker et al., Weight-Entanglement Meets Gradient-Based Neural Architecture Search, AutoML 2024, arXiv
    2312.10440.
    """
    raise TypeError("`mix_widths` looks at whole models; the plan carries it out")


@method(
    Param("kept", "words", REQUIRED, "what is left along each axis"),
    Param("shape", "words", REQUIRED, "that of the tensor"),
    positioned=True,
    inputs=(1, 1),
    public=False,
)
def padded(
    xs: Sequence[Tensor],
    kept: Sequence[tuple[int, Sequence[tuple[int, int]]]],
    shape: Sequence[int],
    block: Block,
) -> Tensor:
    """Put zeros in the place of all entries that a slice leaves out.

    `kept` are spans [start, stop) by axis, of a tensor of `shape`; an axis that is not there is kept whole.
    """
    (x,) = xs
    place = torch.arange(block.start, block.start + x.numel(), device=x.device)
    inside = torch.ones(x.numel(), dtype=torch.bool, device=x.device)
    for axis, spans in kept:
        there = torch.zeros(shape[axis], dtype=torch.bool, device=x.device)
        for start, stop in spans:
            there[start:stop] = True
        inside &= there[place // math.prod(shape[axis + 1 :]) % shape[axis]]
    return torch.where(inside, x, x.new_zeros(()))

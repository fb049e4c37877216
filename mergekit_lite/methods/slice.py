"""A smaller model cut out of a larger one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from mergekit_lite.lazy import Tensor
from mergekit_lite.methods.permute import FAMILY
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Param, Params


def _check(params: Params, inputs: int) -> str | None:
    if all(params[name] is None for name in ("layers", "width", "heads", "d_ff")):
        return "`slice` needs one of `layers`, `width`, `heads` and `d_ff`: what is kept."
    layers = params["layers"]
    if isinstance(layers, tuple) and any(a >= b for a, b in itertools.pairwise(layers)):
        return "`layers` are numbers of layers to keep, each once and in their order; `stack` repeats and moves layers."
    return None


@method(
    Param("layers", "integers", None, "numbers of the layers that are kept, counted from 0", low=0),
    Param("width", "integer", None, "coordinates of the residual stream to keep; all if left out", low=1),
    Param("heads", "integer", None, "heads that every layer keeps, whole groups of them; all if left out", low=1),
    Param("d_ff", "integer", None, "hidden units that every feed-forward part keeps; all if left out", low=1),
    Param("order", "choice", "leading", "which units are kept", choices=("leading", "importance")),
    FAMILY,
    name="slice",
    reach="alignment",
    inputs=(1, 1),
    check=_check,
    paper="AutoDistil, NeurIPS 2022, arXiv 2201.12507",
)
def slice_(xs: Sequence[Tensor], **settings: object) -> Tensor:
    """Cut a smaller model out of a larger one: fewer layers, a narrower residual stream, fewer heads or hidden units.

    out = x[I_1, I_2, ...] for every tensor, with the units I_k kept along its axis k: of the residual stream, of heads
    (keys and values by whole groups), of the hidden units of feed-forward parts. What belongs together is data of the
    family, as for `permute`; config.json follows. What is not named stays whole.

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

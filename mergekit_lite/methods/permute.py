"""Units put in another order: matched with those of another network, or so that neighbours are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import Param, Params

KINDS = ("mlp", "heads", "qk", "vo", "residual", "experts", "channels", "pool", "latent", "embeddings")
DEFAULT_KINDS = ("mlp", "heads", "experts", "channels")

SPACES = Param("spaces", "words", DEFAULT_KINDS, "which kinds of units may change places", choices=KINDS)
FAMILY = Param("family", "path", None, "a family file, for a model that the program does not know")
SEED = Param("seed", "integer", 0, "seed of the order in which spaces are visited", low=0)
SWEEPS = Param("max_sweeps", "integer", 100, "most rounds through the spaces that depend on one another", low=1)


def _check(params: Params, inputs: int) -> str | None:
    if (params["like"] is None) == (params["from"] is None):
        return "`permute` needs one of `like` (the model to match) and `from` (permutations that are known)."
    activations = [name for name in ("activations", "like_activations") if params[name] is not None]
    if params["from"] is not None and activations:
        return f"known permutations (`from`) need no `{activations[0]}`."
    if len(activations) == 1 or bool(activations) != (params["cost"] == "activation"):
        return "`cost: activation` goes with both `activations` and `like_activations`, and they with it."
    return None


@method(
    Param("like", "reference", None, "the model that the input is to resemble, unit by unit"),
    SPACES,
    Param("cost", "choice", "dot", "what makes units alike", choices=("dot", "cosine", "activation")),
    SWEEPS,
    SEED,
    Param("from", "path", None, "a permute step, or a file of permutations, to be used instead of matching"),
    Param("invert", "flag", False, "put the units back: the permutations' inverse"),
    Param("activations", "reference", None, "activations of the input's units, a matrix (samples, units) by space"),
    Param("like_activations", "reference", None, "those of the model named by `like`, for the same samples"),
    FAMILY,
    reach="alignment",
    inputs=(1, 1),
    check=_check,
    paper="Git Re-Basin, ICLR 2023, arXiv 2209.04836",
)
def permute(xs: Sequence[Tensor], **settings: object) -> Tensor:
    """Put a network's units in the order of another's, so that the two can be merged. Its function stays the same.

    Hidden units, attention heads and experts may change places without changing what a network computes. Of two
    networks that were trained apart, unit 7 of one has nothing to do with unit 7 of the other.

    out = pi(B), with the permutations pi of the spaces named by `spaces` that maximise sum_l <A_l, pi(B)_l> over the
    tensors l of the model A named by `like` and the input B: exact assignments space by space, in sweeps until nothing
    changes. Spaces that share no tensor are solved at the same time; without `residual` that is all of them, in one
    pass.

    - `mlp` hidden units of a feed-forward part; `heads` attention heads, under grouped-query attention within their
      group and as whole groups; `experts` with the units inside each; `channels` of convolutions; `pool` a pooler's
      outputs; `latent` and `embeddings` the inner widths of factored projections. `qk` and `vo` are the coordinates
      inside a head, where the architecture lets them move. `residual` is the basis of the residual stream: of use only
      for networks that do not descend from one another.
    - `cost`: `dot` as above; `cosine` gives every tensor the same weight; `activation` matches units whose activations
      on the same samples correlate.
    - `from` takes the permutations of another `permute` step, or of a file that a run has left under `permutations/`;
      a base is permuted along with its model that way, so that deltas stay deltas. `invert` puts units back.

    Takes one model (or a delta) of a known family and gives the same shapes. The permutations found are saved beside
    the output. Which axes belong together is data of the family: a model of an unknown one is refused.

    Sources: Ainsworth et al., Git Re-Basin, ICLR 2023, arXiv 2209.04836; for Transformers Imfeld et al., ICLR 2024,
    arXiv 2310.05719, and Verma and Elbayad, arXiv 2403.00986.
    """
    raise TypeError("`permute` looks at whole models; the run carries it out")


@method(
    Param("order", "choice", "l1", "how far apart two units are", choices=("l1", "l2")),
    Param("spaces", "words", ("mlp",), "which kinds of units are put in order", choices=KINDS),
    Param("starts", "integer", 4, "first units that are tried", low=1),
    SEED,
    FAMILY,
    reach="alignment",
    inputs=(1, 1),
    paper="Neural Metamorphosis, ECCV 2024, arXiv 2410.11878",
)
def reorder(xs: Sequence[Tensor], **settings: object) -> Tensor:
    """Put units in an order in which neighbours are alike. The network's function stays the same.

    out = p(x): in each space the units x_i, all their weights taken together, are put on a short path, in the order p
    that makes sum_i ||x_p(i) - x_p(i+1)|| small, with the norm of `order`. Exact for up to nine units; beyond, nearest
    neighbours from several starts, improved until no exchange helps. Weights become a smoother signal along their axes.

    Takes one model of a known family and gives the same shapes; the permutations are saved beside the output.

    Source: Yang and Wang, Neural Metamorphosis, ECCV 2024, arXiv 2410.11878.
    """
    raise TypeError("`reorder` looks at whole models; the run carries it out")


@method(
    Param("weight", "number", 1.0, "share of this model in the mean", per_input=True),
    Param("way", "choice", "merge_many", "how the models are matched", choices=("merge_many", "star", "cycle")),
    SPACES,
    Param("cost", "choice", "dot", "what makes units alike", choices=("dot", "cosine")),
    SWEEPS,
    SEED,
    FAMILY,
    reach="alignment",
    inputs=(2, None),
    paper="Git Re-Basin, ICLR 2023, arXiv 2209.04836",
)
def merge_many(xs: Sequence[Tensor], **settings: object) -> Tensor:
    """Match the units of several networks with each other, then take their mean.

    out = sum_i w_i pi_i(x_i), with the permutations pi_i found in one of three ways:

    - `way: merge_many`: each model in turn is matched with the mean of all others, until none moves.
    - `star`: every model is matched with the first.
    - `cycle`: all pairs at once, by permutations into one common order, so that they agree around every cycle.

    `weight` counts in the mean alone. The other settings are those of `permute`. Takes two or more models of one known
    family and gives the same shapes; the permutations of every model are saved beside the output.

    Sources: Ainsworth et al., Git Re-Basin, ICLR 2023, arXiv 2209.04836 (MergeMany); Crisostomi et al., C2M3, NeurIPS
    2024, arXiv 2405.17897 (cycle).
    """
    raise TypeError("`merge_many` looks at whole models; the run carries it out")


@method(reach="row", row_axis="first", gathers=True, inputs=(1, None), public=False)
def permuted(xs: Sequence[Tensor], stat: tuple[int, Mapping[int, Sequence[int]]], **place: object) -> Tensor:
    """Take a tensor's elements along its axes in another order.

    `stat` says which of `xs` is taken and, by axis, the old index for each new one.
    """
    source, orders = stat
    tensor = xs[source]
    for axis, order in orders.items():
        tensor = tensor.index_select(axis, torch.as_tensor(order, device=tensor.device))
    return tensor

"""Fewer experts in every layer of a mixture: those that are alike become one."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lite.lazy import Tensor
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import REQUIRED, Param, Params


def _check(params: Params, inputs: int) -> str | None:
    if params["statistics"] is None and params["similarity"] == "router-logits":
        return "`similarity: router-logits` needs `statistics`; `router-weight` and `weight` need none."
    if params["statistics"] is None and params["adaptive"]:
        return "`adaptive` goes by how often experts are used, and needs `statistics`."
    if params["router"] != "compact" and params["rows"] != "dominant":
        return "`rows` is about the rows that a router keeps with `router: compact`."
    return None


@method(
    Param("into", "integer", REQUIRED, "experts that every layer keeps; with `adaptive`, on average", low=1),
    Param("adaptive", "flag", False, "let layers keep more or fewer, by how their experts are used"),
    Param("protect", "layers", None, "layers that keep all experts, counted from 0, the end not included"),
    Param(
        "similarity",
        "choice",
        "router-logits",
        "what makes experts alike",
        choices=("router-logits", "router-weight", "weight"),
    ),
    Param("statistics", "reference", None, "file of the router's statistics with this model"),
    Param("align", "flag", True, "match the hidden units of experts before their mean is taken"),
    Param("weights", "choice", "usage", "what an expert counts in the mean", choices=("usage", "uniform")),
    Param("mode", "choice", "merge", "`prune` keeps the most used experts as they are", choices=("merge", "prune")),
    Param("router", "choice", "alias", "what becomes of the router", choices=("alias", "compact", "mapped")),
    Param("rows", "choice", "dominant", "a group's row of a compact router", choices=("dominant", "mean")),
    takes="weight",
    gives="weight",
    reach="alignment",
    inputs=(1, 1),
    check=_check,
    paper="Merge, Then Compress (M-SMoE), ICLR 2024, arXiv 2310.01334",
)
def merge_experts(xs: Sequence[Tensor], **settings: object) -> Tensor:
    """Merge the experts of every layer that are alike, weighted by how often the router uses them: M-SMoE.

    Of a layer's E experts the `into` most used (ties by number) are dominant; every other one joins the dominant one
    that is most similar to it, (cos + 1) / 2 being highest (ties: the more used one). Then

    out = sum_e f_e pi_e(W_e) / sum_e f_e over the experts e of a group, with the shares f_e of the tokens, all alike
    where the group is not used. pi_e puts the hidden units of expert e in the order of the dominant expert's r: the
    exact assignment that maximises <W1_r, pi W1_e> + <W3_r, pi W3_e> + <W2_r, W2_e pi^T>.

    - `similarity`: the cosine of two experts' router logits over all tokens (`router-logits`), of their rows of the
      router (`router-weight`), or of all their weights as they are (`weight`).
    - `statistics` names a safetensors file, made of a forward pass over text, which holds for every router, under the
      router's name, `.logits_gram` (E, E), `.usage` (E) and `.tokens`. Without it all experts count as used alike.
    - `adaptive`: all layers' experts compete for `into` times the number of layers places by their share of use; the
      most used of each layer, and all of the layers under `protect`, have theirs.
    - `router: alias` leaves the router as it is, and every expert has its group's weights: the routing is exact, any
      program loads the model, which is as large as before. `compact` leaves one row for each group, that of the
      dominant expert or, with `rows: mean`, the mean by use: the model is smaller and loads everywhere, its routing is
      an approximation. `mapped` keeps all rows, stores each group once and writes under `expert_map` in config.json
      which one each row means: exact and small, for code that reads the map.
    - `mode: prune` takes the dominant expert in place of the mean: the control.

    Where a router chooses among groups of experts first (DeepSeek), `compact` merges within these groups, so that there
    are equally many in each. Shared experts stay as they are.

    Takes one whole model of a family whose experts are known, whether every expert has tensors of its own or a layer
    has one for all. Means are taken in the dtype of the arithmetic. Two experts a thread are in memory at most, never
    more than a layer's.

    Source: Li et al., Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy, ICLR 2024,
    arXiv 2310.01334.
    """
    raise TypeError("`merge_experts` looks at whole layers; the run carries it out")


@method(reach="row", row_axis="last", gathers=True, inputs=(1, None), public=False)
def mixed(xs: Sequence[Tensor], **place: object) -> Tensor:
    """Take the weighted mean of some of the inputs, or of parts of one, each with its units in an order of its own.

    What is taken of which comes from the search for groups of experts.
    """
    raise TypeError("`mixed` is carried out by the run, which reads only the members of a group")

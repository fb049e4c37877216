"""A mixture of experts made of dense models: their feed-forward parts, and the gates that choose among them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.methods.random import normal_numbers, uniform_words
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import REQUIRED, Block, Method, Param, Params

STYLES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek", "glm4_moe")  # family/mixtures.py has what they are
_LEARNED = ("hidden", "embedding")
_STD = 0.02
_LEAST = 1e-8  # a direction shorter than this stays as short as it is


def _check(params: Params, inputs: int) -> str | None:
    experts = sum(params["copies"])
    if params["per_token"] > experts:
        return f"`per_token: {params['per_token']}` is more than the {experts} experts."
    given = [name for name in ("shared_hidden", "shared_negative") if params[name] is not None]
    if params["shared"] is None and (given or params["shared_scale"] != 1):
        return f"`{(given or ['shared_scale'])[0]}` is about a shared expert, and `shared` names none."
    if params["shared_negative"] is not None and params["shared_hidden"] is None:
        return "`shared_negative` goes with `shared_hidden`."
    if params["gates"] != "random" and params["gate_std"] != _STD:
        return f"`gate_std` is about `gates: random`, here are `{params['gates']}`."
    if params["gates"] not in _LEARNED:
        given += [name for name in ("hidden", "negative") if any(params[name])]
        return f"`{given[0]}` goes with `gates: hidden` or `gates: embedding`." if given else None
    if not all(params["hidden"]):
        return f"`gates: {params['gates']}` needs `hidden` beside every input."
    return None


def _remark(params: Params, inputs: int) -> str | None:
    if params["gates"] not in _LEARNED:
        return None
    seen: dict[tuple[str, str | None], int] = {}
    for number, sources in enumerate(zip(params["hidden"], params["negative"], strict=True)):
        first = seen.setdefault(sources, number)
        if first != number or params["copies"][number] > 1:
            which = f"input {number}" if first == number else f"inputs {first} and {number}"
            return f"experts of {which} (counted from 0) have the same gate, so no token can tell them apart"
    return None


@method(
    Param("style", "choice", REQUIRED, "what the mixture is laid out like", choices=STYLES),
    Param("per_token", "integer", 2, "experts that a token goes to", low=1),
    Param("gates", "choice", "random", "where gates come from", choices=("random", "uniform", *_LEARNED)),
    Param("gate_std", "number", _STD, "standard deviation of random gates", low=0),
    Param("hidden", "reference", None, "hidden states of what the expert is for (`merge stats`)", per_input=True),
    Param("negative", "reference", None, "hidden states of what it is not for", per_input=True),
    Param("copies", "integer", 1, "experts made of this input", low=1, per_input=True),
    Param("noise", "number", 0.0, "standard deviation of what is added to the weights", low=0, per_input=True),
    Param("scale", "number", 1.0, "factor of what the expert gives", per_input=True),
    Param("shared", "reference", None, "model of the shared expert, which every token goes to"),
    Param("shared_scale", "number", 1.0, "factor of what the shared expert gives"),
    Param("shared_hidden", "reference", None, "hidden states for the gate of the shared expert"),
    Param("shared_negative", "reference", None, "the same of what it is not for"),
    Param("dense", "integer", 0, "first layers that get no experts", low=0),
    takes="weight",
    gives="weight",
    reach="structure",
    base="required",
    check=_check,
    remark=_remark,
    paper="Sparse Upcycling, ICLR 2023, arXiv 2212.05055",
)
def moe(xs: Sequence[Tensor], **settings: object) -> Tensor:
    """Build a mixture of experts from dense models, or from copies of one: what mergekit-moe does, and upcycling.

    The feed-forward part of each input becomes an expert in every layer, in the order of `of`, `copies` times each;
    attention, norms, embeddings and head are those of `base`. Names, shapes and config.json become those of `style`:

    - `mixtral`: from Llama or Mistral. All layers have experts, none is shared.
    - `qwen2_moe`: from Qwen2, Llama or Mistral, with a shared expert that has a gate of its own.
    - `qwen3_moe`: from Qwen3.
    - `deepseek`: from Llama or Mistral, laid out like the first DeepSeek-MoE, whose code transformers takes from the
      Hub; from a dense DeepSeek-V2 or V3 a mixture of the same type, with a shared expert.
    - `glm4_moe`: from Llama, Mistral, Qwen2 or Qwen3: DeepSeek-V3's experts, with a shared one, under attention that
      stock transformers loads.

    Of an input's weights W an expert has

    out = c (W + s n), with `noise` s, n standard normal, and `scale` c, which is 1 but for the matrix out of the hidden
    units.

    Where neither is set weights are copied as they are. The weights of the chosen experts
    add up to 1 (but in DeepSeek-V2, whose code leaves them as they are), so experts that are all equal give the dense
    model. A shared expert comes on top: then `scale` and `shared_scale` of 0.5 keep the sum.

    - `gates: random` draws gates from a normal distribution with `gate_std`, `uniform` from +-1/sqrt(width).
    - `gates: hidden` takes for expert e in layer l the direction g = h / |h| of h = h+ - h-, where h+ and h- are the
      means of the hidden states that go into layer l, of the prompts for this expert and of the `negative` ones. They
      come from a file that `merge stats --collect hidden` has made with `base`.
    - `gates: embedding` takes what goes into the first layer, the embeddings, for all layers, and h = h+ / |h+| -
      h- / |h-|: mergekit's `cheap_embed`.

    The gate of a shared expert (`qwen2_moe`) is made of `shared_hidden` in the same way; without it it is zero, which
    lets half of the shared expert through everywhere: `shared_scale: 2` undoes this.

    Weights are read and written block by block. Experts may have other numbers of hidden units than `base`, all the
    same one; that of a shared expert is free in `qwen2_moe`, and elsewhere a multiple of it.

    Source: Komatsuzaki et al., Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints, ICLR 2023, arXiv
    2212.05055; Goddard et al., Arcee's MergeKit, EMNLP 2024 (industry track), arXiv 2403.13257.
    """
    raise TypeError("`moe` works on whole models; the plan lays the mixture out")


@method(
    Param("noise", "number", 0.0, "standard deviation of what is added", low=0),
    Param("scale", "number", 1.0, "factor of the sum"),
    inputs=(1, 1),
    positioned=True,
    public=False,
)
def upcycled(xs: Sequence[Tensor], noise: float, scale: float, *, block: Block) -> Tensor:
    """Add noise to an expert's weights, and scale them: scale (x + noise n), n standard normal."""
    x = xs[0]
    if noise == 0:
        return x * scale
    made = torch.empty_like(x)
    flat, out = x.reshape(-1), made.view(-1)
    part = 1 << 14  # the numbers are drawn in double precision, and should not take much memory
    for start in range(0, len(flat), part):
        here = flat[start : start + part]
        drawn = torch.from_numpy(normal_numbers(block.key, block.start + start, len(here)))
        out[start : start + part] = (here + noise * drawn.to(here)) * scale
    return made


def _random_gates(xs: Sequence[Tensor], rows: int, width: int, std: float, law: str, *, block: Block) -> Tensor:
    """Rows of random numbers: normal with the standard deviation `std`, or uniform within 1/sqrt(width)."""
    if law == "normal":
        drawn = std * normal_numbers(block.key, 0, rows * width)
    else:
        words = uniform_words(block.key, 0, rows * width)
        drawn = ((words.astype(np.float64) + 0.5) / 2**31 - 1) / math.sqrt(width)
    return torch.from_numpy(drawn).view(rows, width).float()


def _state_gates(xs: Sequence[Tensor], layer: int, negative: tuple[int, ...], apart: bool) -> Tensor:
    """The directions of hidden states, a row for each expert. `xs` are means (layers, width), those of the experts
    first; `negative` is for every expert the place of what is subtracted, or -1. With `apart` both have length 1
    first."""
    rows = []
    for number, place in enumerate(negative):
        row = xs[number][layer].double()
        if place >= 0:
            other = xs[place][layer].double()
            row = _direction(row) - _direction(other) if apart else row - other
        rows.append(_direction(row))
    return torch.stack(rows).to(xs[0].dtype)


def _direction(row: Tensor) -> Tensor:
    # Summed exactly, so that machines do not differ.
    return row / max(math.sqrt(math.fsum((row * row).tolist())), _LEAST)


def _zeros(xs: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Zeros of this shape."""
    return torch.zeros(shape)


def _made(fn: Callable[..., Tensor], shape: tuple[int, ...], *params: Param, positioned: bool = False) -> Method:
    return method(
        *params,
        name=fn.__name__.removeprefix("_"),
        inputs=(0, None),
        reach="matrix",
        shape=lambda shapes: shape,
        positioned=positioned,
        public=False,
    )(fn)


@functools.cache
def random_gates(rows: int, width: int) -> Method:
    """Random gates of this shape as a method of the plan; it has no inputs."""
    return _made(
        _random_gates,
        (rows, width),
        Param("rows", "integer", rows, "experts"),
        Param("width", "integer", width, "of the residual stream"),
        Param("std", "number", REQUIRED, "standard deviation"),
        Param("law", "choice", "normal", "how they are distributed", choices=("normal", "uniform")),
        positioned=True,
    )


@functools.cache
def state_gates(rows: int, width: int) -> Method:
    """Gates from hidden states as a method of the plan."""
    return _made(
        _state_gates,
        (rows, width),
        Param("layer", "integer", REQUIRED, "row of the means"),
        Param("negative", "words", REQUIRED, "what is subtracted from which"),
        Param("apart", "flag", False, "whether directions are subtracted"),
    )


@functools.cache
def zeros(*shape: int) -> Method:
    """Zeros as a method of the plan; it has no inputs."""
    return _made(_zeros, shape, Param("shape", "words", shape, "of the tensor"))

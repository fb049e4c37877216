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

STYLES = ("auto", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek", "glm4_moe")  # family/mixtures.py: what they are
_LEARNED = ("hidden", "embedding")
_SHARED_GATES = ("shared_hidden", "shared_negative", "shared_prompts", "shared_against")
_SHARED = {"shared_scale": 1.0, "shared_noise": 0.0, "shared_gate": "zeros"}
_STD = 0.02
Counts = tuple[tuple[int, int], ...]  # tokens by their number, and how often they are there
_LEAST = 1e-8  # a direction shorter than this stays as short as it is


def _check(params: Params, inputs: int) -> str | None:
    experts = sum(params["copies"])
    if params["per_token"] > experts:
        return f"`per_token: {params['per_token']}` is more than the {experts} experts."
    return _check_shared(params) or _check_gates(params)


def _check_shared(params: Params) -> str | None:
    given = [name for name in _SHARED_GATES if params[name] is not None]
    given += [name for name, default in _SHARED.items() if params[name] != default]
    if params["shared"] is None and given:
        return f"`{given[0]}` is about a shared expert, and `shared` names none."
    for name, other in (("shared_negative", "shared_hidden"), ("shared_against", "shared_prompts")):
        if params[name] is not None and params[other] is None:
            return f"`{name}` goes with `{other}`."
    if params["shared_hidden"] is not None and params["shared_prompts"] is not None:
        return "the gate of the shared expert comes of `shared_hidden` or of `shared_prompts`."
    if params["shared_gate"] == "drawn" and params["gates"] in _LEARNED:
        return f"`shared_gate: drawn` goes with `gates: random` or `gates: uniform`, here are `{params['gates']}`."
    return None


def _check_gates(params: Params) -> str | None:
    gates = params["gates"]
    if gates != "random" and params["gate_std"] != _STD:
        return f"`gate_std` is about `gates: random`, here are `{gates}`."
    given = [name for name in ("hidden", "negative", "prompts", "against") if any(params[name])]
    given += [name for name in _SHARED_GATES if params[name] is not None]
    if gates not in _LEARNED:
        return f"`{given[0]}` goes with `gates: hidden` or `gates: embedding`." if given else None
    texts = [name for name in given if name.removeprefix("shared_") in ("prompts", "against")]
    if gates == "hidden" and texts:
        return f"`{texts[0]}` goes with `gates: embedding`; what a model makes of prompts is in a file, `hidden`."
    if texts and len(texts) < len(given):
        return (
            f"gates come of texts or of files, here are `{texts[0]}` and `{next(n for n in given if n not in texts)}`."
        )
    if not all(params["prompts" if texts else "hidden"]):
        wanted = "`prompts`" if texts else "`hidden`" if gates == "hidden" else "`prompts`, or `hidden`,"
        return f"`gates: {gates}` needs {wanted} beside every input."
    return None


def _remark(params: Params, inputs: int) -> str | None:
    if params["gates"] not in _LEARNED:
        return None
    seen: dict[object, int] = {}
    parts = (params[name] for name in ("hidden", "negative", "prompts", "against"))
    for number, sources in enumerate(zip(*parts, strict=True)):
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
    Param("prompts", "texts", None, "texts of what the expert is for", per_input=True),
    Param("against", "texts", None, "texts of what it is not for", per_input=True),
    Param("copies", "integer", 1, "experts made of this input", low=1, per_input=True),
    Param("noise", "number", 0.0, "standard deviation of what is added to the weights", low=0, per_input=True),
    Param("scale", "number", 1.0, "factor of what the expert gives", per_input=True),
    Param("shared", "reference", None, "model of the shared expert, which every token goes to"),
    Param("shared_scale", "number", 1.0, "factor of what the shared expert gives"),
    Param("shared_noise", "number", 0.0, "standard deviation of what is added to its weights", low=0),
    Param("shared_gate", "choice", "zeros", "its gate where no texts or states are", choices=("zeros", "drawn")),
    Param("shared_hidden", "reference", None, "hidden states for the gate of the shared expert"),
    Param("shared_negative", "reference", None, "the same of what it is not for"),
    Param("shared_prompts", "texts", None, "texts for the gate of the shared expert"),
    Param("shared_against", "texts", None, "texts of what it is not for"),
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
    - `auto`: what the models can be made into. Of Llama and Mistral `mixtral`, with a shared expert `deepseek`, or
      `qwen2_moe` where its gate comes from texts or states; of Qwen2 `qwen2_moe`, of Qwen3 `qwen3_moe`, of DeepSeek-V2
      and V3 `deepseek`.

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
      h- / |h-|. With `prompts` and `against`, texts in the recipe, h+ and h- are the sums of the base's embeddings of
      all their tokens, each text with the token for the beginning of a text before it: mergekit's `cheap_embed`, which
      needs no file. Otherwise they are the means in the files `hidden` and `negative`.

    The gate of a shared expert (`qwen2_moe`) is made of `shared_hidden` or `shared_prompts` in the same way, or drawn
    like the others with `shared_gate: drawn`. Otherwise it is zero, which lets half of the shared expert through
    everywhere: `shared_scale: 2` undoes this.

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


def _prompt_gates(xs: Sequence[Tensor], hidden: tuple[Counts, ...], negative: tuple[Counts, ...]) -> Tensor:
    """The directions of prompts, a row for each expert. `xs` is one tensor (tokens, width), their embeddings; `hidden`
    and `negative` say for every expert how often its texts have each of these tokens, none of them where all are 0."""
    embeddings, rows = xs[0].double(), []
    for counts, others in zip(hidden, negative, strict=True):
        row = _direction(_summed(embeddings, counts))
        rows.append(_direction(row - _direction(_summed(embeddings, others))))
    return torch.stack(rows).to(xs[0].dtype)


def _summed(embeddings: Tensor, counts: Counts) -> Tensor:
    row = embeddings.new_zeros(embeddings.shape[1])
    for number, count in counts:  # one by one, so that machines do not differ
        row += count * embeddings[number]
    return row


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
def prompt_gates(rows: int, width: int) -> Method:
    """Gates from the embeddings of prompts as a method of the plan."""
    return _made(
        _prompt_gates,
        (rows, width),
        Param("hidden", "words", REQUIRED, "tokens for each expert"),
        Param("negative", "words", REQUIRED, "tokens against each expert"),
    )


@functools.cache
def zeros(*shape: int) -> Method:
    """Zeros as a method of the plan; it has no inputs."""
    return _made(_zeros, shape, Param("shape", "words", shape, "of the tensor"))

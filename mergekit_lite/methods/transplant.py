"""A model with the tokenizer of another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergekit_lite.lazy import Tensor
from mergekit_lite.methods.registry import method
from mergekit_lite.methods.spec import REQUIRED, Param


@method(
    Param("vocabulary", "reference", REQUIRED, "the model whose tokenizer the result has"),
    Param("k", "integer", 64, "most shared tokens that a token which is not shared is made of", low=1),
    takes="weight",
    gives="weight",
    reach="vocabulary",
    inputs=(1, 1),
    paper="Training-Free Tokenizer Transplantation, 2025, arXiv 2506.06607",
)
def transplant(xs: Sequence[Tensor], vocabulary: object, k: int) -> Tensor:
    """Give a model the tokenizer of another: rows of new tokens are sums of rows of tokens that both know.

    Of a token t that both tokenizers have, the result has the model's own row, out_t = m_t. The row d_t of any other
    token in the model of `vocabulary` is approximated by at most `k` rows of shared tokens there, d_t ~ sum_i c_i d_i,
    found by orthogonal matching pursuit, and the model's rows are added up in the same way:

    out = sum_i c_i m_i.

    Embedding and head are made each from its own; a model whose head is its embedding gives it for both. Everything
    else is the model's, and its tied embeddings stay tied.

    - Tokens are shared where they stand for the same text, however their tokenizers write it (`Ġthe`, `▁the`, `the` of
      WordPiece), and special tokens where they have the same text or the same role (`bos_token`, `eos_token`, ...).
    - Pursuit: in each step the shared row with the largest inner product |<r, d_i>| with what is left, then all
      coefficients anew by least squares, in float64. It ends early where nothing is left. Rows are not scaled.
    - The two models may have different widths and families. A head's bias takes the sums of the head's rows.
    - The result has as many rows as the model of `vocabulary`, its tokenizer, and config.json with its size and its ids
      of special tokens.

    All shared rows of that model are held in the dtype of the arithmetic, once for all threads; the plan counts them.
    A step that measures whole tensors finds the sums again in every pass: save the result first.

    Source: Goddard and Fernandes Neto, Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit, 2025,
    arXiv 2506.06607.
    """
    raise TypeError("`transplant` reads tokenizers; the plan carries it out")


@method(reach="row", row_axis="first", gathers=True, combines=True, inputs=(2, 2), public=False)
def transplanted(xs: Sequence[Tensor], graft: Any, k: int) -> Tensor:
    """Bring a tensor with a row for every token to another vocabulary by sums of rows.

    `xs` are the tensor itself, and that of the model with the other vocabulary in which sums are found; `graft` says
    for each row of the result whether it is a row of the first or such a sum, of at most `k` rows.
    """
    raise TypeError("`transplanted` is carried out by the run, which reads no more than the rows that are needed")

"""Unions of Unigram tokenizers, as T5 and ALBERT have them: real text through the base's, the other's and the union."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertTokenizer,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import vocabulary_models as maker

from mergekit_lite import RecipeError, load_recipe, plan, run
from mergekit_lite.vocabulary.unigram import JOINED, UNKNOWN, scored

TEXTS = [*maker.prose()[:40], *maker.code()[:40], "An Æsir's naïve 東京 \U0001f600 <extra_id_3> [MASK] </s> end"]
SMALL: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}


def t5(folder: Path, text: Sequence[str], size: int) -> None:
    special: list[Any] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = T5Tokenizer(vocab=[*special, *pieces(text, size)], extra_ids=10)
    config = T5Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def albert(folder: Path, text: Sequence[str], size: int) -> None:
    special = [(token, 0.0) for token in ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")]
    tokenizer = AlbertTokenizer(vocab=[*special, *pieces(text, size)])
    AlbertForMaskedLM(AlbertConfig(vocab_size=len(tokenizer), embedding_size=4, **SMALL)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def plain(folder: Path, text: Sequence[str], size: int) -> None:
    maker.write(folder, maker.unigram(text, size), size)


def pieces(text: Sequence[str], size: int) -> list[tuple[str, float]]:
    vocab = json.loads(maker.unigram(text, size).to_str())["model"]["vocab"]
    return [(token, score) for token, score in vocab[3:]]


@pytest.fixture(scope="module", params=[plain, t5, albert], ids=lambda write: write.__name__)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, `a` and `b`, and `out`, their mean with the union of their tokenizers."""
    folder = tmp_path_factory.mktemp("unigram")
    before = torch.get_rng_state()
    request.param(folder / "a", maker.prose(), 600)
    request.param(folder / "b", maker.code(), 700)
    torch.set_rng_state(before)
    recipe = folder / "r.yaml"
    recipe.write_text(
        f"version: 1\nmodels: {{a: {folder / 'a'}, b: {folder / 'b'}}}\n"
        "steps: {m: {use: linear, of: [a, b]}}\nsave: {tokenizer: union}\n",
        encoding="utf-8",
    )
    run(plan(load_recipe(recipe), out=folder / "out"))
    return folder


def unknown(tokenizer: Any, text: str) -> bool:
    return tokenizer.get_vocab()["<unk>"] in tokenizer.encode(text)


def test_a_text_is_split_as_the_base_splits_it_and_joined_further(place: Path) -> None:
    """Every cut of the union is a cut of the base, and the text that comes back is the base's."""
    made, a = (AutoTokenizer.from_pretrained(place / name) for name in ("out", "a"))
    compared = 0
    for text in TEXTS:
        assert made.decode(made.encode(text)) == a.decode(a.encode(text)) or unknown(a, text)
        if not unknown(a, text):
            cuts = [{*itertools.accumulate(map(len, t.tokenize(text)))} for t in (made, a)]
            assert cuts[0] <= cuts[1], text
            compared += 1
    assert compared > len(TEXTS) // 2


def test_what_either_knows_the_union_knows_in_fewer_tokens(place: Path) -> None:
    made, a, b = (AutoTokenizer.from_pretrained(place / name) for name in ("out", "a", "b"))
    assert set(made.get_vocab()) == {*a.get_vocab(), *b.get_vocab()}
    assert a.get_vocab().items() <= made.get_vocab().items()
    for text in TEXTS:
        if not (unknown(a, text) and unknown(b, text)):
            assert not unknown(made, text), text
    length = {t: sum(len(t.encode(text)) for text in maker.code()[:40]) for t in (made, a)}
    assert length[made] < 0.8 * length[a]


def test_special_tokens_stay_whole_and_are_never_pieces(place: Path) -> None:
    made, a = (AutoTokenizer.from_pretrained(place / name) for name in ("out", "a"))
    for token, number in a.get_added_vocab().items():
        assert number in made.encode(f"one {token} two", add_special_tokens=False)
        assert made.get_added_vocab()[token] == number


def test_scores_are_those_of_the_best_split() -> None:
    base = [["<unk>", 0.0], ["a", -1.0], ["b", -2.0], ["ab", -2.5], ["c", -4.0]]
    ids = {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "c": 4, "<x>": 5, "abc": 6, "é": 7, "aé": 8, "aa": 9}
    found = dict(scored(base, ids, {"<x>"}))
    lowest = -4.0 - UNKNOWN
    expected = {
        "abc": -6.5 + JOINED,
        "é": lowest,
        "aé": -1.0 + lowest + JOINED,
        "aa": -2.0 + JOINED,
        "<x>": 3 * lowest - 1.0,
    }
    assert all(math.isclose(found[token], score, abs_tol=1e-9) for token, score in expected.items())
    assert list(found) == sorted(ids, key=ids.__getitem__)
    assert all(found[token] == score for token, score in base)


def test_unigram_and_merges_have_no_union(tmp_path: Path) -> None:
    maker.write(tmp_path / "a", maker.unigram(maker.prose()[:20], 300), 1)
    maker.write(tmp_path / "b", maker.sentencepiece(maker.prose()[:20], 400), 2)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"version: 1\nmodels: {{a: {tmp_path / 'a'}, b: {tmp_path / 'b'}}}\n"
        "steps: {m: {use: linear, of: [a, b]}}\nsave: {tokenizer: union}\n",
        encoding="utf-8",
    )
    with pytest.raises(RecipeError, match=r"`a` \(Unigram SentencePiece\) and `b` \(BPE SentencePiece with bytes\)"):
        plan(load_recipe(recipe), out=tmp_path / "out")

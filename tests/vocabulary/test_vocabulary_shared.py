"""Which tokens two tokenizers share, however each writes them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import vocabulary_models as maker
from tokenizers import Tokenizer

from mergekit_lite.vocabulary.shared import shared_tokens
from mergekit_lite.vocabulary.tokens import FLAGS, Tokens


@pytest.fixture(scope="module")
def known() -> dict[str, Tokens]:
    """Tokenizers by name: byte-level, SentencePiece with bytes, WordPiece."""
    other = maker.byte_level(maker.code(), 500, special=("<|start|>", "</s>", "<s>"))
    made = {
        "a": maker.byte_level(maker.prose(), 420),
        "wide": other,
        "tied": maker.sentencepiece(maker.code(), 800),
        "bert": maker.wordpiece(maker.prose(), 500),
    }
    return {name: read(name, tokenizer) for name, tokenizer in made.items()}


def read(name: str, tokenizer: Tokenizer) -> Tokens:
    data = json.loads(tokenizer.to_str())
    added = {entry["content"]: {key: entry[key] for key in ("content", *FLAGS)} for entry in data["added_tokens"]}
    roles = {} if name == "bert" else {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokens(name, tokenizer.get_vocab(), added, data, roles)


def test_tokens_are_shared_by_the_text_that_they_stand_for(known: dict[str, Tokens]) -> None:
    bytes_, pieces, words = (known[name] for name in ("a", "tied", "bert"))
    pairs = [
        (bytes_, "Ġthe", pieces, "▁the"),
        (bytes_, "e", pieces, "e"),
        (bytes_, "Ā", pieces, "<0x00>"),
        (bytes_, "Ã", pieces, "<0xC3>"),
        (bytes_, "</s>", pieces, "</s>"),
        (words, "the", bytes_, "Ġthe"),
        (words, "##e", bytes_, "e"),
        (words, ",", pieces, ","),
    ]
    for one, token, other, same in pairs:
        for first, name, second, wanted in ((one, token, other, same), (other, same, one, token)):
            assert shared_tokens(first, second)[first.ids[name]] == second.ids[wanted], (name, wanted)
    shared = shared_tokens(pieces, bytes_)
    assert pieces.ids["<0x65>"] not in shared  # never taken, since there is `e`
    assert shared_tokens(pieces, pieces) == {number: number for number in pieces.ids.values()}


def test_special_tokens_are_shared_by_text_or_by_role(known: dict[str, Tokens]) -> None:
    wide, bert, a = (known[name] for name in ("wide", "bert", "a"))
    assert shared_tokens(wide, a)[wide.ids["<s>"]] == a.ids["<s>"]
    assert wide.ids["<|start|>"] not in shared_tokens(wide, a)
    lead = replace(wide, settings={"bos_token": {"content": "<|start|>"}})
    assert shared_tokens(lead, a)[wide.ids["<|start|>"]] == a.ids["<s>"]  # both are the `bos_token`
    assert bert.ids["[MASK]"] not in shared_tokens(bert, a)

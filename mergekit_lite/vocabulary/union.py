"""One tokenizer made of several: the base's, with what the others know beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergekit_lite.errors import InputError, Mark, Problem, RecipeError
from mergekit_lite.vocabulary.tokens import Tokens
from mergekit_lite.vocabulary.unigram import scored

_UNITED = ("BPE", "WordPiece", "Unigram")
# How words are marked, which decides what the texts of tokens mean: those of one kind fit one tokenizer.
_HOW = "their tokens do not mean the same pieces of text"


def united(base: Tokens, others: Sequence[Tokens], mark: Mark | None) -> tuple[Tokens, list[Problem]]:
    """The union of `base` and `others`, and what a person may want to know of it.

    Ids of the base stay. After them come the tokens of the others' own, model by model in the order of their ids, then
    the tokens that were added to them. The base's merges come first, in their order, then those that only others have,
    in theirs: so the base's own merges go on as they did, and the others' join what these leave. In a Unigram model
    scores do the same: see `unigram.scored`. Everything else, how text is normalised and split, is the base's. Raises
    RecipeError for tokenizers of different kinds.
    """
    different = [other for other in others if other.data != base.data]
    notes: list[Problem] = []
    for other in different:
        _check(base, other, mark)
        parts = [p for p in ("normalizer", "pre_tokenizer", "decoder") if other.data.get(p) != base.data.get(p)]
        if parts:
            message = f"the {' and '.join(parts)} of `{other.name}` and of `{base.name}` differ, the latter's is kept"
            notes.append(Problem(message, mark, f"tokens that only `{other.name}` has may never come out of a text"))
    model = _model(base)
    ids = dict(base.ids)
    plain: dict[str, int] = {} if model["type"] == "Unigram" else dict(model["vocab"])
    added = dict(base.added)
    merges = {_pair(merge): merge for merge in model.get("merges") or ()}
    new: list[str] = []
    following = base.size
    for other in different:
        for token in sorted(other.ids, key=lambda one: other.ids[one]):
            if token not in ids and not any(token in one.added for one in different):
                ids[token] = plain[token] = following
                following += 1
        merges |= {pair: merge for merge in _model(other).get("merges") or () if (pair := _pair(merge)) not in merges}
    for other in different:
        for token in sorted(other.added, key=lambda one: other.ids[one]):
            added.setdefault(token, other.added[token])
            if token not in ids:
                ids[token] = following
                following += 1
                new.append(token)
    if len(ids) == len(base.ids) and len(merges) == len(model.get("merges") or ()) and len(added) == len(base.added):
        return base, notes
    changed: dict[str, Any] = model if model["type"] == "Unigram" else {**model, "vocab": plain}
    if "merges" in model:
        changed["merges"] = [list(pair) for pair in merges]
    return _made(base, ids, added, changed), notes


def with_added(tokens: Tokens, texts: Iterable[str], others: Sequence[Tokens]) -> Tokens:
    """`tokens` and further ones, with the settings that they have in the first of `others` that knows them as added."""
    lacking = [text for text in texts if text not in tokens.ids]
    if not lacking:
        return tokens
    ids, added = dict(tokens.ids), dict(tokens.added)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for number, text in enumerate(lacking, start=tokens.size):
        known = next((other.added[text] for other in others if text in other.added), None)
        ids[text], added[text] = number, known or {"content": text, **plain}
    return _made(tokens, ids, added, _model(tokens))


def text_of(tokens: Tokens) -> bytes:
    """tokenizer.json. Raises InputError where the library would read other ids from it than are meant."""
    from tokenizers import Tokenizer

    text = json.dumps(tokens.data, ensure_ascii=False)
    try:
        found = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    except Exception as fault:
        raise InputError(f"the tokenizer made for the output cannot be read: {fault}") from None
    if found != dict(tokens.ids):
        wrong = next((t for t in {*found, *tokens.ids} if found.get(t) != tokens.ids.get(t)), None)
        message = (
            f"the token {wrong!r} would get the id {found.get(str(wrong))} in place of {tokens.ids.get(str(wrong))}"
        )
        hint = f"the tokenizer of `{tokens.name}` has gaps among its ids: take it as it is, `tokenizer: {tokens.name}`"
        raise InputError(f"no tokenizer.json can be written for the output: {message}", hint=hint)
    return text.encode()


def _made(base: Tokens, ids: Mapping[str, int], added: Mapping[str, Mapping[str, Any]], model: Any) -> Tokens:
    """`base` with these tokens; those of `added` keep the settings of their entry."""
    entries = [{"id": ids[token], **entry} for token, entry in added.items()]
    entries.sort(key=lambda entry: entry["id"])
    model = dict(model)
    if isinstance(model["vocab"], Mapping):
        # The library numbers added tokens by itself unless they stand in the vocabulary, where gaps do no harm then.
        model["vocab"] = {**model["vocab"], **{token: ids[token] for token in added}}
    else:
        model["vocab"] = scored(model["vocab"], ids, added)
    data = {**base.data, "added_tokens": entries, "model": model}
    settings = dict(base.settings)
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"] = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in entries
        }
    return Tokens(base.name, ids, added, data, settings, stored=False)


def _check(base: Tokens, other: Tokens, mark: Mark | None) -> None:
    """Raises RecipeError where two tokenizers cannot become one."""
    hint = "name one vocabulary for all: `base`, or a model"
    for one in (base, other):
        if kind_of(one)[0] not in _UNITED:
            message = f"the tokenizer of `{one.name}` is of the kind {kind_of(one)[0]}, of which no union is made"
            raise RecipeError(Problem(message, mark, hint))
    if kind_of(base) != kind_of(other):
        names = [" ".join(part for part in kind_of(one) if part) for one in (base, other)]
        message = (
            f"there is no union of the tokenizers of `{base.name}` ({names[0]}) and `{other.name}` ({names[1]}): {_HOW}"
        )
        raise RecipeError(Problem(message, mark, hint))


def kind_of(tokens: Tokens) -> tuple[str, ...]:
    """What two tokenizers must have in common: the kind of model, how it marks words, and its prefixes."""
    model = _model(tokens)
    types = set(_types([tokens.data.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]))
    words = (
        "byte-level"
        if "ByteLevel" in types
        else "SentencePiece"
        if "Metaspace" in types or "▁" in json.dumps(tokens.data.get("normalizer"), ensure_ascii=False)
        else "words"
    )
    marks = [model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    fallback = "with bytes" if model.get("byte_fallback") else ""
    return (model["type"], words, fallback, *marks)


def _types(parts: Any) -> Iterable[str]:
    if isinstance(parts, Mapping):
        if isinstance(parts.get("type"), str):
            yield parts["type"]
        parts = list(parts.values())
    if isinstance(parts, list):
        for part in parts:
            yield from _types(part)


def _model(tokens: Tokens) -> dict[str, Any]:
    """The `model` of tokenizer.json; files of early versions do not name its type."""
    model = dict(tokens.data["model"])
    guess = "BPE" if "merges" in model else "Unigram" if isinstance(model.get("vocab"), list) else "WordPiece"
    model.setdefault("type", guess)
    return model


def _pair(merge: Any) -> tuple[str, str]:
    """A merge, which older files write as `a b`."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right

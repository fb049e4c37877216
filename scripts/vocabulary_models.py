"""Tiny models whose tokenizers are trained on real text in a second: for tests, and for comparisons with mergekit.

The texts are this project's own (README, licence, documents) and the sources of Python's library: what one tokenizer
has never seen, the other knows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
HIDDEN = 16
TEMPLATES = {
    "a": "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}",
    "b": "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}",
}


@cache
def prose() -> list[str]:
    """Paragraphs of this project's documents."""
    files = [ROOT / "README.md", ROOT / "LICENSE", *sorted((ROOT / "docs").glob("*.md"))[:3]]
    return [part for file in files for part in file.read_text(encoding="utf-8").split("\n\n") if part.strip()]


@cache
def code() -> list[str]:
    """Pieces of modules of Python's library."""
    import argparse
    import textwrap

    files = [Path(str(module.__file__)) for module in (argparse, textwrap, json)]
    return [part for file in files for part in file.read_text(encoding="utf-8").split("\n\n") if part.strip()]


def byte_level(text: Sequence[str], size: int, special: Sequence[str] = ("<s>", "</s>", "<pad>")) -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: any byte is a token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet)
    )
    return made


def sentencepiece(text: Sequence[str], size: int) -> Tokenizer:
    """As Llama 2: blanks are written as a low line, and what is no token is spelt in bytes."""
    parts = [piece for part in text for piece in part.replace(" ", "▁").replace("▁", " ▁").split(" ") if piece]
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(parts, trainers.BpeTrainer(vocab_size=size - 259))
    data = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *data["vocab"]]
    merges = [tuple(merge) for merge in data["merges"]]
    vocab = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:3]])
    return made


def unigram(text: Sequence[str], size: int) -> Tokenizer:
    """As T5 and ALBERT: a text is split into the pieces that are likeliest together. The pieces are those of merges,
    their shares those in the text; a training of its own takes long and comes out another way each time."""
    parts = [piece for part in text for piece in part.replace(" ", " ▁").split(" ") if piece]
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(parts, trainers.BpeTrainer(vocab_size=size - 3))
    whole = " ".join(parts)
    counts = {token: whole.count(token) + 1 for token in sorted(trained.get_vocab())}
    total = sum(counts.values())
    shares = sorted(((token, math.log(count / total)) for token, count in counts.items()), key=lambda one: -one[1])
    special = ["<unk>", "<s>", "</s>"]
    made = Tokenizer(models.Unigram([*((token, 0.0) for token in special), *shares], unk_id=0))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made


def wordpiece(text: Sequence[str], size: int) -> Tokenizer:
    """As BERT."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(text, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special))
    ends = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return made


def with_tokens(made: Tokenizer, *tokens: str) -> Tokenizer:
    """A copy that knows these tokens too, as chat models do."""
    more = Tokenizer.from_str(made.to_str())
    more.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return more


def reordered(made: Tokenizer) -> Tokenizer:
    """The same tokens under other numbers."""
    data = json.loads(made.to_str())
    order = sorted(made.get_vocab(), key=lambda token: token[::-1])
    data["model"]["vocab"] = {token: number for number, token in enumerate(order)}
    for entry in data["added_tokens"]:
        entry["id"] = data["model"]["vocab"][entry["content"]]
    return Tokenizer.from_str(json.dumps(data))


def write(
    folder: Path, made: Tokenizer, seed: int, *, rows: int | None = None, tied: bool = False, hidden: int = HIDDEN
) -> Path:
    """A model with this tokenizer, of `rows` rows or as many as there are tokens: Llama's architecture, or BERT's."""
    torch.manual_seed(seed)
    size = rows or made.get_vocab_size()
    bert = json.loads(made.to_str())["model"]["type"] == "WordPiece"
    common: dict[str, Any] = {
        "vocab_size": size,
        "hidden_size": hidden,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "tie_word_embeddings": tied or bert,
    }
    names = {"bos_token": "<s>", "eos_token": "</s>"} if not bert else {"pad_token": "[PAD]", "mask_token": "[MASK]"}
    ids: dict[str, Any] = {f"{name}_id": made.token_to_id(token) for name, token in names.items()}
    if bert:
        ids.pop("mask_token_id")
        model: Any = BertForMaskedLM(BertConfig(**common, **ids))
        torch.nn.init.normal_(model.cls.predictions.bias)
    else:
        model = LlamaForCausalLM(LlamaConfig(**common, **ids))
    model.save_pretrained(folder)
    kind: Any = PreTrainedTokenizerFast  # has no annotations
    fast = kind(tokenizer_object=made, unk_token="[UNK]" if bert else None, clean_up_tokenization_spaces=False, **names)
    if folder.name in TEMPLATES and not bert:
        fast.chat_template = TEMPLATES[folder.name]
    fast.save_pretrained(folder)
    return folder


def pair_byte_level(folder: Path) -> None:
    write(folder / "a", byte_level(prose(), 420), 1)
    write(folder / "b", byte_level(code(), 500), 2)


def pair_added(folder: Path) -> None:
    made = byte_level(prose(), 400)
    write(folder / "a", made, 1)
    write(folder / "b", with_tokens(made, "<|im_start|>", "<|im_end|>"), 2)


def pair_order(folder: Path) -> None:
    made = byte_level(prose(), 400)
    write(folder / "a", made, 1)
    write(folder / "b", reordered(made), 2)


def pair_padded(folder: Path) -> None:
    made = byte_level(prose(), 400)
    write(folder / "a", made, 1, rows=448, tied=True)
    write(folder / "b", with_tokens(made, "<tool>"), 2, rows=512, tied=True)


def pair_sentencepiece(folder: Path) -> None:
    write(folder / "a", sentencepiece(prose(), 700), 1)
    write(folder / "b", sentencepiece(code(), 800), 2)


def pair_wordpiece(folder: Path) -> None:
    write(folder / "a", wordpiece(prose(), 500), 1)
    write(folder / "b", wordpiece(code(), 600), 2)


def pair_unigram(folder: Path) -> None:
    write(folder / "a", unigram(prose(), 700), 1)
    write(folder / "b", unigram(code(), 800), 2)


PAIRS: dict[str, Callable[[Path], None]] = {
    "byte_level": pair_byte_level,
    "added": pair_added,
    "order": pair_order,
    "padded": pair_padded,
    "sentencepiece": pair_sentencepiece,
    "wordpiece": pair_wordpiece,
    "unigram": pair_unigram,
}

"""Text and files of model inputs as examples."""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lite.calibrate.examples import IGNORED, LABELS, uniform
from mergekit_lite.calibrate.model import Loaded, transformers
from mergekit_lite.errors import InputError, UsageError, suggest
from mergekit_lite.lazy import Tensor, torch
from mergekit_lite.report.quiet import quiet

BLOCK = 512
BATCH = 32  # examples of a data file that go through together
MASKED = 0.15  # share of the tokens that a masked language model is asked for
_LINES = 256  # lines that are put into tokens at once


@dataclass(frozen=True, slots=True)
class Data:
    """Batches of examples, which may be gone through several times. `left_over`: tokens of a last, short block."""

    batches: Sequence[Mapping[str, Tensor]]
    examples: int
    tokens: int
    block: int | None = None
    left_over: int = 0


def read_text(path: Path) -> str:
    """A text in UTF-8. Raises InputError where it cannot be read, is no text, or holds nothing."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as fault:
        raise InputError(f"cannot read `{path}`: {fault.strerror}") from fault
    except UnicodeDecodeError as fault:
        raise InputError(f"`{path}` is no text in UTF-8", hint="give model inputs with `--data`") from fault
    if not text.strip():
        raise InputError(f"`{path}` is empty", hint="give a text like those that the model is meant for")
    return text


def block_length(loaded: Loaded, block: int | None) -> int:
    """How many tokens an example may have. Raises UsageError where the model takes fewer than asked for."""
    config = loaded.network.config
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if block is not None and isinstance(most, int) and block > most:
        raise UsageError(f"the model takes {most} tokens, not {block}", hint=f"`--block {most}` or less")
    return block or min(BLOCK, most if isinstance(most, int) and most > 0 else BLOCK)


def from_text(
    loaded: Loaded,
    location: str,
    folder: Path,
    path: Path,
    block: int | None,
    lines: bool,
    limit: int | None,
    seed: int,
) -> Data:
    """A text in blocks of `block` tokens, or with `lines` one example for each line that is not blank, cut off there.

    Each block begins and ends with the special tokens that the tokenizer puts around a text. Of more than `limit` a
    draw by `seed` remains, in the order of the text. A masked language model sees 15 % of the tokens masked and is
    asked for these. Raises InputError where there is no tokenizer, or not one whole block.
    """
    text = read_text(path)
    if "input_ids" not in inspect.signature(loaded.network.forward).parameters:
        raise InputError(f"`{type(loaded.network).__name__}` takes no text", hint="give its inputs with `--data`")
    if loaded.network.config.is_encoder_decoder:
        hint = "give `input_ids` and `decoder_input_ids` with `--data`"
        raise InputError("an encoder and a decoder each need a text of their own", hint=hint)
    tokenizer = tokenizer_of(folder, location)
    length = block_length(loaded, block)
    left = 0
    if lines:
        rows = [
            tokenizer(line, truncation=True, max_length=length)["input_ids"]
            for line in text.splitlines()
            if line.strip()
        ]
        rows = [row for row in rows if row]
    else:
        rows, left = _blocks(tokenizer, text, length, path)
    rows = [rows[i] for i in chosen(len(rows), limit, seed)]
    vocabulary = loaded.network.get_input_embeddings().num_embeddings
    if max(map(max, rows)) >= vocabulary:
        hint = "are tokenizer and weights from one model?"
        raise InputError(f"the tokenizer gives tokens beyond the {vocabulary} of the embedding", hint=hint)
    batches = [_text_batch(loaded, tokenizer, row, i, seed) for i, row in enumerate(rows)]
    return Data(batches, len(rows), sum(map(len, rows)), length, left)


def _blocks(tokenizer: Any, text: str, length: int, path: Path) -> tuple[list[list[int]], int]:
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    around = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(around)) if around[i : i + len(plain)] == plain), 0)
    before, after = around[:start], around[start + len(plain) :]
    inner = length - len(before) - len(after)
    if inner < 1:
        raise UsageError(f"a block of {length} tokens has no room for text", hint="a larger `--block`")
    ids = array("l")
    pieces = text.splitlines(keepends=True)
    for at in range(0, len(pieces), _LINES):
        ids.extend(tokenizer("".join(pieces[at : at + _LINES]), add_special_tokens=False)["input_ids"])
    count = len(ids) // inner
    if not count:
        hint = f"give a longer text, `--block {max(len(ids) + len(before) + len(after), 1)}` or less, or `--lines`"
        raise InputError(f"`{path}` has {len(ids)} tokens, less than one block of {length}", hint=hint)
    rows = [[*before, *ids[i * inner : (i + 1) * inner], *after] for i in range(count)]
    return rows, len(ids) - count * inner


def _text_batch(loaded: Loaded, tokenizer: Any, row: list[int], number: int, seed: int) -> dict[str, Tensor]:
    ids = torch.tensor([row])
    batch = {"input_ids": ids}
    if loaded.causal:
        batch[LABELS] = ids
    elif loaded.masked:
        if tokenizer.mask_token_id is None:
            raise InputError("the tokenizer has no mask token", hint="give inputs and labels with `--data`")
        draw = uniform(seed, number, len(row))[None]
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        hidden = (draw < MASKED) & ~special
        batch = {
            "input_ids": torch.where(hidden, tokenizer.mask_token_id, ids),
            LABELS: torch.where(hidden, ids, IGNORED),
        }
    return {key: value.to(loaded.device) for key, value in batch.items()}


def tokenizer_of(folder: Path, location: str) -> Any:
    """The tokenizer in the folder of a model. Raises InputError where there is none that transformers reads."""
    hint = "copy the tokenizer's files into the folder, or give token ids with `--data`"
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
    if not any((folder / name).exists() for name in names):
        raise InputError(f"`{location}` has no tokenizer", hint=hint)
    with quiet(transformers()):
        try:
            return transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as fault:  # whatever a tokenizer's files make the library raise
            said = (str(fault).strip().splitlines() or [type(fault).__name__])[0][:300]
            raise InputError(f"transformers cannot read the tokenizer of `{location}`: {said}", hint=hint) from fault


def from_file(loaded: Loaded, path: Path, limit: int | None, seed: int) -> Data:
    """The examples of a .safetensors or .npz file whose tensors are the model's inputs by name, examples along axis 0,
    and `labels`, which the model is not given. Of more than `limit` a draw by `seed` remains.

    With an `attention_mask` (examples, positions) each example goes through by itself, without what is masked. Raises
    InputError for files that cannot be read and for tensors that the model does not take.
    """
    tensors = read_tensors(path)
    problem = _sizes(tensors)
    if problem is not None:
        raise InputError(f"`{path}` {problem}", hint="examples lie along axis 0 of every tensor")
    taken = inspect.signature(loaded.network.forward).parameters
    for name in tensors:
        if name not in taken and name != LABELS:
            raise InputError(f"`{path}` holds `{name}`, which the model does not take", hint=suggest(name, taken))
    dtype = next(p.dtype for p in loaded.network.parameters() if p.is_floating_point())
    kept = torch.tensor(list(chosen(len(next(iter(tensors.values()))), limit, seed)))
    ready = {
        name: value[kept].to(dtype) if value.is_floating_point() else value[kept].long()
        for name, value in tensors.items()
    }
    mask = ready.get("attention_mask")
    if mask is None:
        rows = [{n: v[i : i + BATCH] for n, v in ready.items()} for i in range(0, len(kept), BATCH)]
    elif mask.dim() == 2 and bool(((mask == 0) | (mask == 1)).all()) and bool(mask.any(dim=1).all()):
        rows = [_unpadded(ready, mask[i] == 1, i) for i in range(len(kept))]
    else:
        message = f"`attention_mask` of `{path}` is no table of 0 and 1 with something seen in each row"
        raise InputError(message, hint="(examples, positions), 0 where there is padding")
    batches = [{name: value.to(loaded.device) for name, value in row.items()} for row in rows]
    ids = [row["input_ids"].numel() for row in rows if "input_ids" in row]
    return Data(batches, len(kept), sum(ids))


def _sizes(tensors: Mapping[str, Tensor]) -> str | None:
    if not tensors or set(tensors) == {LABELS}:
        return "holds no inputs"
    sizes = sorted({len(tensor) if tensor.dim() else 0 for tensor in tensors.values()})
    if sizes[0] == 0:
        return "holds a tensor without examples"
    return None if len(sizes) == 1 else f"holds tensors of {' and '.join(map(str, sizes))} examples"


def _unpadded(tensors: Mapping[str, Tensor], seen: Tensor, number: int) -> dict[str, Tensor]:
    row = {name: value[number : number + 1] for name, value in tensors.items()}
    return {n: v[:, seen] if v.dim() > 1 and v.shape[1] == len(seen) else v for n, v in row.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .npz file, never anything that is run."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix == ".npz":
            import numpy as np

            with np.load(path, allow_pickle=False) as found:
                return {name: torch.from_numpy(found[name]) for name in found.files}
    except OSError as fault:
        raise InputError(f"cannot read `{path}`: {fault.strerror or fault}") from fault
    except Exception as fault:  # each library has errors of its own for damaged files
        raise InputError(f"`{path}` is damaged: {fault}", hint="write it anew") from fault
    raise InputError(f"`{path}` is neither .safetensors nor .npz", hint="write the model's inputs in one of the two")


def chosen(count: int, limit: int | None, seed: int) -> Iterator[int]:
    """Which of `count` examples are taken: all, or `limit` drawn by `seed`, in their order."""
    if limit is None or limit >= count:
        return iter(range(count))
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit]
    return iter(sorted(drawn.tolist()))

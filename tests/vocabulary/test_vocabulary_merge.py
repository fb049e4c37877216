"""Merges over different vocabularies: which tokens come out, under which ids, and whose rows they have."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import vocabulary_models as maker

from mergekit_lite import RecipeError, load_recipe, plan, run

HELD = {
    "model.embed_tokens.weight",
    "lm_head.weight",
    "bert.embeddings.word_embeddings.weight",
    "cls.predictions.bias",
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    before = torch.get_rng_state()
    for name, write in maker.PAIRS.items():
        write(folder / name)
    # A third model, which knows what only one of the others knows and a token of its own.
    both = maker.with_tokens(maker.byte_level(maker.prose(), 380), "<|im_start|>", "<third>")
    maker.write(folder / "added" / "c", both, 3)
    torch.set_rng_state(before)
    return folder


def merge(text: str, to: Path, pair: Path, **options: Any) -> Any:
    """Run the recipe `text`, in which MODELS stands for the models of `pair`."""
    models = ", ".join(f"{model.name}: {model}" for model in sorted(pair.iterdir()))
    recipe = to.with_suffix(".yaml")
    recipe.write_text(text.replace("MODELS", f"models: {{{models}}}"), encoding="utf-8")
    made = plan(load_recipe(recipe), out=to)
    run(made, **options)
    return made


def ids(folder: Path) -> dict[str, int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


LINEAR = "version: 1\nMODELS\nsteps: {m: {use: linear, of: {a: {weight: 3}, b: {weight: 1}}}}\n"


def linear(rows: Mapping[str, Tensor]) -> Tensor:
    return 0.75 * rows["a"] + 0.25 * rows["b"]


@pytest.mark.parametrize("name", maker.PAIRS)
@pytest.mark.parametrize("source", ["base", "union", "b"])
def test_every_token_has_the_merged_row_of_its_token(name: str, source: str, pairs: Path, tmp_path: Path) -> None:
    pair, out = pairs / name, tmp_path / "out"
    merge(f"{LINEAR}save: {{tokenizer: {source}}}\n", out, pair)
    known = {model: ids(pair / model) for model in "ab"}
    rows = {model: tensors(pair / model) for model in "ab"}
    found, merged = ids(out), tensors(out)
    wanted = {"base": known["a"], "b": known["b"], "union": known["a"] | known["b"]}[source]
    lead = known["b" if source == "b" else "a"]
    assert found.keys() == wanted.keys() and found == found | lead
    assert sorted(found.values()) == list(range(len(found))) and config(out)["vocab_size"] == len(found)
    held = HELD & merged.keys()
    assert held and all(len(merged[key]) == len(found) for key in held)
    for key in held:
        for token, number in found.items():
            own = {m: rows[m][key][known[m][token]] for m in "ab" if token in known[m]}
            other = next(iter(own.values()))
            expected = linear({m: own.get(m, other) for m in "ab"})
            assert torch.allclose(merged[key][number], expected, atol=1e-6), (key, token)
    for key in merged.keys() - held:
        assert torch.allclose(merged[key], linear({m: rows[m][key] for m in "ab"}), atol=1e-6)


@pytest.mark.parametrize("name", ["byte_level", "added", "order", "padded", "sentencepiece"])
def test_any_text_comes_back_and_both_parents_tokens_are_used(name: str, pairs: Path, tmp_path: Path) -> None:
    pair, out = pairs / name, tmp_path / "out"
    merge(f"{LINEAR}save: {{tokenizer: union}}\n", out, pair)
    made, a = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(pair / "a")
    texts = [*maker.prose()[:40], *maker.code()[:40], "naïve 東京 \U0001f600\t ok"]
    for text in texts:
        assert made.decode(made.encode(text, add_special_tokens=False)) == text
    if ids(pair / "a").keys() < ids(out).keys() and name in ("byte_level", "sentencepiece"):
        length = {t: sum(len(t.encode(text)) for text in maker.code()[:40]) for t in (made, a)}
        assert length[made] < 0.95 * length[a]  # the tokens that only b had come out of texts
        pieces = {token for text in maker.code()[:40] for token in made.tokenize(text)}
        assert pieces - ids(pair / "a").keys()
    assert {made.convert_ids_to_tokens(i) for i in made.encode("<s></s>", add_special_tokens=False)} >= {"<s>", "</s>"}


def test_words_of_either_parent_are_known_to_the_union_of_word_pieces(pairs: Path, tmp_path: Path) -> None:
    pair, out = pairs / "wordpiece", tmp_path / "out"
    merge(f"{LINEAR}save: {{tokenizer: union}}\n", out, pair)
    made, a, b = (AutoTokenizer.from_pretrained(folder) for folder in (out, pair / "a", pair / "b"))
    texts = [*maker.prose()[:40], *maker.code()[:40]]
    assert any(b.unk_token_id in b(text).input_ids for text in texts)
    for text in texts:
        for parent in (a, b):
            if parent.unk_token_id not in parent(text).input_ids:
                plain = [t.decode(t(text).input_ids, skip_special_tokens=True) for t in (made, parent)]
                assert plain[0] == plain[1]
                break
    model = AutoModelForMaskedLM.from_pretrained(out)
    assert torch.isfinite(model(**made("merge two models", return_tensors="pt")).logits).all()


@pytest.mark.parametrize("name", ["byte_level", "padded", "sentencepiece"])
def test_the_output_loads_and_generates(name: str, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(f"{LINEAR}save: {{tokenizer: {{source: union, pad_to_multiple_of: 64}}}}\n", out, pairs / name)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert tokenizer.get_vocab() == ids(out) and len(tokenizer) <= model.config.vocab_size
    assert model.config.vocab_size % 64 == 0
    assert tokenizer.convert_ids_to_tokens(model.config.eos_token_id) == tokenizer.eos_token == "</s>"
    with torch.no_grad():
        found = model.generate(**tokenizer("The model", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert found.shape[1] > 2 and int(found.max()) < model.config.vocab_size


def test_rows_of_tokens_are_those_that_the_recipe_chooses(pairs: Path, tmp_path: Path) -> None:
    """Chosen rows, forced ones, the mean of the owners, and padding, which is the mean of all rows."""
    pair, out = pairs / "added", tmp_path / "out"
    like = min(token for token in ids(pair / "b") if len(token) == 2 and token.isascii() and token.isalpha())
    tokens = (
        f"{{<new>: {{source: {{kind: model_token, model: b, token: '{like}'}}}}, "
        "<by_id>: {source: {kind: model_token, model: c, "
        "token_id: 5}}, <none>: {source: {kind: zero}}, <third>: {source: b}, e: {source: c, force: true}}"
    )
    text = "version: 1\nMODELS\nsteps: {m: {use: linear, of: [a, b, c]}}\nsave: {tokenizer: {source: union, "
    with pytest.raises(RecipeError, match="`b` has no token '<third>'"):
        merge(f"{text}tokens: {tokens}, pad_to_multiple_of: 128}}}}\n", out, pair)
    tokens = tokens.replace("<third>: {source: b}", "<third>: {source: c}")
    merge(f"{text}tokens: {tokens}, pad_to_multiple_of: 128}}}}\n", out, pair)
    known, rows = {m: ids(pair / m) for m in "abc"}, {m: tensors(pair / m) for m in "abc"}
    found, key = ids(out), "lm_head.weight"
    made = tensors(out)[key].double()

    def own(model: str, token: str) -> Tensor:
        return rows[model][key][known[model][token]].double()

    def check(token: str, expected: Tensor) -> None:
        assert torch.allclose(made[found[token]], expected, atol=1e-6), token

    check("<new>", own("b", like))
    check("<by_id>", rows["c"][key][5].double())
    check("<none>", torch.zeros(maker.HIDDEN, dtype=torch.float64))
    check("<third>", own("c", "<third>"))
    check("e", own("c", "e"))
    # a lacks it and there is no base: it takes the mean of those that have it.
    check("<|im_start|>", (own("b", "<|im_start|>") + own("c", "<|im_start|>")) / 2)
    check("<|im_end|>", own("b", "<|im_end|>"))
    lacking = next(token for token in known["a"] if token not in known["c"])
    check(lacking, (own("a", lacking) + own("b", lacking)) / 2)
    assert len(made) % 128 == 0 and len(made) > len(found)
    assert torch.allclose(made[len(found) :], made[: len(found)].mean(dim=0), atol=1e-6)


def test_a_base_gives_the_rows_that_others_lack(pairs: Path, tmp_path: Path) -> None:
    """In a delta of a token that a model lacks nothing is left, since its row is the base's."""
    pair, out = pairs / "added", tmp_path / "out"
    text = (
        "version: 1\nMODELS\nsteps: {m: {use: task_arithmetic, of: [a, c], base: b, with: {weight: 0.5, lambda: 1}}}\n"
    )
    made = merge(f"{text}save: {{tokenizer: base}}\n", out, pair)
    known, rows = {m: ids(pair / m) for m in "abc"}, {m: tensors(pair / m)["lm_head.weight"].double() for m in "abc"}
    assert ids(out) == known["b"] and made.vocabulary.lead == "b"
    merged = tensors(out)["lm_head.weight"].double()
    for token, number in known["b"].items():
        base = rows["b"][number]
        changes = [rows[m][known[m][token]] - base for m in "ac" if token in known[m]]
        assert torch.allclose(merged[number], base + 0.5 * sum(changes, torch.zeros_like(base)), atol=1e-6), token


def test_blocks_and_threads_change_no_byte(pairs: Path, tmp_path: Path) -> None:
    text = f"{LINEAR}save: {{tokenizer: {{source: union, pad_to_multiple_of: 64}}}}\n"
    found = []
    for number, options in enumerate(({}, {"threads": 1, "block": 64}, {"threads": 3, "block": 4096})):
        out = tmp_path / str(number)
        merge(text, out, pairs / "sentencepiece", **options)
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1] == found[2]


def test_another_mapping_is_another_plan(pairs: Path, tmp_path: Path) -> None:
    digests = set()
    for number, row in enumerate(("a", "b", "{kind: model_token, model: b, token_id: 9}")):
        wish = f"{{source: base, tokens: {{e: {{source: {row}, force: true}}}}}}"
        made = merge(f"{LINEAR}save: {{tokenizer: {wish}}}\n", tmp_path / str(number), pairs / "order")
        digests.add(made.digest)
    assert len(digests) == 3


def test_ids_in_the_configuration_are_those_of_the_vocabulary(pairs: Path, tmp_path: Path) -> None:
    """The configuration is a's, the vocabulary b's: the special tokens have b's ids, in generation_config.json too."""
    pair, out = pairs / "order", tmp_path / "out"
    merge(f"{LINEAR}save: {{tokenizer: b}}\n", out, pair)
    for token, key in (("<s>", "bos_token_id"), ("</s>", "eos_token_id")):
        assert ids(pair / "a")[token] != ids(pair / "b")[token]
        for file in ("config.json", "generation_config.json"):
            assert json.loads((out / file).read_text(encoding="utf-8"))[key] == ids(pair / "b")[token]
    assert (out / "tokenizer.json").read_bytes() == (pair / "b" / "tokenizer.json").read_bytes()


def test_a_lock_makes_the_same_again(pairs: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    merge(f"{LINEAR}save: {{tokenizer: union, chat_template: auto}}\n", first, pairs / "byte_level")
    run(plan(load_recipe(first / "recipe.lock.yaml"), out=again))
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes()

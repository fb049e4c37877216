"""Vocabularies that cannot be had, and what is said; chat templates; the forms of a tokenizer on disk."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import vocabulary_models as maker

from mergekit_lite import InputError, MergeError, RecipeError, load_recipe, plan, run
from mergekit_lite.vocabulary.template import known

STEPS = "steps: {m: {use: linear, of: [a, b]}}\n"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    before = torch.get_rng_state()
    small = maker.byte_level(maker.prose()[:20], 300)
    maker.write(folder / "a", small, 1)
    maker.write(folder / "b", maker.with_tokens(small, "<|b|>"), 2)
    maker.write(folder / "piece", maker.sentencepiece(maker.prose()[:20], 400), 3)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "one": 2}, unk_token="one"))
    maker.write(folder / "words", words, 4)
    maker.write(folder / "bert", maker.wordpiece(maker.prose()[:20], 200), 5)
    torch.set_rng_state(before)
    return folder


@pytest.fixture
def planned(kinds: Path, tmp_path: Path) -> Callable[..., object]:
    """A function that plans a merge of `a` and another model, whose folder `change` may change first."""

    def make(save: str, b: str = "b", change: Callable[[Path], object] | None = None, steps: str = STEPS) -> object:
        other = kinds / b
        if change is not None:
            other = Path(shutil.copytree(other, tmp_path / b))
            change(other)
        recipe = tmp_path / "r.yaml"
        text = f"version: 1\nmodels: {{a: {kinds / 'a'}, b: {other}}}\n{steps}save: {save}\n"
        recipe.write_text(text, encoding="utf-8")
        return plan(load_recipe(recipe), out=None if "to:" in save else tmp_path / "out")

    return make


@pytest.mark.parametrize(
    ("b", "message"),
    [
        ("piece", "there is no union of the tokenizers of `a` (BPE byte-level) and `b` (BPE SentencePiece with bytes)"),
        ("words", "the tokenizer of `b` is of the kind WordLevel, of which no union is made"),
        ("bert", "there is no union of the tokenizers of `a` (BPE byte-level) and `b` (WordPiece words ##)"),
    ],
)
def test_tokenizers_of_different_kinds_have_no_union(planned: Callable[..., object], b: str, message: str) -> None:
    with pytest.raises(RecipeError) as found:
        planned("{tokenizer: union}", b)
    assert message in str(found.value) and found.value.problems[0].hint


@pytest.mark.parametrize(
    ("save", "message"),
    [
        ("{tokenizer: uniom}", "there is no model or step `uniom`"),
        ("{tokenizer: [base]}", "`tokenizer` must name a model or a step, not a list"),
        ("{tokenizer: {source: base, token: {}}}", "`tokenizer` has no key `token`"),
        ("{tokenizer: {pad_to_multiple_of: 0}}", "`pad_to_multiple_of` must be a whole number above 0"),
        (
            "{tokenizer: {tokens: {x: {source: {kind: model_token, model: b}}}}}",
            "needs either a `token` or a `token_id`",
        ),
        ("{tokenizer: {tokens: {x: {source: m}}}}", "`m` is a step, and rows of tokens come from models"),
        ("{tokenizer: {tokens: {x: {source: {kind: model_token, model: b, token_id: 9999}}}}}", "has 301 rows"),
        ("{chat_template: chatlm}", "there is no model or step `chatlm`"),
        ("{chat_template: 3}", "`chat_template` is one of"),
        ("[{to: x, tokenizer: base}, {to: y, tokenizer: union}]", "ask for different vocabularies"),
        ("[{to: x, tokenizer: base}, {to: y}]", "ask for different vocabularies"),
    ],
)
def test_a_wish_that_makes_no_sense_is_told(planned: Callable[..., object], save: str, message: str) -> None:
    with pytest.raises(RecipeError) as found:
        planned(save)
    assert message in str(found.value) and "\n  --> " in str(found.value)
    assert all(len(str(problem.message)) < 200 for problem in found.value.problems)


def test_different_shapes_without_a_wish_stay_an_error(planned: Callable[..., object]) -> None:
    with pytest.raises(RecipeError, match="different shapes"):
        planned("{dtype: float32}")


def test_a_model_without_a_tokenizer_is_taken_to_have_the_bases(planned: Callable[..., object]) -> None:
    def bare(folder: Path) -> None:
        for file in folder.glob("tokenizer*"):
            file.unlink()

    made = planned("{tokenizer: base}", "b", bare)
    assert any("has no tokenizer and is taken to have that of `a`" in w.message for w in made.warnings)
    with pytest.raises(RecipeError, match="`b`, whose vocabulary is asked for, has no tokenizer"):
        planned("{tokenizer: b}", "piece", bare)


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_text("{", encoding="utf-8"),
        lambda file: file.write_text("[]", encoding="utf-8"),
        lambda file: file.write_bytes(b"\xff\xfe"),
        lambda file: file.write_text('{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', encoding="utf-8"),
        lambda file: file.write_text(json.dumps(huge(file)), encoding="utf-8"),
        lambda file: (file.unlink(), file.symlink_to("/etc/hostname")),
        lambda file: (file.unlink(), file.mkdir(), (file.parent / "vocab.txt").write_text("a\n", encoding="utf-8")),
    ],
    ids=["cut", "a list", "no text", "a negative id", "a huge id", "a link out", "a folder"],
)
def test_a_broken_tokenizer_is_an_error_of_the_input(
    planned: Callable[..., object], change: Callable[[Path], object]
) -> None:
    with pytest.raises(MergeError) as found:
        planned("{tokenizer: union}", "b", lambda folder: change(folder / "tokenizer.json"))
    assert isinstance(found.value, InputError) and "tokenizer.json" in str(found.value)


def huge(file: Path) -> object:
    data = json.loads(file.read_text(encoding="utf-8"))
    data["model"]["vocab"]["far"] = 2**31
    return data


def test_a_tokenizer_in_another_form_is_converted(kinds: Path, tmp_path: Path) -> None:
    """vocab.txt of BERT, as old releases have it."""
    folder = Path(shutil.copytree(kinds / "bert", tmp_path / "old"))
    vocab = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("".join(f"{t}\n" for t in sorted(vocab, key=vocab.__getitem__)), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}', encoding="utf-8")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"version: 1\nmodels: {{a: {folder}, b: {kinds / 'bert'}}}\n{STEPS}save: {{tokenizer: {{source: union, tokens: "
        "{new: {source: {kind: zero}}}}}\n",
        encoding="utf-8",
    )
    run(plan(load_recipe(recipe), out=tmp_path / "out"))
    found = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert found == vocab | {"new": len(vocab)}
    assert not (tmp_path / "out" / "vocab.txt").exists()


def test_tokens_that_no_model_has_a_row_for_get_zeros_and_are_told(planned: Callable[..., object]) -> None:
    def more(folder: Path) -> None:
        made = Tokenizer.from_file(str(folder / "tokenizer.json"))
        maker.with_tokens(made, "<beyond>").save(str(folder / "tokenizer.json"))

    made = planned("{tokenizer: union}", "b", more)
    assert any("no row in `lm_head.weight` of any model and get zeros: '<beyond>'" in w.message for w in made.warnings)


@pytest.mark.parametrize(
    "template", ["auto", "b", "alpaca", "chatml", "llama3", "mistral", "exaone", "'{{ messages }}'"]
)
def test_the_chat_template_is_the_one_asked_for(template: str, kinds: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    text = f"version: 1\nmodels: {{a: {kinds / 'a'}, b: {kinds / 'b'}}}\nsteps: {{m: {{use: linear, of: [b, b, a]}}}}\n"
    recipe.write_text(f"{text}save: {{tokenizer: base, chat_template: {template}}}\n", encoding="utf-8")
    run(plan(load_recipe(recipe), out=tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    wanted = {"auto": maker.TEMPLATES["a"], "b": maker.TEMPLATES["b"], "'{{ messages }}'": "{{ messages }}"}
    expected = wanted.get(template) or known(template)
    assert tokenizer.chat_template.strip() == expected.strip()
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["chat_template"] == tokenizer.chat_template
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi there"}]
    assert "Hi there" in tokenizer.apply_chat_template(talk, tokenize=False)

"""`transplant`: a model with the tokenizer of another, row by row against scikit-learn's pursuit, and loaded."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import orthogonal_mp
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import vocabulary_models as maker

from mergekit_lite import InputError, RecipeError, load_recipe, plan, run
from mergekit_lite.checkpoint.find import open_checkpoint
from mergekit_lite.plan.explain import as_json, summary
from mergekit_lite.vocabulary.shared import shared_tokens
from mergekit_lite.vocabulary.tokens import Reader, Tokens

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
K = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    before = torch.get_rng_state()
    bytes_, pieces = maker.byte_level(maker.prose(), 420), maker.sentencepiece(maker.code(), 800)
    maker.write(folder / "a", bytes_, 1)
    other = maker.byte_level(maker.code(), 500, special=("<|start|>", "</s>", "<s>"))
    maker.write(folder / "wide", other, 2, hidden=24, rows=512)
    maker.write(folder / "tied", pieces, 3, tied=True, hidden=20)
    maker.write(folder / "bert", maker.wordpiece(maker.prose(), 500), 4)
    maker.write(folder / "bert2", maker.wordpiece(maker.code(), 600), 5)
    torch.set_rng_state(before)
    return folder


def merge(models: Path, to: Path, of: str, vocabulary: str, more: str = "", **options: Any) -> Any:
    recipe = to.with_suffix(".yaml")
    named = ", ".join(f"{model.name}: {model}" for model in sorted(models.iterdir()))
    step = f"{{use: transplant, of: {of}, with: {{vocabulary: {vocabulary}, k: {K}}}}}"
    recipe.write_text(f"version: 1\nmodels: {{{named}}}\nsteps: {{m: {step}}}\n{more}", encoding="utf-8")
    made = plan(load_recipe(recipe), out=to)
    run(made, **options)
    return made


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path, file: str = "config.json") -> Any:
    return json.loads((folder / file).read_text(encoding="utf-8"))


def tokens(folder: Path) -> Tokens:
    found = Reader().read(folder.name, open_checkpoint(str(folder), None))
    assert found is not None
    return found


def check(made: Tensor, mine: Tensor, theirs: Tensor, atoms: Tensor, shared: dict[int, int]) -> None:
    """Shared rows bit for bit, others as scikit-learn's sums over the shared rows of `atoms`."""
    assert len(made) == len(atoms)
    there = sorted(shared)
    here = [shared[number] for number in there]
    assert torch.equal(made[there], mine[here])
    sums = [number for number in range(len(made)) if number not in shared]
    assert sums
    factors = orthogonal_mp(
        atoms[there].double().T.numpy(), theirs[sums].double().T.numpy(), n_nonzero_coefs=K, precompute=False
    )
    expected = torch.from_numpy(factors.T.copy()) @ mine[here].double().reshape(len(here), -1)
    torch.testing.assert_close(made[sums].double(), expected.reshape(made[sums].shape), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("of", "vocabulary", "sources"),
    [
        ("a", "wide", {EMBEDDING: EMBEDDING, HEAD: HEAD}),
        ("a", "tied", {EMBEDDING: EMBEDDING, HEAD: EMBEDDING}),
        ("tied", "wide", {EMBEDDING: EMBEDDING}),
        ("wide", "a", {EMBEDDING: EMBEDDING, HEAD: HEAD}),
        (
            "bert",
            "bert2",
            {
                "bert.embeddings.word_embeddings.weight": "bert.embeddings.word_embeddings.weight",
                "cls.predictions.bias": "bert.embeddings.word_embeddings.weight",
            },
        ),
    ],
)
def test_shared_rows_are_the_models_own_and_others_sums_of_them(
    of: str, vocabulary: str, sources: dict[str, str], models: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made = merge(models, out, of, vocabulary)
    mine, theirs, found = tensors(models / of), tensors(models / vocabulary), tensors(out)
    shared = shared_tokens(tokens(models / vocabulary), tokens(models / of))
    assert found.keys() == mine.keys() and all(torch.equal(found[k], mine[k]) for k in mine.keys() - sources.keys())
    for name, source in sources.items():
        check(found[name], mine[name], theirs[source], theirs[source], shared)
    view = as_json(made, 1)["steps"][0]["rows"]
    rows = len(theirs[next(iter(sources.values()))])
    assert view == {"shared": len(shared), "approximated": rows - len(shared), "zero": 0, "k": K}
    text = "\n".join(summary(made, 1))
    assert f"{len(shared)} rows of tokens shared with {vocabulary}, {rows - len(shared)} sums of at most {K}" in text


@pytest.mark.parametrize(("of", "vocabulary"), [("a", "wide"), ("a", "tied"), ("tied", "a")])
def test_the_result_has_the_tokenizer_and_loads(of: str, vocabulary: str, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(models, out, of, vocabulary)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (models / vocabulary / file).read_bytes()
    given, old = config(models / vocabulary), config(models / of)
    for file in ("config.json", "generation_config.json"):
        for key in ("bos_token_id", "eos_token_id"):
            assert config(out, file)[key] == given[key]
    assert config(out)["vocab_size"] == given["vocab_size"] and config(out)["hidden_size"] == old["hidden_size"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (of == "tied")
    for text in [*maker.prose()[:10], "naïve 東京 \U0001f600\t ok"]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    with torch.no_grad():
        made = model.generate(**tokenizer("The model", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert made.shape[1] > 2 and int(made.max()) < model.config.vocab_size


def test_a_masked_model_keeps_its_tied_head_and_its_bias(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(models, out, "bert", "bert2")
    model = AutoModelForMaskedLM.from_pretrained(out)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    inputs = AutoTokenizer.from_pretrained(out)("merge two models", return_tensors="pt")
    logits = model(**inputs).logits
    assert torch.isfinite(logits).all() and logits.shape[2] == 600


@pytest.mark.parametrize("name", ["a", "wide", "tied", "bert"])
def test_into_itself_changes_no_byte(name: str, models: Path, tmp_path: Path) -> None:
    """Rows beyond the tokens, which `wide` has, included."""
    out = tmp_path / "out"
    made = merge(models, out, name, name)
    mine, found = tensors(models / name), tensors(out)
    assert mine.keys() == found.keys() and all(torch.equal(mine[key], found[key]) for key in mine)
    assert all(tensor.copied for tensor in made.outputs[0].tensors)
    assert (out / "tokenizer.json").read_bytes() == (models / name / "tokenizer.json").read_bytes()


def test_threads_and_blocks_change_no_byte(models: Path, tmp_path: Path) -> None:
    found = set()
    options: tuple[dict[str, int], ...] = ({}, {"threads": 1, "block": 64}, {"threads": 3, "block": 1000})
    for number, given in enumerate(options):
        out = tmp_path / str(number)
        merge(models, out, "a", "wide", **given)
        found.add((out / "model.safetensors").read_bytes())
    assert len(found) == 1


def test_a_lock_makes_the_same_again_and_another_k_another_plan(models: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    made = merge(models, first, "a", "wide")
    assert not run(plan(load_recipe(first / "recipe.lock.yaml"), out=again)).changed
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    other = load_recipe(first / "recipe.yaml", ["steps.m.with.k=5"])
    assert plan(other, out=tmp_path / "other").digest != made.digest


def test_a_transplanted_model_merges_with_the_model_of_the_vocabulary(models: Path, tmp_path: Path) -> None:
    """What a step needs of another width is one vocabulary; here the other model has the same width, too."""
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    maker.write(folder / "same", maker.byte_level(maker.code(), 500), 6)
    out, alone = tmp_path / "out", tmp_path / "alone"
    merge(folder, alone, "a", "same")
    recipe = alone.with_suffix(".yaml").read_text(encoding="utf-8")
    mixed = tmp_path / "mixed.yaml"
    mixed.write_text(recipe.replace("steps: {", "steps: {l: {use: linear, of: [m, same]}, "), encoding="utf-8")
    run(plan(load_recipe(mixed), out=out))
    moved, same, found = tensors(alone), tensors(folder / "same"), tensors(out)
    assert all(torch.allclose(found[key], (moved[key] + same[key]) / 2, atol=1e-7) for key in found)
    assert (out / "tokenizer.json").read_bytes() == (folder / "same" / "tokenizer.json").read_bytes()


def test_the_memory_of_the_shared_rows_is_in_the_plan(models: Path, tmp_path: Path) -> None:
    """The rows of both tensors, held once, however many threads there are."""
    recipe = tmp_path / "r.yaml"
    merge(models, tmp_path / "r", "a", "wide")
    shared = shared_tokens(tokens(models / "wide"), tokens(models / "a"))
    plans = [plan(load_recipe(recipe), out=tmp_path / "x", threads=count) for count in (1, 2, 3)]
    peaks = [made.peak_bytes for made in plans]
    assert peaks[2] - peaks[1] == peaks[1] - peaks[0]
    assert peaks[0] - (peaks[1] - peaks[0]) == 2 * len(shared) * 24 * 4
    with pytest.raises(RecipeError, match="the rows that sums are found in"):
        plan(load_recipe(recipe), out=tmp_path / "x", memory="10MB")


def test_the_projects_recipe_runs(models: Path, tmp_path: Path) -> None:
    named = [f"models.small={models / 'a'}", f"models.donor={models / 'wide'}"]
    recipe = load_recipe(Path(__file__).parents[2] / "recipes/methods/transplant.yaml", named)
    run(plan(recipe, out=tmp_path / "out"))
    found, own = tensors(tmp_path / "out"), tensors(models / "a")
    assert found.keys() == own.keys() and found[HEAD].shape == (512, maker.HIDDEN)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


# What is refused


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("m: {use: transplant, of: a, with: {vocabulary: wide, k: 400}}", "tokens, fewer than `k` = 400"),
        ("m: {use: transplant, of: a, with: {vocabulary: wide, k: 0}}", "`k` must lie in"),
        ("m: {use: transplant, of: a, with: {vocabulary: nobody}}", "there is no model or step `nobody`"),
        ("m: {use: transplant, of: a}", "`transplant` needs `vocabulary`"),
        ("m: {use: transplant, of: [a, wide], with: {vocabulary: wide}}", "takes 1 input in `of`"),
        ("m: {use: transplant, of: a, base: wide, with: {vocabulary: wide}}", "takes no `base`"),
        ("m: {use: transplant, of: a, rest: wide, with: {vocabulary: wide}}", "takes no `rest`"),
        ("m: {use: transplant, of: a, with: {vocabulary: wide, k: {'*': 3, else: 4}}}", "one value for all tensors"),
        (
            "l: {use: passthrough, of: wide, with: {scale: 2}}, m: {use: transplant, of: a, with: {vocabulary: l}}",
            "`l` is a step, and has no tokenizer",
        ),
        (
            "d: {use: delta, of: a, base: a}, m: {use: transplant, of: d, with: {vocabulary: wide}}",
            "takes whole models, `d` is a delta",
        ),
        (
            "l: {use: linear, of: [m, wide]}, m: {use: transplant, of: a, with: {vocabulary: wide, k: 4}}",
            "different shapes",
        ),
    ],
)
def test_what_cannot_be_is_told_with_its_place(steps: str, message: str, models: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    named = ", ".join(f"{model.name}: {model}" for model in sorted(models.iterdir()))
    recipe.write_text(f"version: 1\nmodels: {{{named}}}\nsteps: {{{steps}}}\n", encoding="utf-8")
    with pytest.raises(RecipeError) as found:
        plan(load_recipe(recipe), out=tmp_path / "out")
    assert message in str(found.value) and "\n  --> " in str(found.value) and found.value.problems[0].hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "`wide` has no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "is no tokenizer"),
        (lambda folder: store(folder, float("nan")), "holds NaN or infinite numbers"),
        (lambda folder: bare(folder), "no tensor of `wide` has a row for every token"),
    ],
    ids=["none", "cut", "NaN", "no embedding"],
)
def test_a_model_that_cannot_give_its_vocabulary_is_told(
    change: Callable[[Path], Any], message: str, models: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    change(folder / "wide")
    with pytest.raises((InputError, RecipeError)) as found:
        merge(folder, tmp_path / "out", "a", "wide")
    assert message in str(found.value)
    assert not (tmp_path / "out").exists()


def store(folder: Path, number: float) -> None:
    held = tensors(folder)
    held[EMBEDDING][7, 3] = number
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def bare(folder: Path) -> None:
    held = {name: tensor for name, tensor in tensors(folder).items() if name not in (EMBEDDING, HEAD)}
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def test_a_vocabulary_for_all_models_and_a_transplant_exclude_each_other(models: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="brings all models to one vocabulary before any step"):
        merge(models, tmp_path / "out", "a", "wide", "save: {tokenizer: base}\n")
    merge(models, tmp_path / "out", "a", "wide", "save: {chat_template: chatml}\n")
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_tokens_beyond_the_rows_get_zeros_and_are_told(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    file = folder / "wide" / "tokenizer.json"
    maker.with_tokens(Tokenizer.from_file(str(file)), *(f"<extra{i}>" for i in range(20))).save(str(file))
    made = merge(folder, tmp_path / "out", "a", "wide")
    assert any("8 tokens beyond the rows" in warning.message for warning in made.warnings)
    assert torch.equal(tensors(tmp_path / "out")[EMBEDDING][512:], torch.zeros(8, maker.HIDDEN))

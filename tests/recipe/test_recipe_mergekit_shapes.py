"""Whatever people write for mergekit runs, or says why not: `mergekit_shapes.txt`, through the command line.

References with an adapter (`model+lora`) are not among the shapes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mergekit_models import BASE, MODELS, merged
from tokenizers import Tokenizer
from tokenizers import models as kinds
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

from mergekit_lite.cli.app import execute

FILE = Path(__file__).parent / "mergekit_shapes.txt"
SHAPES = re.findall(r"^=== (.*)\n((?s:.*?))^--- (.+)$", FILE.read_text(encoding="utf-8"), re.M)
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `a`, `b` and `c` below `llama` and `mistral`, in float32."""
    folder = tmp_path_factory.mktemp("shapes")
    for family, config in (("llama", LlamaConfig), ("mistral", MistralConfig)):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config(**SIZES, tie_word_embeddings=False))
        start = {name: value.clone() for name, value in model.named_parameters()}
        for name in ("base", "a", "b", "c"):
            if name != "base":
                with torch.no_grad():
                    for key, value in model.named_parameters():
                        value.copy_(start[key] + 0.02 * torch.randn(value.shape))
            model.save_pretrained(folder / family / name)
            words = [f"w{number}" for number in range(SIZES["vocab_size"] - 4)]
            tokens = ["<s>", "</s>", *words, "<|turn|>", "fox" if name == "b" else "<|end|>"]
            made = Tokenizer(kinds.BPE({token: number for number, token in enumerate(tokens)}, []))
            fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
            fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
            fast.save_pretrained(folder / family / name)
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small are multiplied faster by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "text", "comes"), SHAPES, ids=[name for name, *_ in SHAPES])
def test_a_shape_runs_or_says_why_not(
    name: str,
    text: str,
    comes: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(models)
    recipe, native, out, again = (tmp_path / part for part in ("their.yml", "native.yaml", "out", "again"))
    recipe.write_text(text, encoding="utf-8")
    code = execute(["run", str(recipe), "--out", str(out)])
    err = capsys.readouterr().err
    if comes.startswith("error: "):
        assert code == 3 and comes.removeprefix("error: ") in err and "\nhint: " in err
        assert str(recipe) in err and not out.exists()
        return
    assert code == 0, err
    found = re.fullmatch(r"(\d+) layers, (\d+) warnings", comes)
    assert found and err.count("warning: ") == int(found[2]), err

    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert model.config.num_hidden_layers == int(found[1])
    asked = re.findall(r"^(?:out_)?dtype: (\w+)$", text, re.M) or ["float32"]
    assert {value.dtype for value in model.parameters()} == {getattr(torch, asked[-1])}
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(5)[None]).logits).all()

    assert execute(["convert", str(recipe), "--out", str(native)]) == 0
    assert execute(["run", str(native), "--out", str(again)]) == 0
    ours, theirs = (sorted(folder.glob("*.safetensors")) for folder in (again, out))
    assert [file.read_bytes() for file in ours] == [file.read_bytes() for file in theirs]


def test_no_shape_is_lost() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert len(SHAPES) == len(re.findall("^=== ", text, re.M)) >= 50


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: multislerp\nmodels: [{model: ./a, parameters: {weight: 0.5}}]\n",
        "merge_method: multislerp\nmodels: [{model: ./a, parameters: {weight: 0}}]\nbase_model: ./base\n",
        "merge_method: nuslerp\nmodels: [{model: ./a, parameters: {weight: 0.5}}]\n",
        "merge_method: karcher\nmodels: [{model: ./a}]\n",
        "merge_method: slerp\nbase_model: ./a\nslices: [{sources: [{model: ./a, layer_range: [0, 4]}]}]\n"
        "parameters: {t: 0.5}\n",
        "merge_method: ties\nbase_model: ./a\nslices: [{sources: [{model: ./a, layer_range: [0, 4]}]}]\n"
        "parameters: {weight: 0.5}\n",
    ],
    ids=["multislerp", "multislerp of a change", "nuslerp", "karcher", "a slice of slerp", "the base alone"],
)
def test_one_model_alone_is_returned_as_it_is(text: str, tmp_path: Path) -> None:
    found = merged(tmp_path / "r.yaml", text)
    assert all(torch.equal(found[name], MODELS["a"][name]) for name in BASE)


def test_filter_wise_takes_rows_of_matrices_and_vectors_whole(tmp_path: Path) -> None:
    """A norm is one row; the shape of this recipe above has no bias and gives no warning of one."""
    text = (
        "merge_method: model_stock\nbase_model: ./base\nmodels: [{model: ./a}, {model: ./b}, {model: ./c}]\n"
        "parameters: {filter_wise: true}\n"
    )
    found = merged(tmp_path / "r.yaml", text)
    for name, base in BASE.items():
        deltas = [(MODELS[model][name] - base).double() for model in "abc"]
        cosine = sum(torch.cosine_similarity(x, y, dim=-1) for x, y in itertools.combinations(deltas, 2)) / 3
        assert isinstance(cosine, torch.Tensor)
        t = (3 * cosine / (1 + 2 * cosine)).unsqueeze(-1)
        torch.testing.assert_close(found[name].double(), base + t * sum(deltas) / 3, rtol=1e-5, atol=1e-5)

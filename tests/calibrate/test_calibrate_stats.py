"""`merge stats` on models of transformers: names as on disk, numbers worked out another way, wrong use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from calibrate_models import TEXT_FILE, write, write_classifier, write_inputs
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mergekit_lite.calibrate import measure
from mergekit_lite.calibrate.measure import Measurement, Settings
from mergekit_lite.cli.app import execute

Shown = tuple[int, str, str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("llama", "tied", "mixtral", "gpt2"):
        write(folder / kind, kind)
    write_classifier(folder / "classifier")
    write_inputs(folder / "inputs.safetensors")
    (folder / "text.txt").write_text(TEXT_FILE)
    return folder


@pytest.fixture
def stats(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`stats("llama", "--text", ...)` runs the command in a new folder, with the models beside it."""
    monkeypatch.chdir(tmp_path)
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)

    def run(*words: str, out: str = "s") -> Shown:
        capsys.readouterr()
        code = execute(["stats", *words, "--out", out, "--threads", "1"])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def metadata(path: str) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def blocks_of(folder: str, length: int) -> Tensor:
    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT_FILE, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)


def test_experts_and_routers_by_their_names_on_disk(stats: Callable[..., Shown]):
    """Layer 0 of a Mixtral, its router and its experts worked out in NumPy from the tensors on disk."""
    code, _, err = stats("mixtral", "--text", "text.txt", "--block", "8", "--collect", "gram,router", "--examples", "3")
    assert code == 0
    stored = load_file("mixtral/model.safetensors")
    grams, router = load_file("s/gram.safetensors"), load_file("s/router.safetensors")
    linear = {n for n, t in stored.items() if t.dim() == 2 and "embed" not in n}
    assert set(grams) == linear and len(grams) == 2 * (4 + 1 + 3 * 16) + 1
    assert all(grams[n].shape == (stored[n].shape[1],) * 2 and grams[n].dtype == torch.float32 for n in linear)

    ids = blocks_of("mixtral", 8)
    drawn = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:3]
    model = transformers.AutoModelForCausalLM.from_pretrained("mixtral")
    layer = model.model.layers[0]
    with torch.no_grad():
        start = model.model.embed_tokens(ids[drawn])
        attended = model.model(ids[drawn], output_hidden_states=True, use_cache=False)
        first = layer.input_layernorm(start)
        place = model.model.rotary_emb(start, torch.arange(8)[None])
        causal = torch.full((8, 8), -torch.inf).triu(1)[None, None]
        x = start + layer.self_attn(first, position_embeddings=place, attention_mask=causal)[0]
        x = layer.post_attention_layernorm(x).flatten(0, 1).double().numpy()
        assert len(attended.hidden_states) == 3
    rows = first.flatten(0, 1).double().numpy()
    np.testing.assert_allclose(
        grams["model.layers.0.self_attn.v_proj.weight"], rows.T @ rows / 24, rtol=1e-3, atol=1e-4
    )
    name = "model.layers.0.block_sparse_moe"
    scores = x @ stored[f"{name}.gate.weight"].double().numpy().T
    chosen = np.argsort(-scores, axis=1)[:, :2]
    np.testing.assert_allclose(router[f"{name}.gate.logits_gram"], scores.T @ scores, rtol=1e-3, atol=1e-5)
    usage = np.bincount(chosen.ravel(), minlength=16)
    assert router[f"{name}.gate.usage"].tolist() == usage.tolist() and int(router[f"{name}.gate.tokens"]) == 24
    assert router[f"{name}.gate.usage"].dtype == router[f"{name}.gate.tokens"].dtype == torch.int64
    assert router[f"{name}.gate.logits_gram"].dtype == torch.float64
    for expert in range(16):
        mine = x[(chosen == expert).any(axis=1)]
        w1, w3 = (stored[f"{name}.experts.{expert}.w{i}.weight"].double().numpy() for i in (1, 3))
        between = silu(mine @ w1.T) * (mine @ w3.T)
        for part, inputs in (("w1", mine), ("w3", mine), ("w2", between)):
            wanted = inputs.T @ inputs / max(len(mine), 1)
            got = grams[f"{name}.experts.{expert}.{part}.weight"].numpy()
            np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=1e-3 * max(np.abs(wanted).max(), 1e-9))
    # 24 tokens reach 48 places at most: some of 16 experts have none or few, and the file and the warning say which.
    counts = json.loads(metadata("s/gram.safetensors")["rows"])
    assert [counts[f"{name}.experts.{e}.w2.weight"] for e in range(16)] == usage.tolist()
    idle = [f"{name}.gate: expert {e}" for e in range(16) if not usage[e]]
    assert idle and set(idle) <= set(json.loads(metadata("s/router.safetensors")["unused"]))
    assert "no example reached" in err and "zeros" in err
    assert not grams[f"{name}.experts.{int(np.argmin(usage))}.w1.weight"].any()


def test_fisher_information_has_the_names_and_shapes_of_the_checkpoint(stats: Callable[..., Shown]):
    assert stats("mixtral", "--text", "text.txt", "--block", "8", "--collect", "fisher", "--examples", "2")[0] == 0
    stored, found = load_file("mixtral/model.safetensors"), load_file("s/fisher.safetensors")
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in stored.items()}
    assert all(t.dtype == torch.float32 and bool((t >= 0).all()) for t in found.values())


def test_fisher_information_of_a_classifier_by_other_gradients(stats: Callable[..., Shown]):
    """Exact over the classes, with padding cut off, against torch.func on the unpadded texts."""
    assert stats("classifier", "--data", "inputs.safetensors", "--collect", "fisher,confidence,gram")[0] == 0
    found = load_file("s/fisher.safetensors")
    model = transformers.BertForSequenceClassification.from_pretrained("classifier", attn_implementation="eager").eval()
    inputs = load_file("inputs.safetensors")
    name = "classifier.weight"
    total = torch.zeros(3, 32)
    sure = right = 0.0
    for ids, mask, label in zip(*(inputs[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):
        row = ids[mask == 1][None]

        def scores(weight: Tensor, row: Tensor = row) -> Tensor:
            return torch.func.functional_call(model, {name: weight}, (row,)).logits[0].log_softmax(dim=0)

        weight = model.state_dict()[name]
        shares = scores(weight).exp().detach()
        slopes = torch.func.jacrev(scores)(weight)
        total += (shares[:, None, None] * slopes**2).sum(dim=0).detach() / 6
        sure += float(shares.max()) / 6
        right += float(shares.argmax() == label) / 6
    torch.testing.assert_close(found[name], total, rtol=1e-3, atol=1e-6)
    confidence = load_file("s/confidence.safetensors")
    assert float(confidence["confidence"]) == pytest.approx(sure, rel=1e-4)
    assert float(confidence["accuracy"]) == pytest.approx(right)
    assert json.loads(metadata("s/gram.safetensors")["rows"])["classifier.weight"] == 6
    assert json.loads(metadata("s/gram.safetensors")["rows"])["bert.encoder.layer.0.output.dense.weight"] == 6 * 9 - 5


def test_a_tied_head_has_no_gram_matrix_and_one_fisher_information(stats: Callable[..., Shown]):
    code, _, err = stats("tied", "--text", "text.txt", "--block", "16", "--collect", "gram,fisher", "--examples", "2")
    assert code == 0 and "`lm_head.weight`: tied to `model.embed_tokens.weight`" in err
    assert len(load_file("s/gram.safetensors")) == 7
    assert set(load_file("s/fisher.safetensors")) == set(load_file("tied/model.safetensors"))
    assert "lm_head.weight" in json.loads(metadata("s/gram.safetensors")["skipped"])


def test_regmean_with_weights_stored_as_in_by_out(stats: Callable[..., Shown], tmp_path: Path):
    """GPT-2, through files and recipe, against the normal equations of x W in NumPy."""
    write(tmp_path / "other", "gpt2", seed=1)
    for model in ("gpt2", "other"):
        assert stats(model, "--text", "text.txt", "--block", "16", out=f"s_{model}")[0] == 0
    Path("r.yaml").write_text(
        "version: 1\ncompute: float64\nmodels: {a: ./gpt2, b: ./other, ga: ./s_gpt2/gram.safetensors, "
        "gb: ./s_other/gram.safetensors}\nsteps: {m: {use: regmean, of: {a: {gram: ga}, b: {gram: gb}}, "
        "with: {alpha: 1, ridge: 0.01}}}\nsave: {to: out, dtype: float64}\n"
    )
    assert execute(["run", "r.yaml"]) == 0
    out = load_file("out/model.safetensors")
    parents = [load_file(f"{model}/model.safetensors") for model in ("gpt2", "other")]
    grams = [load_file(f"s_{model}/gram.safetensors") for model in ("gpt2", "other")]
    assert set(grams[0]) == {
        f"transformer.h.{i}.{n}.weight"
        for i in range(2)
        for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    for name in grams[0]:
        first, second = (gram[name][0].double().numpy() for gram in grams)
        one, two = (parent[name].double().numpy() for parent in parents)
        pull = 0.01 * np.trace(first + second) / len(first)
        left = first + second + pull * np.eye(len(first))
        wanted = np.linalg.solve(left, first @ one + second @ two + pull * (one + two) / 2)
        np.testing.assert_allclose(out[name].numpy(), wanted, rtol=1e-6, atol=1e-9)
        assert np.abs(wanted - (one + two) / 2).max() > 1e-3, name


def test_hidden_states_and_activations(stats: Callable[..., Shown]):
    """Prompts by line: the mean over a prompt's tokens of what goes into each layer."""
    Path("prompts.txt").write_text("the quick fox\n\nweights add up\n")
    words = ("llama", "--text", "prompts.txt", "--lines", "--collect", "hidden,activations")
    assert stats(*words)[0] == 0
    found = load_file("s/hidden.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained("llama").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("llama")
    means, outputs = [], []
    for line in ("the quick fox", "weights add up"):
        with torch.no_grad():
            ids = tokenizer(line, return_tensors="pt")["input_ids"]
            x = model.model.embed_tokens(ids)
            rest = model.model(ids, output_hidden_states=True).hidden_states[1]
            outputs.append(model.model.layers[0].self_attn.q_proj(model.model.layers[0].input_layernorm(x))[0])
        means.append(torch.stack([x[0].mean(dim=0), rest[0].mean(dim=0)]))
    torch.testing.assert_close(found["hidden_states"], torch.stack(means), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["mean"], torch.stack(means).mean(dim=0), rtol=1e-4, atol=1e-6)
    activations = load_file("s/activations.safetensors")
    both = torch.cat(outputs).double()
    name = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(activations[f"{name}.mean"], both.mean(dim=0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(activations[f"{name}.variance"], both.var(dim=0, correction=0), rtol=1e-4, atol=1e-6)


ALL = ("--collect", "gram,fisher,router,activations,hidden,confidence")


def test_the_same_command_gives_the_same_bytes_and_says_where_they_come_from(stats: Callable[..., Shown]):
    words = ("mixtral", "--text", "text.txt", "--block", "8", "--examples", "2", *ALL)
    for out in ("s", "again"):
        assert stats(*words, out=out)[0] == 0
    assert stats(*words, "--seed", "1", out="other")[0] == 0
    files = sorted(path.name for path in Path("s").iterdir())
    assert len(files) == 6
    assert all(Path("s", f).read_bytes() == Path("again", f).read_bytes() for f in files)
    assert all(Path("s", f).read_bytes() != Path("other", f).read_bytes() for f in files)
    for file in files:
        said = metadata(f"s/{file}")
        assert said["format"] == "mergekit_lite statistics 1" and said["kind"] == file.removesuffix(".safetensors")
        assert (said["examples"], said["tokens"], said["block"], said["data"]) == ("2", "16", "8", "text.txt")
        assert json.loads(said["model_digests"])["model.safetensors"].startswith("blake3:")
        assert said["data_digest"].startswith("blake3:") and "torch" in json.loads(said["versions"])


def test_gram_matrices_in_several_passes_are_the_same(stats: Callable[..., Shown], monkeypatch: pytest.MonkeyPatch):
    words = ("mixtral", "--text", "text.txt", "--block", "8", "--examples", "2", "--collect", "gram,router", "--json")
    assert json.loads(stats(*words)[1])["passes"] == 1
    whole = json.loads(stats(*words, out="whole")[1])["memory"]
    room = whole["at_once"] - whole["grams"] // 2
    weights = Path("mixtral/model.safetensors").stat().st_size
    free = iter([room + weights, room])  # before the weights are read, and after
    monkeypatch.setattr(measure, "free_memory", lambda budget: next(free))
    code, out, err = stats(*words, out="parts")
    assert code == 0 and json.loads(out)["passes"] > 1 and "passes, since the Gram matrices take" in err
    for file in ("gram.safetensors", "router.safetensors"):
        assert Path("s", file).read_bytes() == Path("parts", file).read_bytes()
    monkeypatch.setattr(measure, "free_memory", lambda budget: 10_000)
    code, _, err = stats(*words, out="none")
    assert code == 5 and "the statistics need about" in err and "10.0 kB are free" in err and not Path("none").exists()


def test_ctrl_c_leaves_nothing(models: Path, tmp_path: Path):
    settings = Settings(("gram", "fisher"), text=models / "text.txt", block=16)
    measurement = Measurement(str(models / "llama"), settings, tmp_path / "s")

    def stop(examples: int) -> None:
        assert list(tmp_path.iterdir())  # work has begun
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measurement.run(stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, code, said",
    [
        ("llama", 2, "data come from `--text` or from `--data`"),
        ("llama --text text.txt --data inputs.safetensors", 2, "data come from `--text` or from `--data`"),
        ("llama --text text.txt --collect grams", 2, "there are no statistics `grams` hint: did you mean `gram`?"),
        ("llama --text none.txt", 4, "cannot read `none.txt`"),
        ("llama --text empty.txt", 4, "`empty.txt` is empty"),
        ("llama --text binary.txt", 4, "is no text in UTF-8"),
        ("llama --text short.txt", 4, "`short.txt` has 5 tokens, less than one block of 512"),
        ("gpt2 --text text.txt --block 65", 2, "the model takes 64 tokens, not 65"),
        ("llama --text text.txt --collect router", 4, "`LlamaForCausalLM` has no routers of experts"),
        ("bare --text text.txt --collect fisher", 4, "`LlamaModel` gives no logits: it has no head"),
        ("headless --text text.txt", 4, "lacks weights that `LlamaForCausalLM` needs: `lm_head.weight`"),
        ("untold --text text.txt", 4, "`untold` has no tokenizer"),
        ("foreign --text text.txt", 4, "transformers cannot load `foreign`"),
        ("quantised --text text.txt", 4, "`quantised` is quantised"),
        ("classifier --text text.txt", 4, "`classifier` has no tokenizer"),
        ("llama/model.safetensors --text text.txt", 4, "is one file hint: give the folder"),
        ("classifier --data wrong.safetensors", 4, "holds `pixels`, which the model does not take"),
        ("classifier --data uneven.npz", 4, "holds tensors of 2 and 3 examples"),
        ("classifier --data text.txt", 4, "is neither .safetensors nor .npz"),
        ("classifier --data pickle.npz", 4, "`pickle.npz` is damaged"),
        ("classifier --data inputs.safetensors --device gpu", 2, "there is no device `gpu`"),
        ("llama --text text.txt --device-map all", 2, "there is no device map `all`"),
    ],
)
def test_wrong_use_says_so_and_writes_nothing(words: str, code: int, said: str, stats: Callable[..., Shown]):
    _wrong_files(Path())
    before = sorted(Path().iterdir())
    got, _, err = stats(*words.split())
    assert got == code, err
    assert said in " ".join(err.split()), err
    assert sorted(Path().iterdir()) == before
    assert not Path("ran").exists()


def _wrong_files(here: Path) -> None:
    """Faulty texts, inputs and models, made from those that are there."""
    (here / "empty.txt").write_text(" \n")
    (here / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (here / "short.txt").write_text("the quick fox")
    from safetensors.torch import save_file

    save_file({"pixels": torch.ones(2, 3)}, here / "wrong.safetensors")
    np.savez(here / "uneven.npz", input_ids=np.ones((2, 3), dtype=int), labels=np.ones(3, dtype=int))
    np.savez(here / "pickle.npz", input_ids=np.array([{}], dtype=object))
    config = json.loads((here / "llama/config.json").read_text())
    weights = load_file(here / "llama/model.safetensors")
    bare = {n.removeprefix("model."): t for n, t in weights.items() if n != "lm_head.weight"}
    headless = {n: t for n, t in weights.items() if n != "lm_head.weight"}
    made: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
        "bare": ({"architectures": ["LlamaModel"]}, bare),
        "headless": ({}, headless),
        "untold": ({}, weights),
        "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, weights),
        "foreign": ({"model_type": "novel", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}, weights),
    }
    for name, (changes, tensors) in made.items():
        (here / name).mkdir()
        save_file(tensors, here / name / "model.safetensors", {"format": "pt"})
        (here / name / "config.json").write_text(json.dumps(config | changes))
        if name != "untold":
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (here / name / file).write_bytes((here / "llama" / file).read_bytes())
    (here / "foreign" / "code.py").write_text("open('ran', 'w')\n")


def test_nothing_is_overwritten(stats: Callable[..., Shown]):
    Path("s").mkdir()
    code, _, err = stats("llama", "--text", "text.txt", "--block", "16")
    assert code == 2 and "`s` exists" in err and not list(Path("s").iterdir())

"""Weights learned from texts and model inputs, for models of transformers: gradients against autograd through the
network, the command, wrong use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from calibrate_models import TEXT_FILE, write, write_classifier, write_inputs
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

from mergekit_lite import choose
from mergekit_lite.calibrate.learn import NetworkLoss, network_loss
from mergekit_lite.calibrate.measure import Settings
from mergekit_lite.cli.app import execute
from mergekit_lite.evaluate.template import Template
from mergekit_lite.evaluate.weights import Weights, open_step
from mergekit_lite.family.family import family_of

Shown = tuple[int, str, str]
SOUP = "{use: linear, of: {learned: [a, b, c]BESIDE}}"
FACTORS = "{use: task_arithmetic, base: a, of: {learned: [b, c], loss: entropyBESIDE}, with: {lambda: 0.3}}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("tied", "mixtral", "gpt2"):
        for seed, name in enumerate("abc"):
            write(folder / f"{kind}-{name}", kind, seed)
    for seed, name in enumerate("abc"):
        write_classifier(folder / f"classifier-{name}")
        path = folder / f"classifier-{name}" / "model.safetensors"
        draw = torch.Generator().manual_seed(seed)
        tensors = {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    write_inputs(folder / "inputs.safetensors")
    (folder / "text.txt").write_text(TEXT_FILE, encoding="utf-8")
    return folder


@pytest.fixture
def recipe(models: Path, tmp_path: Path) -> Callable[..., Path]:
    def one(kind: str, step: str, beside: str = "", more: str = "") -> Path:
        named = json.dumps({name: str(models / f"{kind}-{name}") for name in "abc"})
        path = tmp_path / "r.yaml"
        text = f"version: 1\nmodels: {named}\nsteps: {{m: {step.replace('BESIDE', beside)}}}\n"
        path.write_text(f"{text}save: {{to: {tmp_path / 'out'}}}\n{more}", encoding="utf-8")
        return path

    return one


def mixed_by_hand(models: Path, kind: str, raw: Tensor, groups: dict[str, list[str]], soup: bool) -> dict[str, Tensor]:
    """The mix of all models by the names of the checkpoint."""
    a, b, c = (load_file(models / f"{kind}-{name}" / "model.safetensors") for name in "abc")
    made = {}
    for row, names in zip(raw, groups.values(), strict=True):
        for n in names:
            x, y, z = a[n].double(), b[n].double(), c[n].double()
            s = row.softmax(0) if soup else row
            made[n] = s[0] * x + s[1] * y + s[2] * z if soup else x + s[0] * (y - x) + s[1] * (z - x)
    return made


def by_network_names(network: torch.nn.Module, loss: NetworkLoss, mixed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fused experts of the network, put together of the checkpoint's; other tensors by the names alike."""
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    parts: dict[str, list[tuple[tuple[int, int], str]]] = {}
    for name, place in loss._places.items():
        parts.setdefault(place.tensor, []).append(((place.expert, place.start), name))
    for tensor, found in parts.items():
        names = [name for _, name in sorted(found)]
        if len(names) == 1:
            state[tensor] = mixed[names[0]]
        else:
            per = len(names) // len(state[tensor])
            rows = [torch.cat([mixed[n] for n in names[i : i + per]]) for i in range(0, len(names), per)]
            state[tensor] = torch.stack(rows)
    return state


@pytest.mark.parametrize(
    ("kind", "step", "by"),
    [
        ("tied", SOUP, "layer"),
        ("tied", FACTORS, "model"),
        ("mixtral", SOUP, "layer"),
        ("mixtral", FACTORS, "tensor"),
        ("gpt2", SOUP, "model"),
    ],
)
def test_the_gradient_is_that_of_autograd_through_the_network(
    models: Path, recipe: Callable[..., Path], kind: str, step: str, by: str
) -> None:
    template = Template(recipe(kind, step, f", by: {by}", "compute: float64\n"))
    opened = open_step(template)
    soup = opened.factor is None
    with choose._ingredients(template.first, opened, choose.planner(threads=1), None, 1) as ingredients:
        settings = Settings((), text=models / "text.txt", block=12, examples=3)
        loss = network_loss(ingredients, opened, settings)
        donor = ingredients.plan.checkpoints["a"]
        weights = Weights(opened, list(ingredients.shapes), family_of(donor.config, ingredients.shapes))
        torch.manual_seed(3)
        weights.raw += torch.randn_like(weights.raw)
        ingredients.mix(weights.factors(), loss.tensors)
        if soup:
            with torch.no_grad():
                loss.also[0].fill_(1.5)
        value, slopes = loss.slopes(range(3))
        found = weights.gradient(ingredients.products(slopes))
        network = loss._network
        batches = loss._batches
        leaf = weights.raw.clone().requires_grad_()
        state = by_network_names(network, loss, mixed_by_hand(models, kind, leaf, weights.groups, soup))
        if kind == "tied":
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        if kind == "gpt2":
            state["lm_head.weight"] = state["transformer.wte.weight"]
        beta = torch.tensor(1.5, requires_grad=True)
        logits = [functional_call(network, state, (), {"input_ids": b["input_ids"]}).logits for b in batches]
        if soup:
            pairs = [(x[0, :-1] * beta, b["labels"][0, 1:]) for x, b in zip(logits, batches, strict=True)]
            wanted = torch.cat([torch.nn.functional.cross_entropy(x, y, reduction="none") for x, y in pairs]).mean()
            by_leaf, by_beta = torch.autograd.grad(wanted, [leaf, beta])
            torch.testing.assert_close(loss.also[0].grad, by_beta, rtol=1e-4, atol=1e-6)
        else:
            flat = torch.cat([x[0] for x in logits])
            wanted = torch.distributions.Categorical(logits=flat).entropy().mean()
            (by_leaf,) = torch.autograd.grad(wanted, [leaf])
    assert value == pytest.approx(float(wanted.detach()), rel=1e-6)
    torch.testing.assert_close(found, by_leaf, rtol=1e-5, atol=1e-9)


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Shown]:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Shown:
        capsys.readouterr()
        code = execute(["search", "r.yaml", *words, "--threads", "1"])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def test_the_command_learns_a_soup_of_language_models_that_runs(
    models: Path, tmp_path: Path, recipe: Callable[..., Path], search: Callable[..., Shown]
) -> None:
    recipe("tied", SOUP, ", by: layer, epochs: 3")
    words = ["--text", str(models / "text.txt"), "--block", "24", "--examples", "8"]
    code, out, err = search(*words, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert set(told["weights"]) == {"model.embed_tokens.weight", "model.layers.0.*", "model.norm.weight"}
    assert told["better"] and told["after"] < told["before"] and len(told["epochs"]) == 3
    assert (tmp_path / "r.search" / "best.yaml").read_text(encoding="utf-8") == told["recipe"]
    code, again, _ = search(*words)
    assert "model.layers.0.*" in again and "3 epochs" in again and "r.search/best.yaml" in again
    assert (
        json.loads((tmp_path / "r.search" / "learned.json").read_text(encoding="utf-8"))["weights"] == told["weights"]
    )
    assert execute(["run", "r.search/best.yaml"]) == 0
    a, b, c = (load_file(models / f"tied-{name}" / "model.safetensors") for name in "abc")
    made = load_file(tmp_path / "out" / "model.safetensors")
    s = told["weights"]["model.layers.0.*"]
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(made[name], s[0] * a[name] + s[1] * b[name] + s[2] * c[name])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_command_adapts_a_classifier_without_its_labels(
    models: Path, tmp_path: Path, recipe: Callable[..., Path], search: Callable[..., Shown]
) -> None:
    recipe("classifier", FACTORS, ", epochs: 6, rate: 0.01")
    data = load_file(models / "inputs.safetensors")
    found = []
    for labels in (data["labels"], 2 - data["labels"]):
        save_file({**data, "labels": labels}, tmp_path / "d.safetensors")
        code, out, err = search("--data", "d.safetensors", "--json")
        assert code == 0, err
        found.append(json.loads(out))
    assert found[0] == found[1] and found[0]["after"] < found[0]["before"]


@pytest.mark.parametrize(
    ("kind", "step", "words", "code", "said"),
    [
        ("tied", SOUP, [], 2, "data come from `--text` or from `--data`"),
        ("tied", SOUP, ["--text", "TEXT", "--data", "DATA"], 2, "give one of the two"),
        ("tied", SOUP, ["--text", "TEXT", "--trials", "5"], 2, "`--trials` does not go with this recipe"),
        ("tied", SOUP, ["--text", "TEXT", "--sampler", "tpe"], 2, "without trials"),
        ("tied", SOUP, ["--text", "TEXT", "--score", "s {model}", "--goal", "max"], 3, "not by a score"),
        ("tied", SOUP, ["--text", "nowhere.txt"], 4, "nowhere.txt"),
        ("tied", SOUP, ["--text", "TEXT", "--block", "5000"], 2, "the model takes"),
        ("tied", "{use: ties, base: a, of: {learned: [b, c]}}", ["--text", "TEXT"], 3, "no weighted sum"),
        ("tied", "{use: linear, of: {greedy: [a, b]}}", ["--text", "TEXT"], 2, "a score takes no data"),
        ("classifier", SOUP, ["--data", "UNLABELLED"], 4, "needs labels"),
        ("tied", SOUP, ["--data", "SHORT"], 4, "do not fit logits"),
    ],
)
def test_wrong_use_is_told(
    models: Path, tmp_path: Path, recipe: Callable[..., Path], search: Callable[..., Shown],
    kind: str, step: str, words: list[str], code: int, said: str,
) -> None:  # fmt: skip
    recipe(kind, step)
    data = load_file(models / "inputs.safetensors")
    save_file({n: t for n, t in data.items() if n != "labels"}, tmp_path / "u.safetensors")
    files = {"TEXT": "text.txt", "DATA": "inputs.safetensors", "SHORT": "inputs.safetensors"}
    paths = {word: str(models / name) for word, name in files.items()} | {"UNLABELLED": "u.safetensors"}
    found, _, err = search(*(paths.get(word, word) for word in words))
    assert found == code and said in err, (found, err)
    assert not (tmp_path / "r.search").exists()

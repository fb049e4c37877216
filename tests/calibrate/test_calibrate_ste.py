"""Permutations learned from data for models of transformers: a planted order that weight matching misses, the merge
that comes of it, gradients against autograd, wrong use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from calibrate_models import CONFIGS, TEXT_FILE, write
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file
from tiny_models import COMMON
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import mergekit_lite
from mergekit_lite import choose
from mergekit_lite.calibrate.learn import loss_of
from mergekit_lite.calibrate.measure import Settings
from mergekit_lite.cli.app import execute
from mergekit_lite.errors import RecipeError
from mergekit_lite.evaluate.order import bridged, open_order, unmoved
from mergekit_lite.evaluate.template import Template

UNITS, DEAD, MARGIN = 6, 8, 1.02
LAYER = "bert.encoder.layer.0."
UP, BIAS, DOWN = LAYER + "intermediate.dense.weight", LAYER + "intermediate.dense.bias", LAYER + "output.dense.weight"
NORM = LAYER + "attention.output.LayerNorm."
MLP = "model.layers.0.mlp."
Command = Callable[..., tuple[int, str, str]]


def plant(folder: Path) -> list[int]:
    """Two classifiers that compute the same, the second with its hidden units in another order, which is returned, and
    labels that the first gives. Some weights of the units meet inputs that are always 0, and lead weight matching to
    an order with three units in each other's place: they count a little more than all weights that do something."""
    draw = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    torch.manual_seed(1)
    config = transformers.BertConfig(**{**COMMON, "intermediate_size": UNITS}, num_hidden_layers=1, num_labels=3)
    for name in "ab":
        transformers.BertForSequenceClassification(config).save_pretrained(folder / f"classifier-{name}")
    first = load_file(folder / "classifier-a" / "model.safetensors")
    for name, scale in ((UP, 1.0), (DOWN, 1.0), ("classifier.weight", 1.0), ("bert.pooler.dense.weight", 0.3)):
        first[name] = scale * drawn(*first[name].shape)
    for name in ("weight", "bias"):
        first[NORM + name][:DEAD] = 0
    order = torch.randperm(UNITS, generator=draw)
    cycle = torch.tensor([1, 2, 0, *range(3, UNITS)])

    def lost(rows: Tensor) -> float:
        return float((rows * rows).sum() - (rows * rows[cycle]).sum())

    dead = drawn(UNITS, DEAD)
    dead *= (MARGIN * (lost(first[UP][:, DEAD:]) + lost(first[DOWN].T)) / lost(dead)) ** 0.5
    first[UP][:, :DEAD] = dead
    second = {name: tensor.clone() for name, tensor in first.items()}
    second[UP][:, :DEAD] = dead[cycle]
    second |= {UP: second[UP][order], BIAS: second[BIAS][order], DOWN: second[DOWN][:, order].contiguous()}
    for name, tensors in (("a", first), ("b", second)):
        save_file(tensors, folder / f"classifier-{name}" / "model.safetensors", {"format": "pt"})
    ids = torch.randint(3, 64, (96, 6), generator=draw)
    network = transformers.BertForSequenceClassification.from_pretrained(folder / "classifier-a").eval()
    with torch.no_grad():
        save_file({"input_ids": ids, "labels": network(ids).logits.argmax(1)}, folder / "data.safetensors")
    return [int(i) for i in order]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "order.json").write_text(json.dumps(plant(folder)), encoding="utf-8")
    first = load_file(write(folder / "tied-a", "tied") / "model.safetensors")
    write(folder / "tied-b", "tied")
    draw = torch.Generator().manual_seed(2)
    order = torch.randperm(CONFIGS["tied"]().intermediate_size, generator=draw)
    second = {name: tensor + 0.01 * torch.randn(tensor.shape, generator=draw) for name, tensor in first.items()}
    second |= {MLP + name: second[MLP + name][order] for name in ("up_proj.weight", "gate_proj.weight")}
    second[MLP + "down_proj.weight"] = second[MLP + "down_proj.weight"][:, order].contiguous()
    save_file(second, folder / "tied-b" / "model.safetensors", {"format": "pt"})
    (folder / "text.txt").write_text(TEXT_FILE, encoding="utf-8")
    return folder


def write_recipe(models: Path, folder: Path, kind: str, given: str, mean: str = "", more: str = "") -> Path:
    """`given` stands under `with`, a line of its own."""
    named = json.dumps({name: str(models / f"{kind}-{name}") for name in "ab"})
    path = folder / "r.yaml"
    path.write_text(
        f"version: 1\nmodels: {named}\nsteps:\n"
        f"  moved: {{use: permute, of: b, with: {{spaces: [mlp],\n    {given}}}}}\n"
        f"  mean: {mean or '{use: linear, of: [a, moved]}'}\nsave: {{step: mean, to: {folder / 'out'}}}\n{more}",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = execute([*words, "--threads", "1"])
        return code, *capsys.readouterr()

    return run


@torch.no_grad()
def classifier_loss(folder: Path, data: Path, entropy: bool = False) -> float:
    network = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    held = load_file(data)
    logits = network(held["input_ids"]).logits
    if entropy:
        return float(torch.distributions.Categorical(logits=logits).entropy().mean())
    return float(cross_entropy(logits, held["labels"]))


def test_it_finds_the_planted_order_that_weight_matching_misses(models: Path, tmp_path: Path, command: Command) -> None:
    data = models / "data.safetensors"
    write_recipe(models, tmp_path, "classifier", "like: a")
    assert command("run", "r.yaml", "--out", "matched")[0] == 0
    write_recipe(models, tmp_path, "classifier", "from: {learned: ste, steps: 20, rate: 1}")
    code, out, err = command("search", "r.yaml", "--data", str(data), "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["after"] < told["before"] and 0 < told["step"] <= told["steps"] == 20
    (found,) = load_arrays(tmp_path / "r.search" / "permutations.safetensors").values()
    planted = json.loads((models / "order.json").read_text(encoding="utf-8"))
    assert [planted[i] for i in found] == list(range(UNITS))
    assert command("run", "r.search/best.yaml")[0] == 0
    assert classifier_loss(tmp_path / "matched", data) == pytest.approx(told["before"], rel=1e-5)
    assert classifier_loss(tmp_path / "out", data) == pytest.approx(told["after"], rel=1e-5)
    text = (tmp_path / "r.search" / "best.yaml").read_text(encoding="utf-8")
    assert text == told["recipe"] and text.startswith("# Learned by `merge search r.yaml`: loss ")
    assert json.loads(command("search", "r.yaml", "--data", str(data), "--json")[1]) == told


def test_entropy_asks_for_no_labels(models: Path, tmp_path: Path, command: Command) -> None:
    held = load_file(models / "data.safetensors")
    save_file({"input_ids": held["input_ids"]}, tmp_path / "bare.safetensors")
    write_recipe(models, tmp_path, "classifier", "from: {learned: ste, steps: 3, rate: 0.5, loss: entropy}")
    code, out, err = command("search", "r.yaml", "--data", "bare.safetensors", "--json")
    assert code == 0, err
    assert command("run", "r.search/best.yaml")[0] == 0
    told = json.loads(out)
    assert told["after"] <= told["before"]
    merged = classifier_loss(tmp_path / "out", tmp_path / "bare.safetensors", entropy=True)
    assert merged == pytest.approx(told["after"], rel=1e-5)


def test_what_weight_matching_finds_is_kept_where_nothing_is_better(
    models: Path, tmp_path: Path, command: Command
) -> None:
    write_recipe(models, tmp_path, "tied", "from: {learned: ste, steps: 2}")
    words = ("--text", str(models / "text.txt"), "--block", "16", "--examples", "3")
    code, out, err = command("search", "r.yaml", *words)
    assert code == 0, err
    assert "layers.0.mlp" in out and "after step 0 of 2" in out and "those of weight matching" in err
    assert command("run", "r.search/best.yaml")[0] == 0
    made = load_file(tmp_path / "out" / "model.safetensors")
    first = load_file(models / "tied-a" / "model.safetensors")
    for name in first:  # half of the noise remains, where the units are in their places
        assert float((made[name] - first[name]).abs().max()) < 0.03


@pytest.mark.parametrize("kind", ["classifier", "tied"])
def test_the_gradient_of_the_bridge_is_that_of_autograd_through_the_network(
    models: Path, tmp_path: Path, kind: str
) -> None:
    path = write_recipe(models, tmp_path, kind, "from: {learned: ste}", more="compute: float64\n")
    template = Template(path)
    recipe, mean = unmoved(template.first, open_order(template))
    given = {"data": models / "data.safetensors"} if kind == "classifier" else {"text": models / "text.txt"}
    settings = Settings((), **given, block=12, examples=3)  # type: ignore[arg-type]
    with choose._inputs(recipe, mean, False, choose.planner(threads=1), None, 1) as ingredients:
        loss = loss_of(ingredients, "labels", settings)
    torch.manual_seed(3)
    state = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in loss.tensors.items()}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    (3 * bridged(loss, leaves, range(loss.units)).square()).backward()
    twins = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    whole = {**twins, "lm_head.weight": twins["model.embed_tokens.weight"]} if kind == "tied" else twins
    sums, count = torch.zeros((), dtype=torch.float64), 0
    for batch in loss._batches:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits, labels = functional_call(loss._network, whole, (), inputs).logits, batch["labels"]
        if kind == "tied":
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        sums, count = sums + cross_entropy(logits, labels, reduction="sum"), count + len(labels)
    (3 * (sums / count).square()).backward()
    for name, leaf in leaves.items():
        wanted = twins[name].grad
        wanted = torch.zeros_like(leaf) if wanted is None else wanted
        # Llama takes its norms in float32.
        torch.testing.assert_close(leaf.grad, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "mean", "more", "line", "said"),
    [
        ("from: {learned: ste, by: layer}", "", "", 5, "`learned` has no key `by` beside it"),
        ("from: {learned: [a, b]}", "", "", 5, "permutations are learned by `ste`, not a list"),
        ("from: {learned: ste, steps: 0}", "", "", 5, "`steps` must be a whole number above 0"),
        ("from: {learned: ste, rate: -1}", "", "", 5, "`rate` must be a number above 0"),
        ("from: {learned: ste, loss: mse}", "", "", 5, "`loss` is labels or entropy"),
        ("from: {learned: ste}, like: a", "", "", 4, "needs one of `like`"),
        ("from: {learned: ste}, cost: cosine", "", "", 5, "`cost` does not go with permutations that are learned"),
        ("from: {learned: ste}, seed: {choice: [1, 2]}", "", "", 5, "no other hole beside"),
        ("from: {learned: ste}", "{use: slerp, of: [a, moved], with: {t: 0.5}}", "", 6, "the mean of two networks"),
        ("from: {learned: ste}", "{use: linear, of: [a, b, moved]}", "", 6, "the mean of two networks"),
        ("from: {learned: ste}", "{use: linear, of: {a: {weight: 2}, moved: {weight: 1}}}", "", 6, "the plain mean"),
        ("from: {learned: ste}", "", "score: {command: 's {model}', goal: max}\n", 8, "not by a score"),
        ("from: {learned: ste}, family: nowhere.yaml", "", "", 5, "nowhere.yaml"),
    ],
)
def test_a_wrong_recipe_is_told_at_its_line(
    models: Path, tmp_path: Path, command: Command, given: str, mean: str, more: str, line: int, said: str
) -> None:
    write_recipe(models, tmp_path, "tied", given, mean, more)
    code, _, err = command("search", "r.yaml", "--text", str(models / "text.txt"))
    assert code == 3 and said in err and f"r.yaml:{line}:" in err, err
    assert not (tmp_path / "r.search").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "data come from `--text` or from `--data`"),
        (["--data", "bare.safetensors", "--trials", "3"], 2, "permutations are learned, without trials"),
        (["--data", "bare.safetensors"], 4, "needs labels"),
        (["--data", "nowhere.safetensors"], 4, "nowhere.safetensors"),
        (["--data", "other.safetensors"], 4, "the network knows 3 classes"),
    ],
)
def test_wrong_data_are_told(
    models: Path, tmp_path: Path, command: Command, words: list[str], code: int, said: str
) -> None:
    held = load_file(models / "data.safetensors")
    save_file({"input_ids": held["input_ids"]}, tmp_path / "bare.safetensors")
    save_file({**held, "labels": held["labels"] + 3}, tmp_path / "other.safetensors")
    write_recipe(models, tmp_path, "classifier", "from: {learned: ste}")
    found, _, err = command("search", "r.yaml", *words)
    assert found == code and said in err, err
    assert not (tmp_path / "r.search").exists()


def test_networks_that_cannot_be_matched_and_losses_that_are_none_are_told(
    models: Path, tmp_path: Path, command: Command
) -> None:
    words = ("search", "r.yaml", "--data", str(models / "data.safetensors"))
    for name in "ab":
        (tmp_path / f"classifier-{name}").mkdir()
        config = json.loads((models / f"classifier-{name}" / "config.json").read_text(encoding="utf-8"))
        config["intermediate_size"] -= name == "b"
        (tmp_path / f"classifier-{name}" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(models / "classifier-a" / "model.safetensors")
    save_file(tensors, tmp_path / "classifier-a" / "model.safetensors", {"format": "pt"})
    narrow = {**tensors, UP: tensors[UP][1:], BIAS: tensors[BIAS][1:], DOWN: tensors[DOWN][:, 1:].contiguous()}
    save_file(narrow, tmp_path / "classifier-b" / "model.safetensors", {"format": "pt"})
    write_recipe(tmp_path, tmp_path, "classifier", "from: {learned: ste}")
    code, _, err = command(*words)
    assert code == 3 and "different shapes" in err, err
    config["intermediate_size"] += 1
    (tmp_path / "classifier-b" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    broken = {**tensors, "classifier.bias": torch.full((3,), torch.inf)}
    save_file(broken, tmp_path / "classifier-b" / "model.safetensors", {"format": "pt"})
    code, _, err = command(*words)
    assert code == 5 and "the loss is nan" in err, err
    with pytest.raises(RecipeError, match="not by a score"):
        mergekit_lite.search(tmp_path / "r.yaml", score=lambda state: 0.0)
    assert not (tmp_path / "r.search").exists()

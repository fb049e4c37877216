"""Gradients of tasks' losses, by `collect`, by `merge stats`, and against each other by `merge diff --gradients`: all
against plain autograd, and along a line of checkpoints."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from calibrate_models import TEXT_FILE, write, write_classifier, write_inputs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from mergekit_lite import InputError, collect
from mergekit_lite.cli.app import execute

Shown = tuple[int, str, str]


class Tied(nn.Module):
    """One matrix as embedding and as head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return linear(self.mix(self.embed(ids)).tanh(), self.head.weight)


def by_autograd(network: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13)


def test_it_is_that_of_the_mean_loss_over_all_labels_whatever_the_batches() -> None:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y = torch.randn(11, 6, dtype=torch.float64), torch.randint(4, (11,))
    y[[2, 3, 7]] = -100
    wanted = by_autograd(network, cross_entropy(network(x), y))
    for sizes in ([11], [1] * 11, [2, 2, 7]):
        # One of these batches has no label at all.
        parts = zip(x.split(sizes), y.split(sizes), strict=True)
        found = collect(network, [{"input": a, "labels": b} for a, b in parts], "gradient")
        same(found.tensors["gradient"], wanted)
    assert found.examples == 11 and found.unused["gradient"] == []


def test_tied_weights_and_positions() -> None:
    """A tied matrix has the gradient of both its uses; position t predicts the label of t + 1."""
    network = Tied()
    ids = torch.randint(7, (5, 6), generator=torch.Generator().manual_seed(1))
    wanted = by_autograd(network, cross_entropy(network(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    batches = [{"ids": part, "labels": part} for part in ids.split(2)]
    found = collect(network, batches, "gradient,fisher,gram", shift=True)
    same(found.tensors["gradient"], wanted)
    assert set(wanted) == {"embed.weight", "mix.weight", "mix.bias"}
    # The kinds that go through in one pass do not disturb each other.
    for kind in ("fisher", "gram"):
        alone = collect(network, batches, kind, shift=True).tensors[kind]
        assert all(torch.equal(found.tensors[kind][name], value) for name, value in alone.items())


def test_no_two_gradients_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """When one is finished that before it is gone: memory is the sums and about one gradient."""
    network = nn.Sequential(*[nn.Linear(3, 3) for _ in range(6)])
    held = []
    from mergekit_lite.calibrate.gradient import Gradient

    add = Gradient._add_to

    def watch(self: Gradient, total: Tensor, slope: Tensor) -> None:
        held.append(sum(p.grad is not None for p in network.parameters()))
        add(self, total, slope)

    monkeypatch.setattr(Gradient, "_add_to", watch)
    network[1].weight.requires_grad_(False)
    network.train()
    collect(network, [{"input": torch.randn(4, 3), "labels": torch.tensor([0, 1, 2, 0])}], "gradient")
    assert held == [0] * 12 * 4
    assert network.training and not network[1].weight.requires_grad and network[0].weight.grad is None
    assert not any(p._post_accumulate_grad_hooks for p in network.parameters())


@pytest.mark.parametrize(
    "labels, said",
    [
        (None, "needs labels"),
        ([-100, -100], "no prediction has a label"),
        ([0, 3], "`labels` hold 3, the network knows 3 classes"),
        ([-1, 0], "`labels` hold -1"),
    ],
)
def test_labels_that_do_not_do(labels: list[int] | None, said: str) -> None:
    batch: dict[str, Any] = {"input": torch.ones(2, 4)}
    batch |= {} if labels is None else {"labels": torch.tensor(labels)}
    with pytest.raises(InputError, match=said):
        collect(nn.Linear(4, 3), [batch], "gradient")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        write(folder / name, "tied", seed=seed)
    write(folder / "mixtral", "mixtral")
    write_classifier(folder / "classifier")
    write_inputs(folder / "inputs.safetensors")
    lines = TEXT_FILE.splitlines(keepends=True)
    (folder / "first.txt").write_text("".join(lines[:20]))
    (folder / "second.txt").write_text("".join(reversed(lines[20:])))
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def merge(capsys: pytest.CaptureFixture[str]) -> Callable[..., Shown]:
    def run(*words: str) -> Shown:
        capsys.readouterr()
        code = execute([*words, "--threads", "1"])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def loss_of(folder: str, text: str, block: int) -> tuple[Any, Tensor]:
    """A model and its loss on blocks of a text, in float64, which transformers' own loss is not."""
    whole = {"dtype": torch.float64, "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **whole).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(Path(text).read_text(), add_special_tokens=False)["input_ids"]
    rows = torch.tensor(ids[: len(ids) // block * block]).reshape(-1, block)
    logits = model(rows, use_cache=False).logits
    return model, cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


def test_share_or_split_scores_of_a_tied_model(here: Path, merge: Callable[..., Shown]) -> None:
    """Per layer the cosine of two tasks' gradients at the base, by autograd in float64."""
    wanted: list[dict[str, Tensor]] = []
    for task in ("first", "second"):
        words = ("base", "--text", f"{task}.txt", "--block", "8", "--collect", "gradient", "--out", f"s_{task}")
        assert merge("stats", *words)[0] == 0
        model, loss = loss_of("base", f"{task}.txt", 8)
        wanted.append(by_autograd(model, loss))
        found = load_file(f"s_{task}/gradient.safetensors")
        assert set(found) == set(load_file("base/model.safetensors")) == set(wanted[-1])
        for name, value in wanted[-1].items():
            assert found[name].dtype == torch.float32
            torch.testing.assert_close(found[name].double(), value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))
    files = [part for task in ("first", "second") for part in ("--gradients", f"s_{task}/gradient.safetensors")]
    code, out, _ = merge("diff", "a", "b", "--base", "base", *files, "--json")
    assert code == 0
    made = json.loads(out)["gradients"]
    layers: dict[str, list[str]] = {"model.embed_tokens": [], "model.layers.0": [], "model.norm": []}
    for name in wanted[0]:
        next(own for home, own in layers.items() if name.startswith(home)).append(name)
    assert [layer["name"] for layer in made["layers"]] == list(layers)
    for layer in made["layers"]:
        one, two = (torch.cat([task[n].flatten() for n in layers[layer["name"]]]).numpy() for task in wanted)
        cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
        assert layer["cosine"] == pytest.approx(cosine, abs=1e-4)
    shown = {line.split()[0]: line.split() for line in merge("diff", "a", "b", "--base", "base", *files)[1].split("\n")
             if line}  # fmt: skip
    for layer in made["layers"]:
        assert shown[layer["name"]][-1] == f"{layer['cosine']:.4f}"


def test_experts_have_their_own_gradients_by_their_names_on_disk(here: Path, merge: Callable[..., Shown]) -> None:
    """Two checkpoints on a line through the model, with one expert's matrix moved: the slope between their losses is
    the gradient's share of that direction."""
    words = ("mixtral", "--text", "first.txt", "--block", "8", "--collect", "gradient", "--out", "s")
    assert merge("stats", *words)[0] == 0
    gradient, stored = load_file("s/gradient.safetensors"), load_file("mixtral/model.safetensors")
    assert {n: t.shape for n, t in gradient.items()} == {n: t.shape for n, t in stored.items()}
    # Of the last layer, so that no token is sent to another expert, where the loss would jump.
    for name in ("experts.3.w1.weight", "experts.11.w2.weight", "experts.3.w3.weight"):
        name = f"model.layers.1.block_sparse_moe.{name}"
        step = 1e-3 * gradient[name] / gradient[name].norm()
        losses = []
        for side in (1, -1):
            moved = here / f"{name}{side}"
            shutil.copytree(here / "mixtral", moved)
            save_file(stored | {name: stored[name] + side * step}, moved / "model.safetensors", {"format": "pt"})
            losses.append(loss_of(str(moved), "first.txt", 8)[1].item())
        slope = (losses[0] - losses[1]) / 2 / float(step.norm())
        assert slope == pytest.approx(float(gradient[name].norm()), rel=0.02), name


def test_a_classifier_and_what_is_said_of_it(here: Path, merge: Callable[..., Shown]) -> None:
    words = ("classifier", "--data", "inputs.safetensors", "--collect", "gradient", "--json", "--out", "s")
    code, out, _ = merge("stats", *words)
    assert code == 0 and json.loads(out)["memory"]["gradient"] > 0 == json.loads(out)["memory"]["fisher"]
    model = transformers.BertForSequenceClassification.from_pretrained("classifier").eval()
    given = load_file("inputs.safetensors")
    rows = [row[mask == 1][None] for row, mask in zip(given["input_ids"], given["attention_mask"], strict=True)]
    loss = torch.stack([model(row, labels=label).loss for row, label in zip(rows, given["labels"], strict=True)]).mean()
    found = load_file("s/gradient.safetensors")
    for name, value in by_autograd(model, loss).items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)
    save_file({"input_ids": given["input_ids"]}, here / "bare.safetensors")
    code, _, err = merge("stats", "classifier", "--data", "bare.safetensors", "--collect", "gradient", "--out", "none")
    assert code == 4 and "the gradient of a loss needs labels" in err and not Path("none").exists()


def test_in_a_sandbox(here: Path, merge: Callable[..., Shown]) -> None:
    """The same bytes, nothing else left behind, and nothing read from or written outside, links followed."""
    box = here / "box"
    box.mkdir()
    for name in ("base", "first.txt"):
        (shutil.copytree if (here / name).is_dir() else shutil.copy)(here / name, box / name)
    words = ("--block", "16", "--collect", "gram,hidden,gradient", "--examples", "3")
    assert merge("stats", "box/base", "--text", "box/first.txt", *words, "--out", "plain")[0] == 0
    code, _, err = merge("stats", "box/base", "--text", "box/first.txt", *words, "--out", "box/s", "--sandbox", "box")
    assert code == 0, err
    assert sorted(path.name for path in box.iterdir()) == ["base", "first.txt", "s"]
    for path in (here / "plain").iterdir():
        assert path.read_bytes() == (box / "s" / path.name).read_bytes()
    away = {"model": "base", "text": "first.txt", "out": "away"}
    for wrong in itertools.chain(((key,) for key in away), (("model", "text", "out"),)):
        places = {"model": "box/base", "text": "box/first.txt", "out": "box/t"} | {key: away[key] for key in wrong}
        code, _, err = merge(
            "stats", places["model"], "--text", places["text"], "--out", places["out"], "--sandbox", "box"
        )
        assert code == 2 and all(f"`{away[key]}`" in err for key in wrong), err
    (box / "base" / "tokenizer.json").unlink()
    (box / "base" / "tokenizer.json").symlink_to(here / "base" / "tokenizer.json")
    code, _, err = merge("stats", "box/base", "--text", "box/first.txt", "--out", "box/t", "--sandbox", "box")
    assert code == 4 and "tokenizer.json` lies outside the sandbox" in err
    assert not (box / "t").exists() and not (here / "away").exists()

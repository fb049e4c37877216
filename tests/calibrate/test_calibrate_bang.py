"""From data to a merge of models that are equally sure: `merge stats --collect confidence`, then `bang`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from calibrate_models import write
from safetensors.torch import load_file, save_file
from tiny_models import COMMON

from mergekit_lite.cli.app import execute

HEAD = ("classifier.weight", "classifier.bias")
RECIPE = """\
version: 1
compute: float64
models: {a: ./a, b: ./b, sure_a: ./s_a/confidence.safetensors, sure_b: ./s_b/confidence.safetensors}
steps: {m: {use: bang, of: {a: {confidence: sure_a}, b: {confidence: sure_b}}, with: {WITH}}}
save: {to: OUT, dtype: float32}
"""
LINEAR = 'head: {"classifier.*": linear, else: none}'
Shown = tuple[int, str, str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classifiers, surer than they are right: labels are drawn from their answers at a temperature of 2 and 0.5."""
    folder = tmp_path_factory.mktemp("bang")
    config = transformers.BertConfig(**COMMON, num_hidden_layers=1, num_labels=3)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = transformers.BertForSequenceClassification(config).eval()
        with torch.no_grad():
            model.classifier.weight.mul_(150)
            ids = torch.randint(3, 64, (300, 6))
            shares = (model(ids).logits / (2, 0.5)[seed]).softmax(dim=1)
            labels = torch.multinomial(shares, 1)[:, 0]
        model.save_pretrained(folder / name)
        save_file({"input_ids": ids, "labels": labels}, folder / f"{name}.safetensors")
        words = ["--data", str(folder / f"{name}.safetensors"), "--collect", "confidence", "--threads", "1"]
        assert execute(["stats", str(folder / name), *words, "--out", str(folder / f"s_{name}")]) == 0
    return folder


@pytest.fixture
def merge(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Shown]:
    """`merge("t: 0.3, head: ...", "out")` runs the recipe with these settings."""
    monkeypatch.chdir(tmp_path)
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)

    def run(settings: str, out: str = "out", recipe: str = RECIPE, command: str = "run") -> Shown:
        Path("r.yaml").write_text(recipe.replace("{WITH}", f"{{{settings}}}").replace("OUT", out))
        capsys.readouterr()
        code = execute([command, "r.yaml", "--threads", "1"])
        shown = capsys.readouterr()
        return code, shown.out, " ".join(shown.err.split())

    return run


def test_the_head_is_divided_by_the_temperatures_of_the_files(merge: Callable[..., Shown]) -> None:
    assert merge(f"t: 0.3, {LINEAR}")[0] == 0
    a, b, out = (load_file(f"{name}/model.safetensors") for name in ("a", "b", "out"))
    first, second = (float(load_file(f"s_{name}/confidence.safetensors")["temperature"]) for name in "ab")
    assert 1.5 < first < 2.7 and 0.3 < second < 0.7
    for name, value in out.items():
        divisors = (first, second) if name in HEAD else (1.0, 1.0)
        wanted = 0.7 * a[name].double() / divisors[0] + 0.3 * b[name].double() / divisors[1]
        torch.testing.assert_close(value, wanted.float(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("end, name", [(0, "a"), (1, "b")])
def test_an_end_gives_the_same_answers_and_is_as_sure_as_it_is_right(
    end: int, name: str, merge: Callable[..., Shown]
) -> None:
    """Its own temperature is 1 then, and its loss less than before."""
    assert merge(f"t: {end}, {LINEAR}")[0] == 0
    words = ["--data", f"{name}.safetensors", "--collect", "confidence", "--threads", "1"]
    assert execute(["stats", "out", *words, "--out", "after"]) == 0
    before, after = load_file(f"s_{name}/confidence.safetensors"), load_file("after/confidence.safetensors")
    assert float(after["temperature"]) == pytest.approx(1, rel=3e-3)
    assert after["accuracy"] == before["accuracy"] and float(after["loss"]) < float(before["loss"]) - 0.005
    assert (after["confidence"] < before["confidence"]) == (name == "a")
    assert float(after["confidence"]) == pytest.approx(float(after["accuracy"]), abs=0.06)


def test_another_file_of_confidence_is_another_merge(
    merge: Callable[..., Shown], capsys: pytest.CaptureFixture[str]
) -> None:
    """The number is read when the plan is made; the lock pins the file that it comes from."""
    found = load_file("s_a/confidence.safetensors")
    Path("s_a").unlink()
    Path("s_a").mkdir()
    save_file(found | {"temperature": torch.tensor(4.0, dtype=torch.float64)}, "s_a/confidence.safetensors")
    assert merge(f"t: 0.5, {LINEAR}", "other")[0] == 0
    a, b, out = (load_file(f"{name}/model.safetensors")[HEAD[0]].double() for name in ("a", "b", "other"))
    second = float(load_file("s_b/confidence.safetensors")["temperature"])
    torch.testing.assert_close(out, a / 8 + b / 2 / second, rtol=1e-6, atol=1e-9)
    lock = Path("other/recipe.lock.yaml").read_text()
    save_file(found | {"temperature": torch.tensor(3.0, dtype=torch.float64)}, "s_a/confidence.safetensors")
    Path("lock.yaml").write_text(lock)
    assert execute(["run", "lock.yaml", "--out", "again", "--threads", "1"]) != 0
    assert "confidence.safetensors" in capsys.readouterr().err and not Path("again").exists()


def _write_confidence(path: str, **tensors: torch.Tensor) -> None:
    Path(path).mkdir()
    save_file(tensors, f"{path}/confidence.safetensors")


@pytest.mark.parametrize(
    "tensors, said",
    [
        ({"confidence": 0.5}, "holds no temperature of a model's confidence"),
        ({"temperature": 0.5}, "holds no temperature of a model's confidence"),
        ({"confidence": 0.5, "temperature": [1.0, 2.0]}, "it is no single number"),
        ({"confidence": 0.5, "temperature": 0.0}, "it is 0"),
        ({"confidence": 0.5, "temperature": float("nan")}, "it is nan"),
    ],
)
def test_files_without_a_temperature_are_refused_at_their_line(
    tensors: dict[str, float | list[float]], said: str, merge: Callable[..., Shown]
) -> None:
    Path("s_b").unlink()
    _write_confidence("s_b", **{name: torch.tensor(value, dtype=torch.float64) for name, value in tensors.items()})
    code, _, err = merge(LINEAR)
    assert code == 3 and said in err and "`sure_b`" in err and "--> r.yaml:4:" in err, err


def test_a_temperature_at_an_end_of_the_range_is_told(merge: Callable[..., Shown]) -> None:
    Path("s_b").unlink()
    numbers = {"confidence": 0.9, "temperature": 8.0}
    _write_confidence("s_b", **{name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()})
    code, _, err = merge(LINEAR)
    assert code == 0 and "lies at an end of what `merge stats` looks at" in err


@pytest.mark.parametrize(
    "settings, said",
    [
        ("t: 0.5", "`bang` needs `head`"),
        ("head: linear", "`head` is one value for all tensors"),
        ('head: {"classifier.*": cosine, else: none}', "`head` is one of linear | logit_scale | none"),
        (f"{LINEAR}, temperature: 2", "`confidence` gives the temperature of `a` --> r.yaml:4:"),
        (f"{LINEAR}, temperature: 0", "`temperature` must lie in (0, inf)"),
    ],
)
def test_wrong_settings(settings: str, said: str, merge: Callable[..., Shown]) -> None:
    code, _, err = merge(settings)
    assert code == 3 and said in err, err


def test_a_tied_head_is_refused(merge: Callable[..., Shown]) -> None:
    for seed, name in enumerate(("c", "d")):
        write(Path(name), "tied", seed=seed)
    recipe = RECIPE.replace("./a,", "./c,").replace("./b,", "./d,")
    for head in ("lm_head.*", "model.embed_tokens.*"):
        code, _, err = merge(f'head: {{"{head}": linear, else: none}}', recipe=recipe)
        assert code == 3 and "`lm_head.weight` of `a` is tied to `model.embed_tokens.weight`" in err, err
    assert json.loads(Path("c/config.json").read_text())["tie_word_embeddings"]

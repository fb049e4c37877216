"""`merge diff --base` and `merge inspect --quantisability`: tables, JSON, and what does not go together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_lite.cli.app import execute

Make = Callable[..., str]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def checkpoint(name: str, **tensors: Tensor) -> str:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        return str(tmp_path / name)

    return checkpoint


@pytest.fixture
def models(make: Make) -> list[str]:
    """A base of zeros and three models."""
    vectors = {"base": [0, 0, 0, 0], "a": [3, 4, 0, 0], "b": [3, -4, 0, 0], "c": [0, 0, 0, 2]}
    return [
        make(
            name,
            **{
                "layers.0.w": torch.tensor(v, dtype=torch.float32),
                "head.w": torch.ones(2) * sum(v),
                "n": torch.ones(1, dtype=torch.int8),
            },
        )
        for name, v in vectors.items()
    ]


def rows(out: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}


def test_two_models(models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    base, a, b, _ = models
    assert execute(["diff", a, b, "--base", base]) == 0
    out, err = capsys.readouterr()
    shown = rows(out)
    assert shown["layers.0.w"] == ["4", "-0.2800", "0.5000", "1.0000"]
    assert shown["layers.0"] == ["1", "4", "-0.2800", "0.5000", "1.0000"]
    assert shown["head"] == ["1", "2", "-1.0000", "1.0000", "1.0000"]
    assert out.splitlines()[-1].startswith("2 tensors · 2 models · cosine ")
    assert "`n` holds no numbers to merge" in err


def test_three_models_and_pairs(models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    base, *others = models
    assert execute(["diff", *others, "--base", base, "--limit", "1"]) == 0
    out, err = capsys.readouterr()
    assert "1 more: `--limit 0` shows all" in err and "layers.0.w" not in out
    assert [line.split()[:2] for line in out.splitlines() if line.startswith(("a ", "b "))] == [
        ["a", "b"],
        ["a", "c"],
        ["b", "c"],
    ]
    assert execute(["diff", *others, "--base", base, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    layer = next(entry for entry in made["layers"] if entry["name"] == "layers.0")
    assert layer["cosine"] == pytest.approx(-0.28 / 3) and layer["overlap"] == pytest.approx(1 / 3)
    assert layer["norms"] == [5.0, 5.0, 2.0] and layer["conflict"] == 0.5 and layer["changed"] == 3
    assert [(p["a"], p["b"]) for p in made["all"]["pairs"]] == [
        (others[0], others[1]),
        (others[0], others[2]),
        (others[1], others[2]),
    ]
    assert made["left"] == [{"name": "n", "why": "holds no numbers to merge"}]


def test_numbers_that_json_lacks(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    base, a = make("base", x=torch.zeros(2)), make("a", x=torch.tensor([float("nan"), 0.0]))
    assert execute(["diff", a, base, "--base", base, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out, parse_constant=pytest.fail)["all"]
    assert (found["cosine"], found["conflict"], found["overlap"], found["undefined"]) == (None, None, None, 1)
    assert "1 number left out" in err


@pytest.mark.parametrize(
    "more, said",
    [
        (["{c}"], "without `--base` two checkpoints are compared, not 3"),
        (["--base", "{base}", "--sort", "name"], "`--base` compares task vectors"),
        (["--base", "{base}", "--directions"], "`--base` compares task vectors"),
        (["--base", "{base}", "--tolerance", "1"], "`--base` compares task vectors"),
        (["--base", "{base}", "--all"], "`--base` compares task vectors"),
    ],
)
def test_what_does_not_go_together(
    models: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base, a, b, c = models
    assert execute(["diff", a, b, *(word.format(base=base, c=c) for word in more)]) == 2
    assert said in capsys.readouterr().err


def test_a_base_that_is_not_there_or_another_model(
    models: list[str], make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    base, a, b, _ = models
    assert execute(["diff", a, b, "--base", f"{base}/nothing"]) == 4
    assert "base/nothing" in capsys.readouterr().err
    other = make("other", y=torch.ones(2))
    assert execute(["diff", a, b, "--base", other]) == 4
    assert f"no tensor of the base `{other}` is in all models" in capsys.readouterr().err


def test_sandbox(models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "box").mkdir()
    base, a, b, _ = models
    assert execute(["diff", a, b, "--base", base, "--sandbox", str(tmp_path / "box")]) == 2
    err = capsys.readouterr().err
    assert all(place in err for place in (a, b, base))
    assert execute(["inspect", a, "--quantisability", "--against", b, "--sandbox", str(tmp_path / "box")]) == 2
    assert b in capsys.readouterr().err


@pytest.fixture
def weights(make: Make) -> tuple[str, str]:
    even = torch.linspace(-1, 1, 64).reshape(8, 8)
    far = even.clone()
    far[0, 0] = -40.0
    return make("merged", **{"a.w": far, "b.w": even, "bias": torch.ones(3)}), make(
        "parent", **{"a.w": even, "c.w": even.clone()}
    )


def test_quantisability(weights: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["inspect", weights[0], "--quantisability"]) == 0
    out = capsys.readouterr().out
    # Equidistant numbers are nearly uniform: kurtosis 1.8, no skewness.
    shown = rows(out)
    assert float(shown["b.w"][1]) == pytest.approx(1.8, abs=0.01) and abs(float(shown["b.w"][0])) < 1e-6
    assert "bias" not in shown and "worse" not in out
    assert [line.split()[:2] for line in out.splitlines()[-4:]] == [
        [g, r] for g in ("tensor", "channel") for r in ("symmetric", "asymmetric")
    ]


def test_against_parents(weights: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", weights[0], "--quantisability", "--against", weights[1]]
    assert execute(arguments) == 0
    out = capsys.readouterr().out
    assert rows(out)["a.w"][-1] == "all"
    assert "no parent has it" in out
    assert out.splitlines()[-1] == "1 of 2 tensors lose more at 4 bits than in any parent"
    assert execute([*arguments, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["quantisability"]
    a, b = made["tensors"]
    assert made["worse"] == 1 and a["worse"][0] == {"bits": 4, "granularity": "tensor", "range": "symmetric"}
    assert a["parents"][weights[1]]["4"]["tensor"]["symmetric"] < a["error"]["4"]["tensor"]["symmetric"]
    assert "worse" not in b and set(made["error"]) == {"2", "4", "8"}


def test_wrong_use_of_quantisability(
    weights: tuple[str, str], make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["inspect", weights[0], "--against", weights[1]]) == 2
    assert "add `--quantisability`" in capsys.readouterr().err
    other = make("other", **{"a.w": torch.ones(2, 2)})
    assert execute(["inspect", weights[0], "--quantisability", "--against", other]) == 4
    assert "has no weight of" in capsys.readouterr().err
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    factors = {
        f"base_model.model.x.lora_{part}.weight": torch.ones(shape) for part, shape in (("A", (1, 4)), ("B", (4, 1)))
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    assert execute(["inspect", str(adapter), "--quantisability"]) == 2
    assert "an adapter has no weights" in capsys.readouterr().err
    assert execute(["inspect", weights[0], "--quantisability", "--against", str(adapter)]) == 4
    assert "adapter" in capsys.readouterr().err

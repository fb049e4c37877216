"""`merge path`: scores on the way between two models, the barrier with and without matching first, layers one by one,
and what is said of samples."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_process import Ran
from safetensors.numpy import load_file
from safetensors.torch import save_file

Merge = Callable[..., Ran]
FAMILY = """\
name: two_layers
model_types: [two_layers]
stacks: []
spaces:
  hidden: {name: hidden, kind: mlp}
axes:
  up.weight: [hidden, fixed]
  down.weight: [fixed, hidden]
"""
# Without torch: a score is a process for each point.
LOSS = """\
import json, pathlib, sys
from safetensors.numpy import load_file
def out(folder):
    t = load_file(pathlib.Path(folder) / "model.safetensors")
    return t["up.weight"].T.clip(min=0) @ t["down.weight"].T
print(json.dumps({"loss": float(((out(sys.argv[1]) - out(sys.argv[2])) ** 2).sum())}))
"""


@pytest.fixture
def models(tmp_path: Path) -> tuple[str, str]:
    """`a`, and the same network with its hidden units in another order."""
    generator = torch.Generator().manual_seed(2)
    up, down = torch.randn(6, 4, generator=generator), torch.randn(3, 6, generator=generator)
    order = torch.tensor([3, 4, 5, 0, 1, 2])
    for name, p in (("a", torch.arange(6)), ("b", order)):
        (tmp_path / name).mkdir()
        tensors = {"up.weight": up[p].contiguous(), "down.weight": down[:, p].contiguous()}
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "two_layers", "hidden_size": 6}')
    (tmp_path / "family.yaml").write_text(FAMILY)
    (tmp_path / "loss.py").write_text(LOSS)
    return str(tmp_path / "a"), str(tmp_path / "b")


def loss(a: str, b: str, t: float) -> float:
    """How far the network on the way is from what `a` computes."""
    one, two = load_file(Path(a) / "model.safetensors"), load_file(Path(b) / "model.safetensors")
    up, down = ((1 - t) * one[name] + t * two[name] for name in ("up.weight", "down.weight"))
    wanted = one["up.weight"].T.clip(min=0) @ one["down.weight"].T
    return float(((up.T.clip(min=0) @ down.T - wanted) ** 2).sum())


def test_the_barrier_is_that_of_the_losses_and_falls_to_nothing_once_matched(
    models: tuple[str, str], tmp_path: Path, merge: Merge
) -> None:
    command = f"{sys.executable} {tmp_path / 'loss.py'} {{model}} {models[0]}"
    common = ("path", *models, "--score", command, "--metric", "loss", "--points", "5", "--json")
    plain = merge(*common)
    assert plain.code == 0, plain.err
    wanted = [loss(*models, i / 4) for i in range(5)]
    assert [point["score"] for point in plain.json["points"]] == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    line = [(1 - i / 4) * wanted[0] + i / 4 * wanted[4] for i in range(5)]
    height = max(w - straight for w, straight in zip(wanted, line, strict=True))
    assert plain.json["barrier"] == pytest.approx(height, rel=1e-4) and height > 1
    matched = merge(*common, "--align", "mlp", "--family", str(tmp_path / "family.yaml"))
    assert matched.code == 0, matched.err
    assert matched.json["barrier"] == pytest.approx(0, abs=1e-5)
    upwards = merge(*common, "--goal", "max")
    lowest = max(straight - w for w, straight in zip(wanted, line, strict=True))
    assert upwards.json["barrier"] == pytest.approx(lowest, rel=1e-4, abs=1e-5)


def test_a_table_for_people_and_a_clear_word_where_the_score_fails(
    models: tuple[str, str], tmp_path: Path, merge: Merge
) -> None:
    shown = merge(
        "path", *models, "--score", f"{sys.executable} {tmp_path / 'loss.py'} {{model}} {models[0]}", "--metric", "loss"
    )
    assert shown.code == 0 and "best" in shown.out and shown.out.splitlines()[-1].startswith("barrier ")
    failed = merge("path", *models, "--score", f"{sys.executable} {tmp_path / 'nothing.py'} {{model}}")
    assert failed.code == 5 and "failed with exit code 2" in failed.err and "run it by hand" in failed.err
    unknown = merge("path", *models, "--score", "true {model}", "--align", "mlp")
    assert unknown.code == 3 and "two_layers" in unknown.err
    assert merge("path", *models, "--score", "true").code == 2


SAMPLES = """\
import json, pathlib, sys
import numpy as np
from safetensors.numpy import load_file, save_file
here = pathlib.Path(__file__).parent
with (here / "runs").open("a") as runs:
    runs.write("x")
t = load_file(pathlib.Path(sys.argv[1]) / "model.safetensors")
draw = np.random.default_rng(0)
x, labels = draw.standard_normal((40, 4)), draw.integers(3, size=40)
logits = (x @ t["up.weight"].T).clip(min=0) @ t["down.weight"].T
p = np.exp(logits - logits.max(1, keepdims=True))
p /= p.sum(1, keepdims=True)
guess = p.argmax(1)
loss = -np.log(p[range(40), labels]).mean()
said = {"loss": loss, "eval": {"labels": labels.tolist(), "guess": guess.tolist(), "p": p.tolist()},
        "right": (guess == labels).tolist(), "ones": (guess == labels).astype(int).tolist()}
if len(sys.argv) > 2:
    out = pathlib.Path(sys.argv[2])
    (out / "said.json").write_text(json.dumps({"loss": loss, "eval": {"labels": labels.tolist()}}))
    np.save(out / "p.npy", p)
    save_file({"probs": p.astype("float32")}, out / "p.safetensors")
    rows = [json.dumps({"doc": {"guess": int(g)}, "right": bool(g == l)}) for g, l in zip(guess, labels)]
    (out / "samples_1.jsonl").write_text("\\n".join(rows) + "\\n")
else:
    print(json.dumps(said))
"""


@pytest.fixture
def samples(models: tuple[str, str], tmp_path: Path) -> str:
    """A score command, from which `{model}` and, for files, ` {out}` are left out."""
    (tmp_path / "samples.py").write_text(SAMPLES)
    return f"{sys.executable} {tmp_path / 'samples.py'}"


def classes(weights: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of a network for the samples, and their labels, as `samples` has them."""
    draw = np.random.default_rng(0)
    x, labels = draw.standard_normal((40, 4)), draw.integers(3, size=40)
    scores = torch.relu(torch.tensor(x) @ torch.tensor(weights["up.weight"]).double().T)
    return (scores @ torch.tensor(weights["down.weight"]).double().T).softmax(1).numpy(), labels


def between(models: tuple[str, str], t: dict[str, float]) -> dict[str, np.ndarray]:
    one, two = (load_file(Path(folder) / "model.safetensors") for folder in models)
    return {name: (1 - t[name]) * one[name] + t[name] * two[name] for name in one}


def negative_log(weights: dict[str, np.ndarray]) -> float:
    p, labels = classes(weights)
    return float(-np.log(p[range(40), labels]).mean())


def test_each_layer_goes_its_own_way_and_only_what_differs_is_computed(
    models: tuple[str, str], samples: str, tmp_path: Path, merge: Merge
) -> None:
    """B with one layer on its way from A; a score for each different merge, and one tensor, or two, for each merge."""
    ran = merge(
        *("path", *models, "--score", f"{samples} {{model}}", "--metric", "loss", "--points", "4"),
        *("--layers", "--stragglers", "1", "--goal", "max", "--json"),
    )
    assert ran.code == 0, ran.err
    ts = [0, 1 / 3, 2 / 3, 1]
    heights = {}
    for layer in ran.json["layers"]:
        own = layer["name"] + ".weight"
        losses = [negative_log(between(models, {"up.weight": 1, "down.weight": 1, own: t})) for t in ts]
        assert layer["scores"] == pytest.approx(losses, rel=1e-5)
        heights[layer["name"]] = max((1 - t) * losses[0] + t * losses[3] - x for x, t in zip(losses, ts, strict=True))
        assert layer["barrier"] == pytest.approx(max(0, heights[layer["name"]]), rel=1e-4, abs=1e-6)
        one, two = (load_file(Path(folder) / "model.safetensors")[own].astype(float) for folder in models)
        assert layer["screen"] == pytest.approx(np.linalg.norm(two - one) / np.linalg.norm(one), rel=1e-6)
        assert layer["globs"] == [f"{layer['name']}.*"]
    assert set(heights) == {"up", "down"} and min(heights.values()) > 0  # it is convex in each layer
    worst = max(heights, key=lambda name: heights[name])
    named = ran.json["stragglers"]
    assert (named["by"], named["layers"]) == ("barrier", [worst])
    assert named["with"] == {"density": {f"{worst}.*": 0.5, "else": 1}}
    # 4 on the line, 3 for each layer: all of B is known from the line.
    assert (tmp_path / "runs").read_text() == "x" * 10
    merged = ran.json["merged"]
    assert merged["merges"] == 10 and merged["of"] == 20
    # On the line both tensors, at the change from layer to layer both, else one.
    assert merged["tensors"] == 2 * 4 + 1 + 2 * 1 + 2 + 2 * 1
    recipe = tmp_path / "sparse.yaml"
    recipe.write_text(
        f"version: 1\nmodels: {{a: {models[0]}, b: {models[1]}}}\nsteps:\n  change: {{use: delta, of: b, base: a}}\n"
        f"  thin: {{use: sparsify, of: change, with: {json.dumps(named['with'])}}}\n"
        f"  merged: {{use: add, base: a, of: thin}}\nsave: {{to: {tmp_path / 'sparse'}}}\n"
    )
    assert merge("run", str(recipe)).code == 0
    sparse, start = (load_file(Path(f) / "model.safetensors") for f in (tmp_path / "sparse", models[0]))
    own = sparse[f"{worst}.weight"] != start[f"{worst}.weight"]
    assert own.sum() <= own.size / 2


@pytest.mark.parametrize(
    "words",
    [
        ("{model}", "--predictions", "right"),
        ("{model}", "--predictions", "ones"),
        ("{model}", "--predictions", "eval.guess", "--labels", "eval.labels"),
        ("{model}", "--probabilities", "eval.p", "--labels", "eval.labels"),
        ("{model} {out}", "--predictions", "samples_*.jsonl:right"),
        ("{model} {out}", "--predictions", "samples_*.jsonl:doc.guess", "--labels", "eval.labels"),
        ("{model} {out}", "--probabilities", "p.npy", "--labels", "eval.labels"),
        ("{model} {out}", "--probabilities", "p.safetensors:probs", "--labels", "eval.labels"),
        ("{model} {out}", "--probabilities", "p.safetensors", "--labels", "eval.labels"),
    ],
)
def test_flips_against_both_ends_and_the_ensemble(
    words: tuple[str, ...], models: tuple[str, str], samples: str, merge: Merge
) -> None:
    place, *options = words
    ran = merge(
        "path", *models, "--score", f"{samples} {place}", "--metric", "loss", "--points", "3", *options, "--json"
    )
    assert ran.code == 0, ran.err
    found = [classes(between(models, dict.fromkeys(("up.weight", "down.weight"), t))) for t in (0, 0.5, 1)]
    labels = found[0][1]
    rows = list(zip(*((p.argmax(1) == labels).tolist() for p, _ in found), strict=True))
    half = ran.json["points"][1]
    assert half["fft"] == sum(row == (False, True, False) for row in rows) / 40
    assert half["ttf"] == sum(row == (True, False, True) for row in rows) / 40
    assert [p["accuracy"] for p in ran.json["points"]] == [sum(column) / 40 for column in zip(*rows, strict=True)]
    assert ran.json["points"][0]["fft"] == ran.json["points"][2]["ttf"] == 0
    if "--probabilities" not in options:
        assert "ensemble" not in ran.json
        return
    whole = ran.json["ensemble"]
    right = ((found[0][0] + found[2][0]).argmax(1) == labels).mean()
    assert whole["accuracy"] == right and whole["share_at"] == 0.5
    assert whole["share"] == pytest.approx(half["accuracy"] / right)
    assert whole["cascades"][0]["cost"] == 1 and all(1 <= one["cost"] <= 2 for one in whole["cascades"])
    assert whole["cascades"][0]["accuracy"] == max(ran.json["points"][i]["accuracy"] for i in (0, 2))


def test_a_kept_path_goes_on_without_measuring_again(
    models: tuple[str, str], samples: str, tmp_path: Path, merge: Merge
) -> None:
    out = tmp_path / "kept"
    command = (
        *("path", *models, "--score", f"{samples} {{model}}", "--metric", "loss", "--points", "3", "--json"),
        *("--align", "mlp", "--family", str(tmp_path / "family.yaml"), "--out", str(out)),
    )
    first = merge(*command)
    assert first.code == 0, first.err
    runs = len((tmp_path / "runs").read_text())
    assert 1 <= runs <= 3 and list((out / "logs").iterdir()) and not (out / "work").exists()
    again = merge(*command)
    assert again.json["points"] == first.json["points"] and again.json["merged"]["merges"] == 0
    assert len((tmp_path / "runs").read_text()) == runs
    # What is said of samples was not kept, so it is measured; then it is known too.
    for more in (runs, 0):
        told = merge(*command, "--predictions", "right")
        runs += more
        assert told.code == 0 and len((tmp_path / "runs").read_text()) == runs
        assert [p["score"] for p in told.json["points"]] == [p["score"] for p in first.json["points"]]
    (kept, *_) = (out / "samples").iterdir()
    kept.write_bytes(kept.read_bytes()[:50])  # as a crash leaves it
    assert merge(*command, "--predictions", "right").json["points"] == told.json["points"]
    assert len((tmp_path / "runs").read_text()) == runs + 1


def test_a_picture_and_tables(
    models: tuple[str, str], samples: str, tmp_path: Path, merge: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (
        *("path", *models, "--score", f"{samples} {{model}}", "--metric", "loss", "--points", "3", "--layers"),
        *("--goal", "max"),
        *("--probabilities", "eval.p", "--labels", "eval.labels", "--out", str(tmp_path / "kept"), "--plot"),
    )
    picture = tmp_path / "pictures" / "path.svg"
    ran = merge(*command, str(picture))
    assert ran.code == 0, ran.err
    drawn = picture.read_text()
    height = float(ran.out.splitlines()[-1].removeprefix("barrier "))
    assert height > 0 and f"barrier {height:.4g}" in drawn
    assert all(word in drawn for word in ("straight line", ">up<", ">down<", ">loss<"))
    assert all(word in ran.out for word in ("FFT", "straggler", "cascade, window 0.5", "of the ensemble's", "density:"))
    assert merge(*command, str(picture)).code == 0 and picture.read_text() == drawn
    assert merge(*command, str(tmp_path / "path.docx")).code == 2
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    lacking = merge(*command, str(picture))
    assert lacking.code == 2 and "matplotlib" in lacking.err and "mergekit_lite[search]" in lacking.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--predictions", "eval.guess"), 5, "not all 0 or 1"),
        (("--predictions", "ones", "--labels", "eval.labels"), 5, "leave out `--labels`"),
        (("--predictions", "eval"), 5, "no list at `eval`"),
        (("--predictions", "nothing.here"), 5, "nothing at `nothing.here`"),
        (("--predictions", "eval.p"), 5, "no list with one entry"),
        (("--probabilities", "right", "--labels", "eval.labels"), 5, "(samples, classes)"),
        (("--probabilities", "eval.p", "--labels", "right"), 5, "no numbers of classes"),
        (("--probabilities", "eval.p"), 2, "`--probabilities` need `--labels`"),
        (("--probabilities", "eval.p", "--labels", "eval.labels", "--predictions", "right"), 2, "`--predictions`"),
        (("--labels", "eval.labels"), 2, "says nothing"),
        (("--predictions", "p.npy"), 2, "`{out}`"),
        (("--stragglers", "3"), 2, "belongs to `--layers`"),
        (("--text", "x.txt"), 2, "belongs to `--layers`"),
        (("--layers", "--rho", "0.1"), 2, "`--rho` belongs to"),
        (("--layers", "--text", "x.txt", "--data", "x.npz"), 2, "`--text` or from `--data`"),
        (("--layers", "--text", "x.txt"), 4, "two_layers"),
    ],
)
def test_wrong_use_is_told(
    words: tuple[str, ...], code: int, said: str, models: tuple[str, str], samples: str, tmp_path: Path, merge: Merge
) -> None:
    """What can be known before is told before a score is run."""
    ran = merge("path", *models, "--score", f"{samples} {{model}}", "--metric", "loss", "--points", "2", *words)
    assert ran.code == code and said in ran.err
    assert (tmp_path / "runs").exists() == (code == 5)


def test_samples_that_change_from_score_to_score_are_refused(
    models: tuple[str, str], tmp_path: Path, merge: Merge
) -> None:
    (tmp_path / "moody.py").write_text(
        "import json, pathlib, sys\nruns = pathlib.Path(__file__).with_name('n')\n"
        "n = len(runs.read_text()) if runs.exists() else 0\nruns.write_text('x' * (n + 1))\n"
        "print(json.dumps({'loss': 1, 'right': [1] * (5 + n)}))\n"
    )
    score = f"{sys.executable} {tmp_path / 'moody.py'} {{model}}"
    ran = merge("path", *models, "--score", score, "--metric", "loss", "--predictions", "right")
    assert ran.code == 5 and "not those of the first score" in ran.err

"""`merge search`: a study on the disk, by commands that score; stopped, killed, shared and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_process import Ran, command, environ
from safetensors.torch import save_file

Merge = Callable[..., Ran]
SCORE = """\
import json, pathlib, sys, time
import numpy as np
from safetensors.numpy import load_file
goal, found = (load_file(pathlib.Path(p) / "model.safetensors")["w"] for p in ("goal", sys.argv[1]))
with open("asked", "a") as file:
    file.write(f"{sys.argv[1]}\\n")
time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0)
print("a line of talk")
print(json.dumps({"results": {"far": float(np.abs(goal - found).sum())}}))
"""
RECIPE = """\
version: 1
models: {a: ./a, b: ./b}
steps: {m: {use: interpolate, of: [a, b], with: {t: {search: [0, 1]}}}}
save: {to: out/best}
score: {command: "PYTHON score.py {model} WAIT", metric: results.far, goal: min}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two models, the merge that is wanted of them (t = 0.25), a score command and a recipe."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, generator=generator), torch.randn(50, generator=generator)
    for name, tensor in (("a", a), ("b", b), ("goal", torch.lerp(a, b, 0.25))):
        (tmp_path / name).mkdir()
        save_file({"w": tensor}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "score.py").write_text(SCORE, encoding="utf-8")
    write(tmp_path)
    return tmp_path


def write(folder: Path, wait: str = "", recipe: str = RECIPE) -> None:
    text = recipe.replace("PYTHON", sys.executable).replace(" WAIT", f" {wait}" if wait else "")
    (folder / "r.yaml").write_text(text, encoding="utf-8")


def test_the_best_recipe_is_written_and_merges_to_its_score(here: Path, merge: Merge) -> None:
    ran = merge("search", "r.yaml", "--trials", "15", "--jobs", "2", "--json")
    assert ran.code == 0, ran.err
    (best,) = ran.json["best"]
    assert best["values"]["steps.m.with.t"] == pytest.approx(0.25, abs=0.15)
    assert best["scores"]["results.far"] == min(t["scores"]["results.far"] for t in ran.json["trials"])
    assert merge("run", "r.search/best.yaml").code == 0
    scored = subprocess.run([sys.executable, "score.py", "out/best"], capture_output=True, text=True, check=True)
    assert json.loads(scored.stdout.splitlines()[-1])["results"]["far"] == best["scores"]["results.far"]
    left = sorted(path.name for path in (here / "r.search").iterdir())
    assert left == ["best.yaml", "logs", "scores.jsonl", "study.db", "trials.json", "trials.svg"]  # no trial is left
    assert "a line of talk" in (here / "r.search/logs/0000-results.far.out").read_text()
    shown = merge("search", "r.yaml", "--trials", "15")
    assert "15 trials: 15 done" in shown.out
    assert (here / "asked").read_text().count("\n") == 16  # nothing was scored again


def test_two_equal_fillings_are_scored_once(here: Path, merge: Merge) -> None:
    write(here, recipe=RECIPE.replace("{search: [0, 1]}", "{choice: [0.25, 0.5]}"))
    ran = merge("search", "r.yaml", "--trials", "12", "--sampler", "random", "--json")
    assert ran.code == 0, ran.err
    assert len(ran.json["trials"]) == 12
    assert (here / "asked").read_text().count("\n") == 2


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def asked(here: Path) -> int:
    return (here / "asked").read_text().count("\n") if (here / "asked").exists() else 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_search_that_is_stopped_goes_on_with_the_same_command(here: Path, merge: Merge, how: signal.Signals) -> None:
    write(here, wait="0.2")
    words = command("search", "r.yaml", "--trials", "8", "--jobs", "2")
    child = subprocess.Popen(words, cwd=here, env=environ(), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: asked(here) >= 4)
    child.send_signal(how)
    _, said = child.communicate(timeout=60)
    assert child.returncode == (-9 if how == signal.SIGKILL else 130)
    if how == signal.SIGINT:
        assert "the same command goes on" in said
    write(here)  # the wait is no part of what is searched for ...
    ran = merge("search", "r.yaml", "--trials", "8", "--json")
    assert ran.code == 2  # ... but the command is: another one may measure something else
    write(here, wait="0.2")
    ran = merge("search", "r.yaml", "--trials", "8", "--jobs", "2", "--json")
    assert ran.code == 0, ran.err
    assert len(ran.json["trials"]) == 8
    assert {trial["state"] for trial in ran.json["trials"]} == {"done"}
    assert asked(here) <= 8 + 2  # at most one a job was scored in vain
    assert not list((here / "r.search").glob("work/*/*/model.partial")) or how == signal.SIGKILL


def test_two_processes_share_a_study(here: Path) -> None:
    write(here, wait="0.1")
    words = command("search", "r.yaml", "--trials", "12", "--json")
    pair = [
        subprocess.Popen(words, cwd=here, env=environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = [child.communicate(timeout=120) for child in pair]
    assert [child.returncode for child in pair] == [0, 0], told
    assert 12 <= max(len(json.loads(out)["trials"]) for out, _ in told) <= 13
    assert asked(here) <= 13


def test_a_command_that_takes_too_long_is_stopped_with_all_it_started(here: Path, merge: Merge) -> None:
    (here / "slow.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "open('child', 'a').write(f'{child.pid}\\n')\ntime.sleep(300)\n",
        encoding="utf-8",
    )
    ran = merge("search", "r.yaml", "--score", f"{sys.executable} slow.py {{model}}", "--goal", "max", "--timeout", "1")
    assert ran.code == 5
    assert "all 3 trials have failed" in ran.err and "more than 1 s" in ran.err
    for pid in (here / "child").read_text().split():
        wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text())  # type: ignore[misc]


def test_a_trial_whose_command_fails_is_told_and_its_log_kept(here: Path, merge: Merge) -> None:
    script = "import sys, random, os; n = len(os.listdir('r.search/logs')); print('why'); sys.exit(n % 4 == 0 and 3)"
    (here / "some.py").write_text(script.replace("print('why')", "print(0.5)"), encoding="utf-8")
    ran = merge(
        "search", "r.yaml", "--score", f"{sys.executable} some.py {{model}}", "--goal", "max", "--trials", "6", "--json"
    )
    assert ran.code == 0, ran.err
    states = [trial["state"] for trial in ran.json["trials"]]
    assert set(states) == {"done", "failed"}
    bad = states.index("failed")
    assert f"trial {bad} failed: the score command failed with exit code 3" in ran.err
    assert (here / f"r.search/logs/{bad:04d}-score.out").read_text() == "0.5\n"


def test_a_greedy_soup_is_found_and_tells_what_was_left_out(here: Path, merge: Merge) -> None:
    rng = np.random.default_rng(1)
    (here / "c").mkdir()
    save_file({"w": torch.from_numpy(rng.standard_normal(50).astype("float32"))}, here / "c/model.safetensors")
    (here / "c/config.json").write_text("{}", encoding="utf-8")
    recipe = RECIPE.replace("{a: ./a, b: ./b}", "{a: ./a, b: ./b, c: ./c}")
    write(here, recipe=recipe.replace("{use: interpolate, of: [a, b], with: {t: {search: [0, 1]}}}",
                                      "{use: linear, of: {greedy: [c, b, a]}}"))  # fmt: skip
    ran = merge("search", "r.yaml")
    assert ran.code == 0, ran.err
    rows = ran.out.splitlines()
    assert [row.split()[-1] for row in rows[1:4]] == ["alone"] * 3
    assert rows[4].split()[2:] == ["a", "kept"]
    assert sum("best" in row for row in rows[:7]) == 1 and any("left out" in row for row in rows)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--metric", "x"], 2, "`--metric` belongs to `--score`"),
        (["--score", "s {model}"], 2, "`--score` needs `--goal`"),
        (["--score", "s", "--goal", "max"], 2, "has no `{model}`"),
        (["--set", "steps.m.with.t=0.5"], 3, "nothing to search"),
        (["--set", "models.a=./nowhere"], 4, "nowhere"),
        (["--sampler", "grid"], 2, "endless"),
    ],
)
def test_wrong_words_are_told_before_the_first_trial(
    here: Path, merge: Merge, words: list[str], code: int, said: str
) -> None:
    ran = merge("search", "r.yaml", *words)
    assert (ran.code, said in ran.err) == (code, True), ran.err
    assert not (here / "asked").exists()
    assert not (here / "r.search").exists() or os.listdir(here / "r.search") in ([], ["study.db"])


def test_a_recipe_without_a_score_says_so(here: Path, merge: Merge) -> None:
    write(here, recipe=RECIPE.split("score:")[0])
    ran = merge("search", "r.yaml")
    assert ran.code == 3 and "does not say how good a merge is" in ran.err


STORE = """\
version: 1
models: {base: ./base, a: ./a, b: ./b, c: ./c}
steps: {sum: {use: task_arithmetic, base: base, of: [a, b, c], with: {lambda: 1}}}
save: {as: masks, step: sum, base: base, tasks: [a, b, c], threshold: OPEN, to: out/store}
score: {command: "PYTHON far.py {model} {task}", goal: min}
"""
FAR = """\
import pathlib, sys
import numpy as np
from safetensors.numpy import load_file
own, found = (load_file(pathlib.Path(p) / "model.safetensors")["w"] for p in (sys.argv[2], sys.argv[1]))
print(float(np.abs(own - found).sum()))
"""
LAMBDAS = (0.2, 0.4, 0.6, 1.0)


@pytest.mark.parametrize(
    ("hole", "tasks"),
    [
        ("{choice: [0.2, 0.4, 0.6, 1.0]}", "abc"),
        ("{a: {search: [0.2, 0.6], step: 0.2}, b: 0.5, c: {choice: [0.4, 1.0]}}", "ac"),
    ],
)
def test_thresholds_of_a_store_are_chosen_by_the_score_of_each_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: Merge, hole: str, tasks: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(5)
    models = {name: rng.standard_normal(64).astype("float32") for name in ("base", "a", "b", "c")}
    for name, values in models.items():
        (tmp_path / name).mkdir()
        save_file({"w": torch.from_numpy(values)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "far.py").write_text(FAR, encoding="utf-8")
    write(tmp_path, recipe=STORE.replace("OPEN", hole))
    ran = merge("search", "r.yaml", "--jobs", "2", "--json")
    assert ran.code == 0, ran.err
    base = models["base"]
    deltas = {name: models[name] - base for name in "abc"}
    whole = sum(deltas.values())

    def far(task: str, threshold: float) -> float:
        mask = np.abs(deltas[task]) > threshold * np.abs(whole - deltas[task])
        return float(np.abs(base + mask * whole - models[task]).sum())

    tried = {"abc": dict.fromkeys("abc", LAMBDAS), "ac": {"a": (0.2, 0.4, 0.6), "c": (0.4, 1.0)}}[tasks]
    wanted = {task: min(values, key=lambda value: far(task, value)) for task, values in tried.items()}
    (best,) = ran.json["best"]
    chosen = best["values"]
    chosen = chosen.get("save.threshold") or {key.rpartition(".")[2]: value for key, value in chosen.items()}
    assert chosen == pytest.approx(wanted)
    assert best["scores"]["score"] == pytest.approx(sum(far(t, v) for t, v in wanted.items()) / len(wanted), rel=1e-5)
    assert merge("run", "r.search/best.yaml").code == 0
    text = (tmp_path / "r.search/best.yaml").read_text()
    if tasks == "ac":
        assert "b: 0.5" in text
    before = sorted(path.name for path in (tmp_path / "r.search").iterdir())
    assert before == ["best.yaml", "logs", "scores.jsonl", "trials.json", "trials.svg"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("OPEN", "{search: [0, 1]}"), "one by one"),
        (
            ("as: masks, step: sum, base: base, tasks: [a, b, c], threshold: OPEN", "step: sum"),
            "a task of a mask store",
        ),
    ],
)
def test_a_score_of_tasks_needs_thresholds_of_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: Merge, changed: tuple[str, str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = STORE.replace(*changed).replace(
        "lambda: 1", "lambda: {choice: [1, 2]}" if "as: " in changed[0] else "lambda: 1"
    )
    write(tmp_path, recipe=recipe)
    ran = merge("search", "r.yaml")
    assert ran.code == 3 and said in ran.err, ran.err

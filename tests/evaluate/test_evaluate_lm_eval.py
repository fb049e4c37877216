"""lm-evaluation-harness as a score: run where it is installed (the extra lm_eval), else what it wrote once is read."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import sys
from pathlib import Path

import lm_eval_files as maker
import pytest

import mergekit_lite
from mergekit_lite.evaluate.score import Score, ScoreFailed

RECORDED = Path(__file__).with_name("lm_eval_results.json")
# Writes what was recorded as the tool does: into a folder with the model's name, the time in the file's.
STAND_IN = """\
import pathlib, sys, time
out = pathlib.Path(sys.argv[2]) / sys.argv[1].replace("/", "__")
out.mkdir()
text = pathlib.Path(sys.argv[3]).read_text()
(out / "results_2026-01-01T00-00-00.000000.json").write_text(text.replace('"acc,none": 0.5', '"acc,none": 0.125'))
time.sleep(0.05)
(out / "results_2025-01-01T00-00-00.000000.json").write_text(text)
(out / "samples_lines_2026-01-01T00-00-00.000000.jsonl").write_text('{"acc": 1}\\n')
print("|Tasks|Version|Filter|")
"""
RESULTS = json.loads(RECORDED.read_text(encoding="utf-8"))["results"]


@pytest.fixture
def recorded(tmp_path: Path) -> str:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN, encoding="utf-8")
    return shlex.join([sys.executable, str(script), "{model}", "{out}", str(RECORDED)])


@pytest.mark.parametrize(
    ("metric", "task", "key"),
    [
        ("lines.acc", "lines", "acc,none"),
        ("lines.acc,none", "lines", "acc,none"),
        ("lines.acc_norm", "lines", "acc_norm,none"),
        ("lines.acc_stderr", "lines", "acc_stderr,none"),
        ("results.lines.acc,none", "lines", "acc,none"),
        ("stdlib.acc", "stdlib", "acc,none"),  # a group
        ("groups.stdlib.acc,none", "stdlib", "acc,none"),
        ("spelt.exact_match,lenient", "spelt", "exact_match,lenient"),
        ("running.byte_perplexity", "running", "byte_perplexity,none"),
    ],
)
def test_numbers_of_the_newest_results_are_named_as_in_the_tables(
    recorded: str, metric: str, task: str, key: str
) -> None:
    assert Score(recorded, metric).of(Path("out/model")) == RESULTS[task][key]


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("spelt.exact_match", "but `spelt.exact_match,lenient`, `spelt.exact_match,strict`"),
        ("running.bits_per_byt", "but `running.bits_per_byte,none`"),
        ("running.bits_per_byte_stderr", "no number"),  # it writes N/A
        ("nothing", "but `stdlib.acc,none`"),
    ],
)
def test_a_number_that_is_not_there_is_told_with_those_that_are(recorded: str, metric: str, said: str) -> None:
    with pytest.raises(ScoreFailed) as caught:
        Score(recorded, metric).of(Path("out/model"))
    assert said in caught.value.problems[0].message


def test_a_search_by_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    installed = importlib.util.find_spec("lm_eval") is not None
    maker.write_models(tmp_path)
    maker.write_tasks(tmp_path / "tasks")
    command = maker.command(sys.executable, "running") if installed else recorded
    recipe = {
        "version": 1,
        "models": {"a": "./a", "b": "./b"},
        "steps": {"m": {"use": "interpolate", "of": ["a", "b"], "with": {"t": {"choice": [0.0, 0.5]}}}},
        "score": {"command": command, "metric": "running.byte_perplexity", "goal": "min"},
        "save": {"to": "out/best"},
    }
    Path("r.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    found = mergekit_lite.search("r.yaml", out=tmp_path / "study", sampler="grid")
    assert {trial.state for trial in found.trials} == {"done"}
    first = next(t for t in found.trials if t.values["steps.m.with.t"] == 0.0)
    wanted = byte_perplexity(tmp_path) if installed else RESULTS["running"]["byte_perplexity,none"]
    assert first.scores["running.byte_perplexity"] == pytest.approx(wanted, rel=1e-4)


def byte_perplexity(folder: Path) -> float:
    """That of model a on the right answers, by hand."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "a", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "a")
    total, count = 0.0, 0
    for line in (folder / "tasks" / "lines.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text = row["choices"][row["answer"]]
        ids = tokenizer(text, add_special_tokens=False).input_ids
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        with torch.no_grad():
            chances = model(torch.tensor([[first, *ids[:-1]]])).logits[0].log_softmax(-1)
        total += float(chances.gather(1, torch.tensor(ids)[:, None]).sum())
        count += len(text.encode())
    return math.exp(-total / count)

"""Tasks of lm-evaluation-harness on text of Python's library, and tiny models to be asked them: no network is needed.

    python tests/evaluate/lm_eval_files.py FOLDER    two models, the tasks, and what the tool says of the first model

What it says, less what is not looked at, is recorded in lm_eval_results.json.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

QUESTIONS = 12
# `lines` is a choice among three, `spelt` is answered in words, which two filters read; `stdlib` is the mean of two.
TASKS = {
    "lines": """\
task: lines
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{line}}\\n"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
              {metric: acc_norm, aggregation: mean, higher_is_better: true}]
""",
    "spelt": """\
task: spelt
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{line}}\\n"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: strict, filter: [{function: take_first}]}
  - {name: lenient, filter: [{function: regex, regex_pattern: "(.)"}, {function: take_first}]}
""",
    "running": """\
task: running
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{choices[answer]}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "other_lines": "include: lines.yaml\ntask: other_lines\nnum_fewshot: 1\nfewshot_split: test\n",
    "stdlib": """\
group: stdlib
task: [lines, other_lines]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
""",
}


def write_tasks(folder: Path) -> None:
    """The tasks, and the data that they ask about: the line that follows another in Python's library, and two that
    follow others."""
    import argparse

    folder.mkdir(parents=True)
    source = Path(str(argparse.__file__)).read_text(encoding="utf-8").splitlines()
    pairs = [(a, b) for a, b in itertools.pairwise(source) if len(a) > 30 and len(b) > 20 and a != b]
    rows = []
    for number in range(QUESTIONS):
        (line, right), others = pairs[7 * number], [pairs[7 * number + k][1] for k in (1, 2)]
        choices = [*others[: number % 3], right, *others[number % 3 :]]
        rows.append({"line": line, "choices": choices, "answer": number % 3})
    data = folder / "lines.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("DATA", json.dumps(str(data))), encoding="utf-8")


def write_models(folder: Path, names: Sequence[str] = ("a", "b")) -> None:
    """Models of random weights with one tokenizer."""
    import vocabulary_models as maker

    tokenizer = maker.byte_level(maker.code(), 400)
    for seed, name in enumerate(names):
        maker.write(folder / name, tokenizer, seed)


def command(python: str, tasks: str, folder: str = "tasks") -> str:
    """The score command, as docs/search.md has it."""
    return (
        f"{python} -m lm_eval run --model hf --model_args pretrained={{model}},dtype=float32 --device cpu "
        f"--tasks {tasks} --include_path {folder} --output_path {{out}}"
    )


def offline() -> dict[str, str]:
    """The environment in which nothing is asked of the Hub."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def shape(results: dict[str, Any]) -> dict[str, Any]:
    """What is recorded of the results of the real tool."""
    kept = ("results", "groups", "group_subtasks", "higher_is_better", "n-samples", "lm_eval_version")
    return {key: results[key] for key in kept if key in results}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    write_tasks(place / "tasks")
    write_models(place)
    words = command(sys.executable, "stdlib,spelt,running", str(place / "tasks"))
    ran = words.format(model=place / "a", out=place / "out").split()
    subprocess.run(ran, check=True, env=offline(), stdout=sys.stderr)
    (file,) = (place / "out").rglob("results_*.json")
    record = json.dumps(shape(json.loads(file.read_text(encoding="utf-8"))), indent=1, sort_keys=True)
    Path(__file__).with_name("lm_eval_results.json").write_text(record + "\n", encoding="utf-8")

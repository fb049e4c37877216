"""`merge plan`: what it prints, in all its forms."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_process import Ran

Merge = Callable[..., Ran]


def test_plan_for_a_person(merge: Merge, folder: Path):
    ran = merge("plan", "ties.yaml", "--threads", "2")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0] == "merged  ties(math, code) - base  weight  7 tensors"
    read = r"  read [\d.]+ kB \(3\.0×\) · "
    assert re.fullmatch(read + r"write [\d.]+ kB in 1 shard · peak [\d.]+ MB · cpu, 2 threads, about \d+ s", lines[1])
    assert lines[2] == "out/ties  from merged"
    assert re.fullmatch(r"  model.safetensors  [\d.]+ kB  7 tensors", lines[3])
    assert len(lines) == 4
    assert not Path("out").exists()


def test_plan_writes_nothing(merge: Merge, folder: Path):
    before = sorted(path for path in folder.rglob("*"))
    assert merge("plan", "ties.yaml", "--tensors").code == 0
    assert sorted(path for path in folder.rglob("*")) == before


@pytest.mark.parametrize("arguments", [["--dag"], ["--dag", "text"], ["--dag=text"]])
def test_dag_as_text(merge: Merge, folder: Path, arguments: list[str]):
    for words in (["plan", "ties.yaml", *arguments], ["plan", *arguments, "ties.yaml"]):
        assert merge(*words) == Ran(0, """\
out/ties
└─ merged  ties  weight, 7 tensors
   ├─ math  ./math
   ├─ code  ./code
   └─ base (base)  ./base
""", "")  # fmt: skip


def test_dag_as_mermaid(merge: Merge, folder: Path):
    ran = merge("plan", "ties.yaml", "--dag", "mermaid")
    assert ran.out.startswith('flowchart LR\n  model0[("base<br>./base")]\n')
    assert ran.out.count("-->") == 3 and ran.out.count("-. base .->") == 1


def test_tensors(merge: Merge, folder: Path):
    ran = merge("plan", "ties.yaml", "--tensors")
    head, columns, *rows = ran.out.splitlines()
    assert head == "out/ties"
    assert re.split(r"  +", columns) == ["tensor", "shape", "dtype", "shard", "offset", "made by"]
    assert len(rows) == 7
    cells = {row.split()[0]: re.split(r"  +", row, maxsplit=5) for row in rows}
    _, shape, dtype, shard, offset, made = cells["model.embed_tokens.weight"]
    assert (shape, dtype, shard, int(offset) > 0) == ("20×8", "BF16", "model.safetensors", True)
    assert made.startswith(
        "add(elect(sparsify(delta(math, base), density=0.2, scope=global), sparsify(delta(code, base)"
    )


def test_json_is_everything(merge: Merge, folder: Path):
    ran = merge("plan", "ties.yaml", "--json", "--threads", "3")
    data = ran.json
    assert (ran.code, ran.err, data["threads"]) == (0, "", 3)
    assert 0 < data["seconds"] < 60
    assert data["steps"] == [
        {
            "name": "merged",
            "use": "ties",
            "of": ["math", "code"],
            "base": "base",
            "with": {},
            "space": "weight",
            "tensors": 7,
        }
    ]
    (output,) = data["outputs"]
    assert (output["to"], output["config_from"], len(output["shards"][0]["tensors"])) == ("out/ties", "base", 7)
    assert data["bytes_written"] == output["bytes"] == output["shards"][0]["bytes"]
    assert re.fullmatch(r"[0-9a-f]{64}", data["digest"])


def test_set_and_out(merge: Merge, folder: Path):
    plain = merge("plan", "ties.yaml", "--json").json
    changed = merge("plan", "ties.yaml", "--json", "--set", "steps.merged.with.lambda=0.5", "--out", "elsewhere").json
    assert changed["steps"][0]["with"] == {"lambda": "0.5"}
    assert changed["outputs"][0]["to"] == "elsewhere"
    assert changed["digest"] != plain["digest"]


def test_an_occupied_output_is_refused(merge: Merge, folder: Path):
    Path("out/ties").mkdir(parents=True)
    Path("out/ties/mine.txt").write_text("keep", encoding="utf-8")
    ran = merge("plan", "ties.yaml")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith("error: the output folder `out/ties` exists and is not empty\n  --> ties.yaml:10:12\n")


def test_warnings_go_to_stderr_and_into_json(merge: Merge, folder: Path):
    text = (
        Path("ties.yaml")
        .read_text(encoding="utf-8")
        .replace("steps:", "steps:\n  idle: {use: linear, of: [math, code]}")
    )
    Path("idle.yaml").write_text(text.replace("{to:", "{step: merged, to:"), encoding="utf-8")
    ran = merge("plan", "idle.yaml")
    assert ran.code == 0
    assert ran.err.startswith("warning: step `idle` is used by nothing and will not run\n  --> idle.yaml:4:3\n")
    assert "warning" not in ran.out
    (warning,) = merge("plan", "idle.yaml", "--json").json["warnings"]
    assert warning["message"] == "step `idle` is used by nothing and will not run"


def test_a_missing_checkpoint(merge: Merge, folder: Path):
    ran = merge("plan", "ties.yaml", "--set", "models.math=./nowhere", "--set", "models.code=./nothing")
    assert (ran.code, ran.out) == (4, "")
    assert ran.err.count("error: ") == 2

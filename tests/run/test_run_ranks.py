"""Several processes share a merge: the bytes are those of one process, and nobody waits for a rank that is gone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_for_runs import STEPS, digests, merged, write_models, write_recipe
from safetensors.torch import load_file, save_file

from mergekit_lite import StoppedError, load_recipe, plan, run
from mergekit_lite.plan.model import Plan
from mergekit_lite.report.verify import verify
from mergekit_lite.run.finish import input_files
from mergekit_lite.run.journal import Journal, path_of
from mergekit_lite.run.peers import LAST, Peers
from mergekit_lite.run.ranks import OtherRank, Place, Ranks, divide
from mergekit_lite.run.start import open_run
from tests.faults.kill import PROGRAM

ROOT = Path(__file__).parents[2]
# Copies, single elements, statistics of a tensor and of all tensors, rows, whole matrices, chains.
NAMES = ("stack", "linear", "ties_by_tensor", "ties", "breadcrumbs_by_row", "iso_c", "knots_global", "staged")
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no"]

# Runs recipes one after the other, as many ranks as the launcher says; what each rank sees goes to REPORT.rank.
SCRIPT = """
import json, sys
from mergekit_lite import MergeError, load_recipe, plan, run
from mergekit_lite.run.ranks import launched

ranks, found = launched(), {}
for name, text in json.loads(sys.argv[2]).items():
    paths, strict = text
    path = paths[min(int(ranks.number), len(paths) - 1)]
    try:
        made = ranks.agree(lambda: plan(load_recipe(path), threads=1))
        result = run(made, threads=1, strict=strict, ranks=ranks)
        shards = [digest for files in result.shards.values() for digest in files.values()]
        found[name] = [shards, dict(result.nonfinite), result.bytes_read]
    except MergeError as fault:
        found[name] = [fault.exit_code, str(fault)]
with open(f"{sys.argv[1]}.{ranks.number}", "w") as file:
    json.dump(found, file)
"""
# As tests/faults/kill.py, on one rank alone.
KILLED = f"""
import os
if os.environ.get("SIGNAL_RANK") != os.environ["RANK"]:
    os.environ.pop("SIGNAL_AT", None)
{PROGRAM}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), torch.bfloat16)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start(*words: str, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [sys.executable, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start_ranks(count: int, *words: str, **variables: str) -> list[subprocess.Popen[str]]:
    """Ranks as a launcher starts them, without one that ends the others when one ends."""
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **variables}
    return [start(*words, **place, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]


def end(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=120)
            found.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return found


def write_recipes(folder: Path, models: Path) -> dict[str, Path]:
    """A recipe for each of NAMES and one with two saves, all in several shards."""
    found = {
        name: write_recipe(folder / f"{name}.yaml", models, STEPS[name], folder / name, save=", shard: 500KB")
        for name in NAMES
    }
    text = found["staged"].read_text().split("save:")[0]
    saves = f"save:\n  - {{step: m, to: {folder / 'x'}}}\n  - {{step: turned, to: {folder / 'y'}, dtype: float16}}\n"
    found["saves"] = folder / "saves.yaml"
    found["saves"].write_text(text + saves)
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_the_bytes_of_one_process(count: int, models: Path, tmp_path: Path) -> None:
    for side in ("alone", "ranks"):
        (tmp_path / side).mkdir()
    expected = {name: merged(path) for name, path in write_recipes(tmp_path / "alone", models).items()}
    recipes = write_recipes(tmp_path / "ranks", models)
    broken = tmp_path / "models"
    shutil.copytree(models, broken)
    (last,) = broken.glob("b/*00002-of*")
    save_file(load_file(last) | {"lm_head.weight": torch.full((300, 700), torch.nan)}, last, {"format": "pt"})
    nan = write_recipe(tmp_path / "nan.yaml", broken, STEPS["linear"], tmp_path / "nan")
    missing = write_recipe(tmp_path / "missing.yaml", tmp_path / "nowhere", STEPS["linear"], tmp_path / "nan")
    work: dict[str, tuple[list[Path], bool]] = {name: ([path], False) for name, path in recipes.items()}
    other = write_recipe(tmp_path / "other.yaml", broken, STEPS["slerp"], tmp_path / "nan")
    work["differ"] = ([nan, other], False)
    work["missing"] = ([nan, missing], False)
    work["strict"] = ([nan], True)
    words = [str(tmp_path / "report"), json.dumps(work, default=str)]
    if count == 2:
        (tmp_path / "script.py").write_text(SCRIPT)
        options = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", free_port()]
        ended = end([start(*LAUNCH, *options, str(tmp_path / "script.py"), *words)])
    else:
        ended = end(start_ranks(count, "-c", SCRIPT, *words))
    assert not any(code for code, _, _ in ended), ended
    told = [json.loads((tmp_path / f"report.{rank}").read_text()) for rank in range(count)]
    for name, result in expected.items():
        shards, nonfinite, read = told[0][name]
        assert (shards, nonfinite) == (digests(result), result.nonfinite), name
        theirs = [rank[name][2] for rank in told[1:]]
        if name in ("ties", "knots_global"):
            assert read > result.bytes_read  # every rank measures all tensors
        else:
            assert read == result.bytes_read, name
            assert sum(theirs) < read and min(theirs) > 0.5 * read / count, name
        for folder in ("x", "y") if name == "saves" else (name,):
            ours, alone = (tmp_path / side / folder for side in ("ranks", "alone"))
            assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in alone.iterdir())
            lock = (ours / "recipe.lock.yaml").read_text().replace(str(tmp_path / "ranks"), str(tmp_path / "alone"))
            other = (alone / "recipe.lock.yaml").read_text()
            # Digests of what names the folders: recipe.yaml, and in the last line all that is above it. `verify` holds
            # them against the files.
            assert not verify(str(ours)).faults and not verify(str(alone)).faults
            names_folders = r"(?<=file: recipe\.yaml\n)(.*\n)\s+blake3: .*|# blake3: .*"
            assert re.sub(names_folders, "", lock) == re.sub(names_folders, "", other)

    for rank in told:
        assert rank["differ"][0] == 2 and "rank 1 (process " in rank["differ"][1]
    assert [rank["missing"][0] for rank in told] == [5] + [4] * (count - 1)
    assert "cannot start: there is no checkpoint" in told[0]["missing"][1]
    assert [rank["strict"][0] for rank in told] == [5] * (count - 1) + [4]
    for rank in told[:-1]:
        assert re.search(rf"rank {count - 1} \(process \d+ on .*failed: `lm_head.weight`", rank["strict"][1])


def test_a_killed_rank_and_going_on_with_any_number(models: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", models, STEPS["ties"], tmp_path / "out", save=", shard: 500KB")
    expected = digests(merged(recipe))
    shutil.rmtree(tmp_path / "out")
    program = tmp_path / "program.py"
    program.write_text(KILLED)
    killing = {"SIGNAL_RANK": "1", "SIGNAL_AT": f"unit 1 {signal.SIGKILL}"}
    one = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", free_port(), str(program)]
    ((code, out, err),) = end([start(*LAUNCH, *one, "run", str(recipe), "--json", **killing)])
    assert code != 0 and not (tmp_path / "out").exists()
    # The launcher may have been quicker than rank 0 to see it, but not to say it.
    assert re.search(r"error: rank 1 \(process \d+ on .*\) ended without a word", err) and err.count("error: ") == 1
    assert json.loads(out)["error"]["exit_code"] == 5
    folder, kept = tmp_path / "out.partial", tmp_path / "kept"
    assert path_of(folder, 0).exists() and path_of(folder, 1).read_text().count('"unit"') >= 1
    folder.rename(kept)

    def restore() -> int:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(kept, folder)
        return len(
            {line for path in kept.glob("journal*") for line in path.read_text().splitlines() if '"unit"' in line}
        )

    finished = restore()
    result = run(plan(load_recipe(recipe)), threads=1, resume=True)
    assert (digests(result), result.resumed) == (expected, finished)

    words = [str(program), "run", str(recipe), "--resume", "--json"]
    address = ["--num_processes", "2", "--num_machines", "2", "--main_process_ip", "127.0.0.1"]
    address += ["--main_process_port", free_port()]
    restore()
    ended = end([start(*LAUNCH, *address, "--machine_rank", str(rank), *words) for rank in range(2)])
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert ended[1][1] == ""
    assert_result(ended[0][1], expected, finished)

    restore()
    ended = end(start_ranks(3, *words))
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    assert_result(ended[0][1], expected, finished)
    assert not list((tmp_path / "out").glob("journal*"))


def assert_result(text: str, expected: list[str], resumed: int) -> None:
    found = json.loads(text)
    assert [s["blake3"] for output in found["outputs"] for s in output["shards"]] == expected
    assert found["resumed"] == resumed


def test_rank_0_killed_without_a_launcher(models: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", models, STEPS["linear"], tmp_path / "out")
    killing = {"SIGNAL_RANK": "0", "SIGNAL_AT": f"unit 1 {signal.SIGKILL}"}
    (first, *_), (code, out, err) = end(start_ranks(2, "-c", KILLED, "run", str(recipe), "--json", **killing))
    assert (first, code, out) == (-signal.SIGKILL, 5, "")
    assert re.match(r"error: rank 0 \(process \d+ on .*\) ended without a word: was it killed\?\n", err)
    result = run(plan(load_recipe(recipe)), threads=1, resume=True)
    assert result.resumed >= 1
    assert digests(result) == digests(merged(write_recipe(recipe, models, STEPS["linear"], tmp_path / "alone")))


def test_one_process_needs_no_accelerate(models: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", models, STEPS["stack"], tmp_path / "out")
    code = "import sys; from mergekit_lite.cli.app import execute; print(execute(sys.argv[1:]), *sys.modules)"
    # What `accelerate launch --num_processes 2` gives on a machine without a GPU.
    lone = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    ((_, out, err),) = end([start("-c", code, "run", str(recipe), **lone)])
    exit_code, *modules = out.splitlines()[-1].split()
    assert exit_code == "0" and "mergekit_lite.run.ranks" in modules
    assert not {"accelerate", "torch"} & set(modules)
    assert "accelerate has started one process" in err and "--multi_gpu" in err


# The division, and what ranks say to one another, in one process


@pytest.fixture(scope="module")
def made(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("made")
    return plan(load_recipe(write_recipes(folder, models)["ties_by_tensor"]))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_everything_has_one_rank(made: Plan, count: int) -> None:
    shares = divide(made, input_files(made), count)
    assert len(shares) == count
    assert [unit for share in shares for unit in share.units] == list(made.units)
    assert sorted(n for share in shares for n in share.inputs) == list(range(len(input_files(made))))
    whole = [(0, shard) for shard in range(len(made.outputs[0].shards))]
    assert sorted(shard for share in shares for shard in share.shards) == whole
    largest = max(unit.stop - unit.start for unit in made.units)
    elements = [sum(unit.stop - unit.start for unit in share.units) for share in shares]
    assert max(elements) <= sum(elements) / count + largest


@pytest.fixture
def team(made: Plan) -> Iterator[tuple[list[Ranks], list[Journal], list[Peers]]]:
    """Three ranks of one run, each with its journal."""
    journals: list[Journal] = []
    with contextlib.ExitStack() as stack:
        _, main, _ = stack.enter_context(open_run(made, False, "run"))
        folder = main.path.parent
        stack.callback(shutil.rmtree, folder)
        journals += [main, Journal(folder, 1, "run"), Journal(folder, 2, "run")]
        head = json.loads(main.path.read_bytes().splitlines()[0])
        for journal in journals[1:]:
            journal.begin(head)
            stack.callback(journal.close)
        ranks = [Ranks(number, 3) for number in range(3)]
        for one in ranks:
            one.places = [Place("here", 100), Place("here", 101), Place("there", 102)]
        yield ranks, journals, [Peers(made, one, journals[one.number], (), "run") for one in ranks]


Team = tuple[list[Ranks], list[Journal], list[Peers]]


def test_what_ranks_say(team: Team) -> None:
    _, journals, peers = team
    journals[1].say("merged", [1])
    journals[2].say("merged", [2])
    assert peers[0].exchange("merged", [0]) == [[0], [1], [2]]
    assert peers[2].exchange("merged", [2]) == [[0], [1], [2]]
    for journal in journals[1:]:
        journal.say(LAST, "x")
        journal.close()
    assert peers[0].exchange(LAST, "x") == ["x"] * 3  # one that has said its last word may go


def test_who_failed_is_named(team: Team) -> None:
    ranks, journals, peers = team
    journals[2].close()  # the system does this to a process that is killed
    with pytest.raises(OtherRank, match=r"rank 2 \(process 102 on there\) ended without a word") as found:
        peers[0].exchange("merged", 0)
    assert [one.speaks(found.value) for one in ranks[:2]] == [True, False]
    # The launcher interrupts the others: still it was rank 2.
    with pytest.raises(OtherRank, match="rank 2"), peers[1]:
        raise KeyboardInterrupt
    with pytest.raises(OtherRank, match="rank 2"), peers[0]:
        raise KeyboardInterrupt


def test_a_fault_is_told(team: Team) -> None:
    ranks, _, peers = team
    with pytest.raises(ZeroDivisionError), peers[0]:
        raise ZeroDivisionError("no")
    with pytest.raises(OtherRank, match=r"rank 0 \(process 100 on here\) failed: ZeroDivisionError: no") as found:
        peers[1].leave("x")
    assert [one.speaks(found.value) for one in ranks[1:]] == [True, True]  # each on its own machine


def test_an_interruption_stops_all(team: Team) -> None:
    _, _, peers = team
    with pytest.raises(KeyboardInterrupt), peers[0]:
        raise KeyboardInterrupt
    with pytest.raises(OtherRank, match=r"rank 0 .*was interrupted"):
        peers[1].exchange("merged", 0)


def test_journals_of_ranks_become_one(team: Team, made: Plan) -> None:
    _, journals, _ = team
    found: dict[str, Any] = {"nonfinite": {"x:y": 3}, "overflow": {}}
    for journal, unit in ((journals[0], 0), (journals[1], 1), (journals[1], 2)):
        journal.unit(unit, found)
    journals[2].pool("p", [1, 2])
    folder = journals[0].path.parent
    journals[0].close()
    with pytest.raises(StoppedError, match=r"another run .*is writing into"), open_run(made, True):
        pass  # ranks 1 and 2 are still at work
    journals[1].close()
    journals[2].close()
    with path_of(folder, 2).open("a") as file:
        file.write('{"unit":3,"nonfi')
    for _ in range(2):
        with open_run(made, True) as (_, journal, done):
            assert sorted(done.units) == [0, 1, 2] and done.pools == {"p": [1, 2]}
            assert done.units[2]["nonfinite"] == {"x:y": 3}
        assert sorted(p.name for p in folder.glob("journal*")) == [journal.path.name]

"""`share`: several outputs, one file for what they have in common; whole after any stop, and each by itself."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes_for_runs import write_folder, write_models
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mergekit_lite import InterruptedRun, Result, StoppedError, load_recipe, merge_in_memory, plan, run
from mergekit_lite.cli.app import execute
from mergekit_lite.report.verify import verify
from mergekit_lite.run import finish, start
from mergekit_lite.run.journal import Journal
from mergekit_lite.run.progress import Progress
from tests.faults import kill

TASKS = ("a", "b", "c")
SMALL = {f"model.layers.{i}.{part}": (30, 7 + i) for i in range(3) for part in ("up", "down")} | {"head": (11,)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), torch.bfloat16)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of a few hundred numbers."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(4)
    for name in ("base", *TASKS):
        write_folder(folder / name, {key: torch.randn(shape) for key, shape in SMALL.items()})
    return folder


def write(
    path: Path,
    models: Path,
    shared: Mapping[str, Mapping[str, Any]],
    more: str = "",
    merged: str = "{use: ties, base: base, of: [a, b, c]}",
) -> Path:
    """A recipe with a save, in `out/TASK` beside it, for each task; `shared` are the settings of their `share`."""
    named = ", ".join(f"{name}: {models / name}" for name in ("base", *TASKS))
    lines = ["version: 1", f"models: {{{named}}}", "steps:", f"  merged: {merged}"]
    lines += [f"  for_{t}: {{use: share, of: [merged, {t}], with: {json.dumps(w)}}}" for t, w in shared.items()]
    lines += ["save:", *(f"  - {{step: for_{t}, to: {path.parent / 'out' / t}{more}}}" for t in shared)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def everyone(**settings: Any) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(TASKS, settings)


def made(recipe: Path, threads: int = 2, resume: bool = False, **options: Any) -> Result:
    return run(
        plan(load_recipe(recipe), threads=threads, check_output=not resume), threads=threads, resume=resume, **options
    )


def files_of(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor of an output."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def links(folder: Path) -> list[int]:
    return sorted(path.stat().st_nlink for path in folder.rglob("*.safetensors"))


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


# What comes out


@settings(max_examples=12, deadline=None)
@given(
    taken=st.lists(st.lists(st.sampled_from(list(SMALL)), min_size=1, unique=True), min_size=1, max_size=3),
    shard=st.sampled_from(["5GB", "2KB"]),
    threads=st.sampled_from([1, 3]),
)
def test_what_is_shared_is_one_file(small: Path, taken: Sequence[list[str]], shard: str, threads: int) -> None:
    """Whatever tensors each task shares: tensors that several take lie in one file, all others do not, and the disk
    holds nothing twice."""
    with tempfile.TemporaryDirectory() as scratch:
        shared = {task: {"tensors": names} for task, names in zip(TASKS, taken, strict=False)}
        recipe = write(Path(scratch) / "r.yaml", small, shared, f", shard: {shard}")
        result = made(recipe, threads)
        merged = merge_in_memory(
            load_recipe(recipe, ["save={step: merged}"]), {n: tensors_of(small / n) for n in ("base", *TASKS)}
        )
        out = {task: Path(scratch) / "out" / task for task in shared}
        found = {task: tensors_of(folder) for task, folder in out.items()}
        files = {task: files_of(folder) for task, folder in out.items()}
        for task, settings_ in shared.items():
            own = tensors_of(small / task)
            assert found[task].keys() == own.keys()
            for name, value in found[task].items():
                assert same(value, merged[name] if name in settings_["tensors"] else own[name])
                having = [t for t in shared if name in shared[t]["tensors"]]
                inodes = {t: files[t][name].stat().st_ino for t in shared}
                if task in having:
                    assert files[task][name].stat().st_nlink == len(having)
                    assert [t for t in shared if inodes[t] == inodes[task]] == having
                else:
                    assert files[task][name].stat().st_nlink == 1
            assert not verify(str(out[task])).faults
        seen = {(s.st_dev, s.st_ino): s for folder in out.values() for p in folder.glob("*.safe*") if (s := p.stat())}
        weights = {p.stat().st_ino: p.stat().st_size for f in out.values() for p in f.glob("*.safetensors")}
        assert sum(weights.values()) == result.bytes_written
        assert sum(s.st_blocks * 512 for s in seen.values()) <= result.bytes_written + 8192 * len(seen)


def test_transformers_loads_each_with_the_logits_of_the_parts(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    models = {}
    for seed, name in enumerate(("base", *TASKS)):
        torch.manual_seed(seed)
        models[name] = LlamaForCausalLM(config).eval()
        models[name].save_pretrained(tmp_path / "models" / name)
    shared = everyone(layers=["0-1", "below"])
    made(write(tmp_path / "r.yaml", tmp_path / "models", shared, merged="{use: linear, of: [a, b, c]}"))
    tokens = torch.arange(12)[None]
    for task in TASKS:
        by_hand = {}
        for name, value in models[task].state_dict().items():
            mean = sum(models[t].state_dict()[name] for t in TASKS) / 3
            by_hand[name] = mean if name.startswith(("model.embed", "model.layers.0", "model.layers.1")) else value
        network = LlamaForCausalLM(config).eval()
        network.load_state_dict(by_hand)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / task)
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens).logits, network(tokens).logits, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(loaded(tokens).logits, models[task](tokens).logits, atol=1e-2)


def test_the_bytes_of_one_output_do_not_depend_on_the_others(models: Path, tmp_path: Path) -> None:
    """Saved alone, with other threads and blocks, in memory, and from the lock."""
    recipe = write(tmp_path / "r.yaml", models, everyone(layers=[0, 2]))
    made(recipe)
    expected = contents(tmp_path / "out" / "b")
    lock = (tmp_path / "out" / "b" / "recipe.lock.yaml").read_text()
    alone = load_recipe(recipe, ["save={step: for_b, to: %s}" % (tmp_path / "alone")])
    run(plan(alone, threads=1, block=1 << 10), threads=1, block=1 << 10)
    assert contents(tmp_path / "alone") == expected
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "lock.yaml").write_text(lock)
    again = made(tmp_path / "lock.yaml")
    assert again.changed == () and contents(tmp_path / "out" / "b") == expected
    assert links(tmp_path / "out" / "b") == [1, 3]


def test_shared_tensors_tell_of_themselves_for_every_output(models: Path, tmp_path: Path) -> None:
    """The errors of FP8 and of `decompose`, which the run finds once, stand at each output that has the tensor."""
    merged = "{use: decompose, of: a, with: {rank: 9, share: 0.05}}"
    result = made(write(tmp_path / "r.yaml", models, everyone(layers=[1]), merged=merged))
    name = "model.layers.1.mlp.up_proj"
    told = [result.errors[str(tmp_path / "out" / task)] for task in TASKS]
    assert told[0] == told[1] == told[2] and set(told[0]) == {name} and told[0][name][1] > 0
    assert [set(result.decomposed[str(tmp_path / "out" / task)]["modules"]) for task in TASKS] == [{name}] * 3
    lock = load_recipe(tmp_path / "out" / "c" / "recipe.lock.yaml").lock
    assert lock is not None and all(output["error"]["modules"].keys() == {name} for output in lock["outputs"])


# Each output by itself


def test_an_output_may_go_and_the_others_stay(models: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", models, everyone(layers=["0-1"]))
    made(recipe)
    out = tmp_path / "out"
    before = {task: contents(out / task) for task in TASKS}
    shutil.rmtree(out / "a")
    (out / "b").rename(tmp_path / "moved")
    assert contents(tmp_path / "moved") == before["b"] and contents(out / "c") == before["c"]
    assert not [fault for folder in (tmp_path / "moved", out / "c") for fault in verify(str(folder)).faults]
    assert links(out / "c") == [1, 2]
    # A run into the free folders begins with files of its own.
    other = load_recipe(recipe, ["steps.merged={use: linear, of: [a, b]}", f"save.2.to={out / 'd'}"])
    run(plan(other, threads=1), threads=1)
    assert contents(tmp_path / "moved") == before["b"] and contents(out / "c") == before["c"]
    assert links(out / "c") == [1, 2] and links(out / "d") == [1, 3]


def test_shared_files_are_read_only_and_others_are_not(models: Path, tmp_path: Path) -> None:
    made(write(tmp_path / "r.yaml", models, everyone(layers=["0-1"])))
    for task in TASKS:
        for path in (tmp_path / "out" / task).iterdir():
            shared = path.suffix == ".safetensors" and path.stat().st_nlink > 1
            assert bool(path.stat().st_mode & stat.S_IWUSR) is not shared


def test_verify_tells_a_header_of_another_recipe(models: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", models, everyone(layers=["0-1"]))
    made(recipe)
    out = tmp_path / "out" / "a"
    (shared,) = (path for path in out.glob("*.safetensors") if path.stat().st_nlink > 1)
    data = shared.read_bytes()
    shared.unlink()
    shared.write_bytes(data.replace(b"use: ties", b"use: sces", 1))
    said = [fault.message for fault in verify(str(out)).faults]
    assert any("has other metadata in its header" in text for text in said), said


# Where files cannot have several names


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.EMLINK])
def test_copies_where_the_system_refuses_links(
    code: int, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(tmp_path / "r.yaml", models, everyone(layers=["0-1"]))
    expected = _outcome(made(recipe), tmp_path)
    shutil.rmtree(tmp_path / "out")
    _without_links(monkeypatch, code)
    result = made(recipe)
    assert _outcome(result, tmp_path) == expected
    assert {nlink for task in TASKS for nlink in links(tmp_path / "out" / task)} == {1}
    (note,) = [problem for problem in result.notes if problem.message.startswith("copies, since")]
    assert "out/b/model-00002-of-00002" in note.message and "out/a" not in note.message
    assert result.bytes_written == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.safetensors"))
    assert set(result.linked.values()) == {0}
    assert all(not verify(str(tmp_path / "out" / task)).faults for task in TASKS)


def _without_links(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refused(*names: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refused)


def _outcome(result: Result, folder: Path) -> list[dict[str, Any]]:
    return [{**contents(folder / "out" / task), **result.shards[str(folder / "out" / task)]} for task in TASKS]


def test_outputs_on_two_disks(models: Path, tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev or not os.access(memory, os.W_OK):
        pytest.skip("this machine has no second file system to write to")
    with tempfile.TemporaryDirectory(dir=memory) as far:
        recipe = write(tmp_path / "r.yaml", models, everyone(layers=["0-1"]))
        result = run(plan(load_recipe(recipe, [f"save.1.to={far}/b"]), threads=1), threads=1)
        assert [links(Path(output)) for output in result.outputs] == [[1, 2], [1, 1], [1, 2]]
        assert contents(Path(far) / "b").keys() == contents(tmp_path / "out" / "a").keys()
        assert contents(Path(far) / "b")["model-00002-of-00002.safetensors"] == (
            (tmp_path / "out" / "c" / "model-00002-of-00002.safetensors").read_bytes()
        )
        assert any(f"{far}/b/model-00002" in problem.message for problem in result.notes)


def test_room_is_needed_for_what_is_written_once(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write(tmp_path / "r.yaml", models, everyone(layers=["0-2"]))
    made_plan = plan(load_recipe(recipe), threads=1)
    every = sum(output.nbytes for output in made_plan.outputs)
    assert made_plan.bytes_written < every - 100_000
    monkeypatch.setattr(start, "free_bytes", lambda path: made_plan.bytes_written - 1)
    with pytest.raises(StoppedError, match="bytes free, the output needs"):
        run(made_plan, threads=1)
    monkeypatch.setattr(start, "free_bytes", lambda path: made_plan.bytes_written + 50_000)
    run(made_plan, threads=1)


# Stops


class Unplugged(Exception):
    pass


def _stop(recipe: Path, after: int) -> None:
    """A run that ends after so many units, with its remains left."""

    def unplug(progress: Progress) -> None:
        if progress.phase == "merge" and progress.tensors == after:
            raise Unplugged

    with pytest.raises(Unplugged):
        made(recipe, 1, progress=unplug)


@pytest.mark.parametrize("links_then, links_now", [(True, True), (False, True), (True, False)])
def test_a_stopped_run_goes_on(
    links_then: bool, links_now: bool, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the files were made as copies, or where links would be refused by now: files stay as they are."""
    recipe = write(tmp_path / "r.yaml", models, everyone(layers=["0-1"]))
    expected = _outcome(made(recipe), tmp_path)
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch:
        if not links_then:
            _without_links(patch, errno.EPERM)
        _stop(recipe, 5)
    for left in (tmp_path / "out").glob("*.partial"):  # what was not told of may be anything
        assert links(left) == ([1, 3] if links_then else [1, 1])
    if not links_now:
        _without_links(monkeypatch, errno.EPERM)
    result = made(recipe, resume=True)
    assert result.resumed >= 5 and _outcome(result, tmp_path) == expected
    assert links(tmp_path / "out" / "c") == ([1, 3] if links_then else [1, 1])


@pytest.mark.parametrize("published", [1, 2])
def test_a_stop_between_two_outputs(
    published: int, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some outputs have their names, read-only files in them; the run takes them back and publishes all."""
    recipe = write(tmp_path / "r.yaml", models, everyone(layers=["0-1"]))
    expected = _outcome(made(recipe), tmp_path)
    shutil.rmtree(tmp_path / "out")
    original, calls = finish.publish, []

    def cut(*arguments: Any) -> None:
        if len(calls) == published:
            raise KeyboardInterrupt
        calls.append(original(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(finish, "publish", cut)
        with pytest.raises(InterruptedRun):
            made(recipe)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".partial") == ["b", "c"][2 - published :]
    result = made(recipe, resume=True)
    assert _outcome(result, tmp_path) == expected and not list(out.glob("*.partial"))
    assert [links(out / task) for task in TASKS] == [[1, 3]] * 3
    modes = {path.stat().st_mode & 0o222 for path in out.rglob("*.safetensors") if path.stat().st_nlink > 1}
    assert modes == {0}


def test_files_that_have_names_elsewhere_are_not_written_into(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was stopped before it had begun makes its files anew, and not in place."""
    recipe = write(tmp_path / "r.yaml", models, everyone(layers=["0-1"]))

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "begin", interrupted)
        with pytest.raises(InterruptedRun):
            made(recipe)
    kept = []
    for path in list((tmp_path / "out").rglob("*.safetensors")):
        if path.parent.name == "a.partial":
            path.write_bytes(b"somebody's")
            kept.append(tmp_path / f"kept-{path.name}")
            os.link(path, kept[-1])
    made(recipe, resume=True)
    assert len(kept) == 2 and all(path.read_bytes() == b"somebody's" for path in kept)
    assert links(tmp_path / "out" / "b") == [1, 3] and not verify(str(tmp_path / "out" / "a")).faults


def test_a_link_in_place_of_a_file(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a name in an unfinished folder leads to is neither written nor made writable."""
    recipe = write(tmp_path / "r.yaml", models, everyone(layers=["0-1"]))
    _stop(recipe, 5)
    away = tmp_path / "away"
    away.write_bytes(b"x" * (tmp_path / "out/b.partial/model-00002-of-00002.safetensors").stat().st_size)
    away.chmod(0o444)
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        path = tmp_path / "out" / "b.partial" / name
        path.unlink()
        path.symlink_to(away)
        with pytest.raises(StoppedError, match="cannot open"):
            made(recipe, resume=True)
        assert set(away.read_bytes()) == {ord("x")} and stat.S_IMODE(away.stat().st_mode) == 0o444
        path.unlink()


def test_two_runs_into_one_of_the_outputs(models: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", models, everyone(layers=["0-1"]))
    _stop(recipe, 5)
    before = contents(tmp_path / "out")
    other = load_recipe(recipe, ["save={step: for_c, to: %s}" % (tmp_path / "out" / "b")])
    with pytest.raises(StoppedError, match="holds an unfinished run"):
        run(plan(other, threads=1), threads=1)
    assert contents(tmp_path / "out") == before


# Processes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """A recipe whose run takes some seconds, and the digests of what an undisturbed one gives."""
    folder = tmp_path_factory.mktemp("processes")
    kill.write_models(folder / "models")
    recipe = write(folder / "r.yaml", folder / "models", everyone(layers=["0-2", "below"]), ", shard: 2MB")
    made(recipe)
    return recipe, _taken(folder / "out")


def _taken(out: Path) -> dict[str, dict[str, str]]:
    """The digests of the outputs, which are removed; each shared file has three names."""
    found = {task: kill.digests(out / task) for task in TASKS}
    for task in TASKS:
        assert set(links(out / task)) == {1, 3} and not verify(str(out / task)).faults
    assert not list(out.glob("*.partial"))
    shutil.rmtree(out)
    return found


@pytest.mark.parametrize("at", ["begin 1", "unit 20"])
def test_killed_and_resumed(at: str, whole: tuple[Path, dict[str, dict[str, str]]]) -> None:
    recipe, expected = whole
    code, *_ = kill.finish(kill.start(recipe, "--threads", "2", signal_at=f"{at} {signal.SIGKILL}"))
    assert code == -signal.SIGKILL
    assert made(recipe, resume=True).resumed >= (0 if at.startswith("begin") else int(at.split()[1]))
    assert _taken(recipe.parent / "out") == expected


def test_two_processes_share_the_run(whole: tuple[Path, dict[str, dict[str, str]]]) -> None:
    recipe, expected = whole
    ended = [kill.finish(process) for process in kill.start_ranks(2, recipe)]
    assert [code for code, *_ in ended] == [0, 0], ended
    told = json.loads(ended[0][1])
    assert [output["bytes_linked"] > 0 for output in told["outputs"]] == [False, True, True]
    assert _taken(recipe.parent / "out") == expected


def test_in_a_sandbox(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(models, tmp_path / "models")
    recipe = write(tmp_path / "r.yaml", tmp_path / "models", everyone(layers=["0-1"]))
    assert execute(["run", str(recipe), "--sandbox", str(tmp_path)]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "of it shared with" in shown and links(tmp_path / "out" / "b") == [1, 3]

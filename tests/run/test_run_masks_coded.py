"""Mask stores whose masks are coded: the same bits, the same bytes each time, also where a run is killed."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lite import InputError, RecipeError, Result, StoppedError, load_recipe, plan, run
from mergekit_lite.checkpoint.coded import FRAME
from mergekit_lite.cli.app import execute
from mergekit_lite.report.look import open_location
from mergekit_lite.report.store import look_at_store
from mergekit_lite.run import compress
from mergekit_lite.run.journal import Journal
from tests.faults import kill
from tests.faults.every_call import Bench, bench, tree, write_place
from tests.faults.layer import Layer, NoCompiler

TASKS = ("math", "code", "chat")
SHAPES = {  # one mask of two frames; odd numbers of entries, so that masks end within a byte and within a symbol
    "model.embed_tokens.weight": (1031, 257),
    "model.layers.0.mlp.up_proj.weight": (301, 13),
    "model.norm.weight": (13,),
}
assert FRAME < 1031 * 257 < 2 * FRAME
CODED = "masks-zstd-1.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and a fine-tune for each of TASKS, `plain` and `store`, a plain and a coded store of them."""
    folder = tmp_path_factory.mktemp("coded")
    generator = torch.Generator().manual_seed(5)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for name in ("base", *TASKS):
        tensors = {n: v + (name != "base") * torch.randn(v.shape, generator=generator) for n, v in base.items()}
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text("{}")
    made(folder, "plain", "")
    made(folder, "store")
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has a folder of its own with links to the models, and copies of the stores."""
    for name in ("base", *TASKS):
        (tmp_path / name).symlink_to(place / name)
    for name in ("plain", "store"):
        shutil.copytree(place / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return


def text(to: str, extra: str = ", compress: zstd", tasks: tuple[str, ...] = TASKS) -> str:
    names = ", ".join(f"{name}: ./{name}" for name in ("base", *TASKS))
    deltas = "".join(f"  of_{name}: {{use: delta, of: {name}, base: base}}\n" for name in TASKS)
    of = ", ".join(f"of_{name}" for name in TASKS)
    return (
        f"version: 1\nmodels: {{{names}}}\nsteps:\n{deltas}"
        f"  multi: {{use: linear, of: [{of}], with: {{normalize: false}}}}\n"
        f"save: {{step: multi, as: masks, base: base, tasks: [{', '.join(tasks)}], to: {to}{extra}}}\n"
    )


def made(folder: Path, to: str, extra: str = ", compress: zstd", **options: object) -> Result:
    recipe = folder / f"{to}.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe.write_text(text(to, extra))
        return run(plan(load_recipe(recipe)), **options)  # type: ignore[arg-type]


def task_of(store: str, task: str) -> dict[str, torch.Tensor]:
    recipe = Path("again.yaml")
    recipe.write_text(f'version: 1\nmodels: {{m: "./{store}#{task}"}}\nsave: {{step: m, to: again}}\n')
    run(plan(load_recipe(recipe)), block=70_001)  # blocks that begin and end within frames
    found = load_file("again/model.safetensors")
    shutil.rmtree("again")
    return found


def weights(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.safetensors"))}


def test_a_task_is_bit_for_bit_that_of_the_plain_store() -> None:
    assert list(weights("store")) == [CODED, "model.safetensors", "multi_task.safetensors"]
    for task in TASKS:
        coded, plain = task_of("store", task), task_of("plain", task)
        assert coded.keys() == plain.keys()
        for name, value in plain.items():
            assert torch.equal(coded[name].view(torch.int32), value.view(torch.int32)), (task, name)


def test_tasks_of_one_store_meet_in_a_recipe() -> None:
    """Both are read from the same frames in the same blocks."""
    found = {}
    for store in ("store", "plain"):
        names = ", ".join(f'{task}: "./{store}#{task}"' for task in ("code", "math"))
        recipe = (
            f"version: 1\nmodels: {{{names}}}\nsteps: {{m: {{use: linear, of: [code, math]}}}}\nsave: {{to: both}}\n"
        )
        Path("both.yaml").write_text(recipe)
        run(plan(load_recipe("both.yaml")), threads=2)
        found[store] = load_file("both/model.safetensors")
        shutil.rmtree("both")
    assert all(torch.equal(found["store"][name], value) for name, value in found["plain"].items())


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_blocks_change_no_byte(threads: int, tmp_path: Path) -> None:
    result = made(tmp_path, "other", threads=threads, block=1 << 12)
    found = weights("other")
    assert found == weights("store")
    assert result.bytes_written == sum(map(len, found.values()))
    assert set(result.shards["other"]) == set(found)


def test_more_tasks_than_fit_into_a_symbol() -> None:
    """Nine tasks make files of five and four, and any of them is a model again."""
    names = [f"t{number}" for number in range(9)]
    of = ", ".join(f"{name}: {TASKS[number % 3]}" for number, name in enumerate(names))
    thresholds = ", ".join(f"{name}: {0.1 * number}" for number, name in enumerate(names))
    for to, extra in (("nine", ", compress: zstd"), ("nine_plain", "")):
        recipe = text(to, extra).replace(
            f"tasks: [{', '.join(TASKS)}]", f"tasks: {{{of}}}, threshold: {{{thresholds}}}"
        )
        Path("nine.yaml").write_text(recipe)
        run(plan(load_recipe("nine.yaml")))
    assert {name for name in weights("nine") if name.startswith("mask")} == {CODED, "masks-zstd-2.safetensors"}
    for name in ("t0", "t4", "t5", "t8"):
        coded, plain = task_of("nine", name), task_of("nine_plain", name)
        assert all(torch.equal(coded[key], value) for key, value in plain.items())
    seen = look_at_store(open_location("nine"))
    assert seen is not None and seen.tasks == tuple(sorted(names))


def test_what_is_told_of_a_store(capsys: pytest.CaptureFixture[str]) -> None:
    coded, plain = (look_at_store(open_location(name), masks=True) for name in ("store", "plain"))
    assert coded is not None and plain is not None
    assert coded.compressed and not plain.compressed
    assert (coded.tasks, coded.density, coded.census, coded.coded) == (
        plain.tasks, plain.density, plain.census, plain.coded,
    )  # fmt: skip
    stored = load_file(f"store/{CODED}")
    assert coded.nbytes == sum(
        value.numel() * value.element_size()
        for file in weights("store")
        for value in load_file(f"store/{file}").values()
    )
    assert sum(v.numel() for v in stored.values() if v.dtype == torch.uint8) < plain.nbytes - 2 * coded.apart // 3
    assert execute(["inspect", "store", "--stats", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["masks"]
    assert told["compress"] == "zstd" and told["bytes"] == coded.nbytes
    assert execute(["diff", "store", "plain"]) == 0
    assert execute(["verify", "store"]) == 0
    capsys.readouterr()
    lock = Path("store/recipe.lock.yaml").read_text()
    assert "zstandard:" in lock and CODED in lock and "mask-math" not in lock
    card = Path("store/README.md").read_text()
    numbers = sum(value.numel() for value in load_file("base/model.safetensors").values())
    assert f"| parameters | {2 * numbers:,} |" in card and "coded with zstd for math, code, chat" in card
    assert "zstandard" not in Path("plain/recipe.lock.yaml").read_text()


def test_a_plan_says_that_masks_are_coded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Path("r.yaml").write_text(text("new"))
    assert execute(["plan", "r.yaml"]) == 0
    said = capsys.readouterr().out
    assert "write at most" in said and f"coded at the end: {CODED}" in said
    assert execute(["plan", "r.yaml", "--json"]) == 0
    (output,) = json.loads(capsys.readouterr().out)["outputs"]
    assert (output["compress"], output["coded"]) == ("zstd", [CODED])
    # A lock is checked by the files that there are in the end.
    made(tmp_path, "new")
    assert execute(["plan", "new/recipe.lock.yaml", "--check", "new"]) == 0
    capsys.readouterr()
    assert execute(["run", "new/recipe.lock.yaml", "--out", "again", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0]["bytes"] == sum(map(len, weights("new").values()))
    assert weights("again") == weights("new")


@pytest.mark.parametrize("where", ["_write", "coded", "unlink"])
def test_ctrl_c_while_masks_are_coded(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    owner = {"_write": compress, "coded": Journal, "unlink": Path}[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, interrupted)
        with pytest.raises(BaseException, match="Ctrl-C"):
            made(tmp_path, "other")
    result = made(tmp_path, "other", resume=True)
    assert result.resumed and weights("other") == weights("store")
    assert not Path("other.partial").exists()


def test_a_disk_that_fills_up_while_masks_are_coded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(compress, "_write_all", full)
        with pytest.raises(StoppedError, match="cannot code the masks") as stopped:
            made(tmp_path, "other")
    assert "--resume" in str(stopped.value.problems[0].hint)
    assert made(tmp_path, "other", resume=True) and weights("other") == weights("store")


@pytest.mark.parametrize("count", [1, 2])
def test_killed_once_masks_are_coded(count: int) -> None:
    """`kill -9` between the journal's note and the removal of the plain masks, on 1 process and 2."""
    Path("r.yaml").write_text(text("other"))
    at = f"coded 1 {signal.SIGKILL}"
    code, *_ = kill.finish(kill.start(Path("r.yaml"), "--threads", "1", signal_at=at))
    assert code == -signal.SIGKILL
    assert Path("other.partial/mask-code.safetensors").exists() and not Path("other").exists()
    Path("other.partial/mask-code.safetensors").unlink()  # as if it had come so far
    if count == 1:
        run(plan(load_recipe("r.yaml")), resume=True)
    for process in kill.start_ranks(count, Path("r.yaml"), "--resume") if count > 1 else ():
        code, _, err = kill.finish(process)
        assert code == 0, err
    assert weights("other") == weights("store")


def test_ranks_make_the_same_bytes() -> None:
    Path("r.yaml").write_text(text("other"))
    processes = kill.start_ranks(2, Path("r.yaml"), "--threads", "1")
    for process in processes:
        code, _, err = kill.finish(process)
        assert code == 0, err
    assert weights("other") == weights("store")
    assert execute(["verify", "other"]) == 0


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Bench]:
    if sys.platform != "linux":
        pytest.skip("the faults are made by a library for Linux")
    try:
        layer = Layer(tmp_path)
    except NoCompiler as fault:
        pytest.skip(str(fault))
    write_place(tmp_path / "tiny")
    with layer.forks(torch=True) as fork:
        yield bench(tmp_path / "tiny", "masks", fork)


def test_killed_wherever_masks_are_coded(tiny: Bench) -> None:
    """At the first call of each kind on each file, from the first coded byte to the lock, and at some that come again;
    what comes behind is that of any run."""
    first = next(k for k, line in enumerate(tiny.calls, 1) if "masks-zstd" in line)
    last = next(k for k, line in enumerate(tiny.calls, 1) if line.startswith("write") and "recipe.lock" in line)
    seen: dict[str, int] = {}
    for k, line in enumerate(tiny.calls[first - 1 : last], first):
        if line.split()[0] not in ("open", "close", "preadv") and not line.endswith((".json", ".yaml")):
            seen.setdefault(line, k)
    again = max(k for k, line in enumerate(tiny.calls, 1) if line.startswith("pwrite") and "masks-zstd" in line)
    points = sorted({*seen.values(), again, last})
    assert {tiny.calls[k - 1].split()[0] for k in points} >= {"pwrite", "fsync", "rename", "write", "unlink"}
    for k in points:
        tiny.clear()
        ran = tiny.run(rules=f"path={tiny.outputs} at={k} signal={signal.SIGKILL}")
        assert ran.code == -signal.SIGKILL
        assert not (tiny.outputs / "out").exists()
        resumed = tiny.run("--resume")
        assert resumed.code == 0, resumed.err
        assert tree(tiny.outputs) == tiny.whole, (k, tiny.calls[k - 1])


def test_damage_is_told_with_file_and_tensor() -> None:
    path = Path("store") / CODED
    whole = path.read_bytes()
    start = len(whole) - 40_000  # in a frame of the largest tensor
    path.write_bytes(whole[:start] + bytes(64) + whole[start + 64 :])
    Path("r.yaml").write_text('version: 1\nmodels: {m: "./store#code"}\nsave: {step: m, to: out}\n')
    with pytest.raises(InputError, match=rf"masks `math\+code\+chat/model.*` in `.*{CODED}`: frame [01] "):
        run(plan(load_recipe("r.yaml")))
    path.write_bytes(whole[:start])
    with pytest.raises(InputError, match="truncated"):
        plan(load_recipe("r.yaml"))
    assert execute(["verify", "store"]) == 1


def test_files_that_do_not_fit_are_refused() -> None:
    path = Path("store") / CODED
    stored = load_file(path)
    first = "math+code+chat/model.norm.weight"
    sizes = "math+code+chat:frames/model.norm.weight"
    for changed in (
        {name: value for name, value in stored.items() if name != first},
        {**stored, "math+code+chat/other": torch.zeros(2, dtype=torch.uint8)},
        {**stored, sizes: torch.zeros(2, dtype=torch.uint32)},
        {**stored, sizes: stored[sizes].view(torch.int32)},
        {**stored, first: stored[first].view(1, -1)},
        {name.replace("+code+chat", "+code+code"): value for name, value in stored.items()},
        {name.replace("math+", "../x+"): value for name, value in stored.items()},
    ):
        save_file(changed, path)
        with pytest.raises(InputError) as caught:
            open_location("store#code")
        assert "store" in str(caught.value) and caught.value.problems[0].hint
    save_file(stored, path)
    with pytest.raises(InputError, match="no task `chatt`"):
        open_location("store#chatt")
    path.rename("elsewhere")
    path.symlink_to("../elsewhere")
    with pytest.raises(InputError):
        open_location("store#code")


def test_without_the_library_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError):
        importlib.import_module("zstandard")
    for recipe, error in (
        (text("new"), RecipeError),
        ('version: 1\nmodels: {m: "./store#code"}\nsave: {step: m, to: new}\n', InputError),
    ):
        Path("r.yaml").write_text(recipe)
        with pytest.raises(error, match="zstandard") as caught:
            plan(load_recipe("r.yaml"))
        assert "pip install" in str(caught.value.problems[0].hint)
    assert execute(["inspect", "store"]) == 4
    assert execute(["verify", "store"]) == 0  # digests need no library


@pytest.mark.parametrize(
    "change, says",
    [
        (("compress: zstd", "compress: gzip"), "must be zstd"),
        (("compress: zstd", "compress: [zstd]"), "must be zstd"),
        (("as: masks", "as: lora"), "another kind of save"),
    ],
)
def test_faults_of_the_key_are_told(change: tuple[str, str], says: str) -> None:
    Path("r.yaml").write_text(text("new").replace(*change))
    with pytest.raises(RecipeError) as caught:
        plan(load_recipe("r.yaml"))
    assert any(says in problem.message for problem in caught.value.problems), caught.value


def test_arrays_of_a_coded_file_are_those_of_any_reader() -> None:
    """The sizes of the frames add up to the frames, which lie one after the other as Zstandard's own."""
    import zstandard

    stored = load_file(f"store/{CODED}")
    plain = load_file("plain/mask-code.safetensors")
    for name, shape in SHAPES.items():
        frames = stored[f"math+code+chat/{name}"].numpy().tobytes()
        sizes = stored[f"math+code+chat:frames/{name}"].tolist()
        assert sum(sizes) == len(frames)
        raw, at = b"", 0
        for size in sizes:
            raw += zstandard.ZstdDecompressor().decompress(frames[at : at + size])
            at += size
        # Three tasks: two entries in a byte, of three bits each.
        symbols = np.frombuffer(raw, np.uint8)
        code = np.stack([symbols >> 1 & 1, symbols >> 4 & 1], axis=1).reshape(-1)[: int(np.prod(shape))]
        assert np.array_equal(np.packbits(code, bitorder="little"), plain[f"code/{name}"].numpy())

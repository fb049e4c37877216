"""Mask stores: what is written, what a task becomes again, what stores of strangers may hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lite import InputError, RecipeError, Result, load_recipe, plan, run
from mergekit_lite.cli.app import execute
from mergekit_lite.report.look import open_location
from mergekit_lite.report.store import look_at_store

TASKS = {"math": 0.5, "code": 0.8, "chat": 0.3}
SHAPES = {  # odd numbers of entries, so that a mask ends within a byte
    "model.embed_tokens.weight": (21, 13),
    "model.layers.0.mlp.up_proj.weight": (301, 13),
    "model.norm.weight": (13,),
    "lm_head.weight": (21, 13),
}


@pytest.fixture
def models(tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`base` and a fine-tune for each of TASKS, in float32."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", *TASKS)):
        tiny_checkpoint(tmp_path / name, SHAPES, seed=seed)
    return tmp_path


def text(to: str = "store", extra: str = "") -> str:
    names = ", ".join(f"{name}: ./{name}" for name in ("base", *TASKS))
    deltas = "".join(f"  of_{name}: {{use: delta, of: {name}, base: base}}\n" for name in TASKS)
    of = ", ".join(f"of_{name}" for name in TASKS)
    return (
        f"version: 1\nmodels: {{{names}}}\nsteps:\n{deltas}"
        f"  multi: {{use: linear, of: [{of}], with: {{normalize: false}}}}\n"
        f"save: {{step: multi, as: masks, base: base, tasks: [{', '.join(TASKS)}], "
        f"threshold: {json.dumps(TASKS)}, to: {to}{extra}}}\n"
    )


def made(recipe: str, **options: object) -> Result:
    Path("r.yaml").write_text(recipe)
    return run(plan(load_recipe("r.yaml")), **options)  # type: ignore[arg-type]


def task_of(store: str, task: str, to: str) -> dict[str, torch.Tensor]:
    made(f'version: 1\nmodels: {{m: "./{store}#{task}"}}\nsave: {{step: m, to: {to}}}\n')
    return load_file(f"{to}/model.safetensors")


def digests(result: Result) -> list[str]:
    return [digest for shards in result.shards.values() for digest in shards.values()]


def expected() -> Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]:
    """By task and tensor, the mask and the model, worked out with NumPy."""
    base = {name: value.numpy() for name, value in load_file("base/model.safetensors").items()}
    own = {t: {n: v.numpy() - base[n] for n, v in load_file(f"{t}/model.safetensors").items()} for t in TASKS}
    multi = {n: own["math"][n] + own["code"][n] + own["chat"][n] for n in base}
    found: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for task, threshold in TASKS.items():
        found[task] = {}
        for name in base:
            used = np.abs(own[task][name]) > np.float32(threshold) * np.abs(multi[name] - own[task][name])
            found[task][name] = used, base[name] + np.where(used, multi[name], np.float32(0))
    return found


def test_a_task_becomes_the_model_that_tall_masks_makes(models: Path) -> None:
    made(text())
    for task, tensors in expected().items():
        again = task_of("store", task, f"again_{task}")
        stored = load_file(f"store/mask-{task}.safetensors")
        for name, (used, model) in tensors.items():
            assert np.array_equal(again[name].numpy(), model), (task, name)
            assert np.array_equal(stored[f"{task}/{name}"].numpy(), np.packbits(used.ravel(), bitorder="little"))
    for name, value in load_file("store/model.safetensors").items():
        assert torch.equal(value, load_file("base/model.safetensors")[name])
    assert execute(["verify", "store"]) == 0


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block", [97, 1 << 10])
def test_threads_and_blocks_change_nothing(threads: int, block: int, models: Path) -> None:
    whole = digests(made(text()))
    assert digests(made(text("other"), threads=threads, block=block)) == whole


def test_a_method_that_takes_rows_gives_whole_bytes_too(models: Path) -> None:
    """Blocks of rows of 13 entries do not begin where a byte of the mask does, unless they are made to."""
    mixed = "mixed: {use: nuslerp, of: {math: {weight: 0.3}, code: {weight: 0.7}}, with: {mode: row}}"
    recipe = text().replace("of_math: {use: delta, of: math", f"{mixed}\n  of_math: {{use: delta, of: mixed")
    whole = digests(made(recipe))
    assert digests(made(recipe.replace("to: store", "to: other"), block=97, threads=2)) == whole


def test_the_store_takes_what_it_must(models: Path) -> None:
    made(text())
    entries = [math.prod(shape) for shape in SHAPES.values()]
    seen = look_at_store(open_location("store"), masks=True)
    assert seen is not None
    assert seen.nbytes == 8 * sum(entries) + len(TASKS) * sum(math.ceil(number / 8) for number in entries)
    assert seen.apart == 4 * len(TASKS) * sum(entries)
    uses = {name: sum(expected()[task][name][0].astype(int) for task in TASKS) for name in SHAPES}
    together = np.concatenate([use.ravel() for use in uses.values()])
    shares = [float(np.mean(together == 0)), float(np.mean(together == 1)), float(np.mean(together > 1))]
    assert seen.census == pytest.approx(shares)
    assert seen.density is not None and seen.coded is not None
    for task, tensors in expected().items():
        assert seen.density[task] == pytest.approx(sum(int(used.sum()) for used, _ in tensors.values()) / sum(entries))
    assert seen.coded < seen.nbytes
    assert look_at_store(open_location("base")) is None


def test_half_precision_rounds_the_vector_alone(models: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    for seed, name in enumerate(("base", *TASKS)):
        tiny_checkpoint(models / name, SHAPES, dtype=torch.bfloat16, seed=seed)
    made(text())
    base, multi = load_file("store/model.safetensors"), load_file("store/multi_task.safetensors")
    again = task_of("store", "code", "again")
    for name in SHAPES:
        vector = multi[f"multi_task/{name}"]
        assert vector.dtype == torch.bfloat16
        raw = load_file("store/mask-code.safetensors")[f"code/{name}"].numpy()
        used = torch.from_numpy(np.unpackbits(raw, bitorder="little", count=vector.numel())).view(vector.shape)
        assert torch.equal(again[name], (base[name].float() + vector.float() * used).bfloat16())
    made(text("wide", ", dtype: float32"))
    assert load_file("wide/multi_task.safetensors")["multi_task/model.norm.weight"].dtype == torch.float32
    assert load_file("wide/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_a_stopped_store_goes_on(models: Path) -> None:
    whole = digests(made(text()))

    def unplug(progress: object) -> None:
        if getattr(progress, "phase", "") == "merge":
            raise KeyboardInterrupt

    with pytest.raises(BaseException):  # noqa: B017  Ctrl-C comes as an error of ours or as itself
        made(text("other"), progress=unplug)
    assert digests(made(text("other"), resume=True)) == whole


def test_what_does_not_fit_is_refused(models: Path) -> None:
    made(text())
    mask = load_file("store/mask-code.safetensors")
    vector = load_file("store/multi_task.safetensors")

    def fault(location: str) -> str:
        with pytest.raises(InputError) as caught:
            open_location(location)
        return caught.value.problems[0].message + (caught.value.problems[0].hint or "")

    assert "did you mean `code`" in fault("store#cod")
    assert "no mask store" in fault("base#code")
    assert "no task `../base/model`" in fault("store#../base/model")
    assert "put together by a run" in fault("store#code")
    first = next(iter(mask))
    for changed in (
        {name: value[:-1] if name == first else value for name, value in mask.items()},
        {name: value for name, value in mask.items() if name != first},
        {**mask, "code/other": torch.zeros(2, dtype=torch.uint8)},
        {name: value.float() for name, value in mask.items()},
        {name.replace("code/", "math/"): value for name, value in mask.items()},
    ):
        save_file(changed, "store/mask-code.safetensors")
        assert "store" in fault("store#code")
    save_file(mask, "store/mask-code.safetensors")
    save_file({name: value.flatten() for name, value in vector.items()}, "store/multi_task.safetensors")
    assert "does not fit the base's tensor" in fault("store#code")


def test_a_link_to_a_mask_elsewhere_is_refused(models: Path) -> None:
    made(text())
    Path("elsewhere").mkdir()
    Path("store/mask-code.safetensors").rename("elsewhere/mask-code.safetensors")
    Path("store/mask-code.safetensors").symlink_to("../elsewhere/mask-code.safetensors")
    with pytest.raises(InputError):
        open_location("store#code")


def test_a_sandbox_holds_for_stores(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(text())
    Path("box").mkdir()
    Path("box/link").symlink_to("../store")
    Path("box/r.yaml").write_text('version: 1\nmodels: {m: "box/link#code"}\nsave: {step: m, to: box/out}\n')
    assert execute(["plan", "box/r.yaml", "--sandbox", "box"]) == 3
    assert "sandbox" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, says",
    [
        ((", base: base,", ","), "names its `base`"),
        (("step: multi, ", ""), "its `step`"),
        (("tasks: [math, code, chat]", "tasks: [math, math]"), "given twice"),
        (("tasks: [math, code, chat]", "tasks: 3"), "`tasks` must name"),
        (('"chat": 0.3', '"chatt": 0.3'), "no task `chatt`"),
        (('"chat": 0.3', '"chat": -1'), "from 0 on"),
        (("as: masks", "as: masks, rank: 4"), "another kind of save"),
        (("as: masks", "as: mask"), "or masks"),
        (("as: masks", "as: masks, tokenizer: base"), "vocabulary of its base"),
    ],
)
def test_faults_of_a_save_are_told(change: tuple[str, str], says: str, models: Path) -> None:
    assert change[0] in text()
    with pytest.raises(RecipeError) as caught:
        made(text().replace(*change))
    assert any(says in problem.message for problem in caught.value.problems), caught.value
    assert not list(models.glob("store*"))


ORACLES = {c["id"]: c for c in json.loads((Path(__file__).parents[1] / "oracles.json").read_text())["cases"]}


def store_of(place: Path, deltas: Mapping[str, torch.Tensor], threshold: float, name: str) -> str:
    """A store of tasks that change a base of zeros by these deltas."""
    models = {"base": torch.zeros_like(next(iter(deltas.values()))), **deltas}
    for model, tensor in models.items():
        folder = place / name / model
        folder.mkdir(parents=True)
        save_file({"w": tensor}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}", encoding="utf-8")
    places = ", ".join(f"{model}: {place / name / model}" for model in models)
    of = ", ".join(deltas)
    made(
        f"version: 1\nmodels: {{{places}}}\n"
        f"steps: {{multi: {{use: task_arithmetic, base: base, of: [{of}], with: {{lambda: 1}}}}}}\n"
        f"save: {{as: masks, step: multi, base: base, tasks: [{of}], threshold: {threshold}, "
        f"to: {place / name}/store}}\n"
    )
    return f"{place / name}/store"


def test_the_census_is_the_oracles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    case = ORACLES["consensus/census"]
    masks = [torch.tensor(mask["data"]) for mask in case["inputs"]["masks"]]
    # Without a threshold a task uses what it has changed.
    store = store_of(tmp_path, {f"t{i}": mask.float() for i, mask in enumerate(masks)}, 0.0, "census")
    seen = look_at_store(open_location(store), masks=True)
    assert seen is not None and seen.census is not None
    counts = [share * masks[0].numel() for share in seen.census]
    assert counts == pytest.approx([case["expected"][name] for name in ("catastrophic", "selfish", "shared")])


def test_a_store_takes_the_bits_of_the_oracle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    case = ORACLES["tall_masks/storage_bits"]
    generator = torch.Generator().manual_seed(1)
    count, tasks = case["params"]["num_params"], case["params"]["num_tasks"]
    deltas = {f"t{i}": torch.randn(count, generator=generator) for i in range(tasks)}
    seen = look_at_store(open_location(store_of(tmp_path, deltas, 0.4, "bits")))
    assert seen is not None
    assert (8 * seen.nbytes, 8 * seen.apart) == (case["expected"]["shared_plus_masks"], case["expected"]["separate"])

"""What has gone wrong in merges elsewhere, and must not here.

The numbers are those of a list of faults that were seen in a run of another program. Some of them are tested where
their subject is, and not again here:

3    `test_a_stack_has_its_layers_and_a_config_to_match` and `test_a_shallower_stack` (Qwen2, transformers)
6    `test_experts_keep_their_names_on_disk` (Mixtral)
9    `Place.refused` of test_run_bad_input.py compares every file before and after each refused run;
     `test_what_a_crash_left_is_run_over_again`
11   `test_a_wrong_command_line`, `test_all_faults_of_a_recipe_at_once`, `test_what_is_said_of_a_wrong_recipe`
12   `test_help_of_each_command` and the blocks of the documents, which are run
15   `test_an_output_folder_that_holds_something`, `test_a_journal_of_another_recipe`
16   `test_memory_stays_below_the_plan_whatever_the_size` (linear, slerp, ties, dare_ties)
17   `test_it_is_exact` of test_method_select.py: thresholds are found without sorting a tensor
18   `test_which_files_of_a_folder_are_read` (on disk)
20   `test_threads_and_blocks_do_not_change_a_byte`, `test_random_masks_differ_between_models_and_tensors`

19 is no fault: what is stored in bfloat16 is as exact as bfloat16, whatever dtype the arithmetic had.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mergekit_lite import load_recipe, merge_in_memory, plan, run
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.cli.app import execute
from mergekit_lite.plan.order import walk
from mergekit_lite.run.progress import Progress

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests" / folder) for folder in ("cli", "recipe")]
from cli_process import Ran, command, environ  # noqa: E402
from mergekit_models import BASE, MODELS, largest, merged  # noqa: E402

WEIGHTS = "model.safetensors"
DECODER = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
LINEAR = "m: {use: linear, of: {a: {weight: 0.25}, b: {weight: 0.75}}}"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "r.yaml") -> Path:
    Path(name).write_text(text, encoding="utf-8")
    return Path(name)


def native(step: str, *models: str, to: str = "out") -> Path:
    """A recipe of one step over folders of the working directory."""
    names = ", ".join(f"{name}: ./{name}" for name in models)
    return write(f"version: 1\nseed: 9\nmodels: {{{names}}}\nsteps:\n  {step}\nsave: {{to: {to}}}\n")


def process(*arguments: str, program: Sequence[str] = (), **environment: str) -> Ran:
    """A command in a process of its own; `program` goes before its arguments in place of `merge`."""
    words = [*program, *arguments] if program else command(*arguments)
    done = subprocess.run(words, env=environ(**environment), capture_output=True, text=True, timeout=120)
    return Ran(done.returncode, done.stdout, done.stderr)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def variants(model: Any, *names: str) -> None:
    """A model of transformers and fine-tunes of it, each in its folder."""
    for name in names:
        model.save_pretrained(name)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.02 * torch.randn(value.shape))


def loaded(auto: Any, folder: str) -> Any:
    """What transformers makes of a folder, with nothing missing and nothing too many."""
    model, info = auto.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def is_the_mean(auto: Any) -> None:
    ours, a, b = (dict(loaded(auto, folder).named_parameters()) for folder in ("out", "a", "b"))
    for name, value in ours.items():
        torch.testing.assert_close(value, 0.25 * a[name] + 0.75 * b[name], rtol=1e-6, atol=1e-7)


def test_1_configuration_and_tokenizer_are_those_of_the_first_model(tiny_checkpoint: Callable[..., Path]) -> None:
    """Without a base, which model gives the configuration must not depend on the hash seed of the process."""
    for number, name in enumerate(("zeta", "alpha", "mid")):
        tiny_checkpoint(Path(name), seed=number)
        config = json.loads(Path(name, "config.json").read_text()) | {"max_position_embeddings": 512 * (number + 1)}
        Path(name, "config.json").write_text(json.dumps(config))
        Path(name, "tokenizer.json").write_text(json.dumps({"of": name}))
    models = ", ".join(f"{{model: {name}, parameters: {{weight: 1}}}}" for name in ("./zeta", "./alpha", "./mid"))
    write(f"models: [{models}]\nmerge_method: linear\ndtype: bfloat16\n", "their.yml")
    found = []
    for seed in ("0", "1"):
        ran = process("run", "their.yml", "--out", f"out{seed}", PYTHONHASHSEED=seed)
        assert ran.code == 0, ran.err
        found.append({name: data for name, data in contents(Path(f"out{seed}")).items() if "lock" not in name})
    assert found[0] == found[1]
    assert json.loads(found[0]["config.json"])["max_position_embeddings"] == 512
    assert json.loads(found[0]["tokenizer.json"]) == {"of": "zeta"}


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 8}},
        {"text_config": {"quantization_config": {"quant_method": "torchao"}}},
    ],
    ids=["configured", "configured for the text part"],
)
def test_2_codes_are_not_numbers(config: Mapping[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Codes must not be averaged, nor be cast: they are refused or copied byte for byte."""
    for name in "ab":
        Path(name).mkdir()
        codes = torch.randn(128, 128).to(torch.float8_e4m3fn)
        tensors = {"model.layers.0.q.weight": codes, "model.layers.0.q.weight_scale_inv": torch.rand(1, 1) / 1000}
        save_file({**tensors, "model.norm.weight": torch.randn(8).bfloat16()}, Path(name, WEIGHTS))
        Path(name, "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    for text in (
        f"version: 1\nmodels: {{a: ./a, b: ./b}}\nsteps: {{{LINEAR}}}\nsave: {{to: out}}\n",
        "version: 1\nmodels: {a: ./a}\nsave: {step: a, to: out, dtype: bfloat16}\n",
        "merge_method: passthrough\nmodels: [{model: ./a}]\ndtype: bfloat16\n",
        "merge_method: slerp\nbase_model: ./a\nmodels: [{model: ./b}]\nparameters: {t: 0.5}\n",
    ):
        assert execute(["run", str(write(text)), "--out", "out"]) == 3
        assert "is quantised: its numbers are codes" in capsys.readouterr().err
        assert not Path("out").exists()
    assert execute(["run", str(native("m: {use: stack, of: [a]}", "a"))]) == 0
    ours, theirs = load_file(Path("out", WEIGHTS)), load_file(Path("a", WEIGHTS))
    assert {name: value.dtype for name, value in ours.items()} == {name: v.dtype for name, v in theirs.items()}
    assert all(torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in theirs)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
        {},
    ],
    ids=["configured", "configured for the text part", "told by the scales alone"],
)
def test_2_codes_of_fp8_are_multiplied_by_their_scales(config: Mapping[str, Any]) -> None:
    """Where scales are stored beside 8-bit codes, what is averaged, cast or copied are the products."""
    name = "model.layers.0.q.weight"
    products = []
    for number, place in enumerate("ab"):
        Path(place).mkdir()
        codes = torch.randn(128, 128, generator=torch.Generator().manual_seed(number)).to(torch.float8_e4m3fn)
        scale = torch.tensor([[0.5 + number]])
        save_file({name: codes, f"{name}_scale_inv": scale}, Path(place, WEIGHTS))
        Path(place, "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        products.append(codes.float() * scale)
    both = 0.25 * products[0] + 0.75 * products[1]
    for text, expected in (
        (f"version: 1\nmodels: {{a: ./a, b: ./b}}\nsteps: {{{LINEAR}}}\nsave: {{to: out}}\n", both),
        ("version: 1\nmodels: {a: ./a}\nsave: {step: a, to: out}\n", products[0]),
        ("version: 1\nmodels: {a: ./a}\nsteps: {m: {use: stack, of: [a]}}\nsave: {to: out}\n", products[0]),
        ("version: 1\nmodels: {a: ./a}\nsave: {step: a, to: out, dtype: bfloat16}\n", products[0].bfloat16()),
    ):
        assert execute(["run", str(write(text))]) == 0
        found = load_file(Path("out", WEIGHTS))
        assert found.keys() == {name} and found[name].dtype == expected.dtype and torch.equal(found[name], expected)
        assert "quantization_config" not in Path("out", "config.json").read_text()
        shutil.rmtree("out")


def test_3_a_deeper_qwen3_has_a_type_for_every_layer() -> None:
    """More layers must not leave the per-layer lists of the configuration at their old length."""
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention"] * 2
    config = Qwen3Config(**DECODER, num_hidden_layers=4, use_sliding_window=True, layer_types=kinds)
    variants(Qwen3ForCausalLM(config), "a", "b")
    slices = "- sources: [{model: ./a, layer_range: [0, 4]}]\n- sources: [{model: ./b, layer_range: [1, 4]}]\n"
    write(f"slices:\n{slices}merge_method: passthrough\n")
    assert execute(["run", "r.yaml", "--out", "out"]) == 0
    model = loaded(AutoModelForCausalLM, "out")
    assert model.config.layer_types == kinds + kinds[1:]
    assert len(model.model.layers) == model.config.num_hidden_layers == 7
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(6)[None]).logits).all()


NO_NETWORK = """
import os, sys

def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        os.write(2, f"{event} {arguments}".encode())
        os._exit(99)

sys.addaudithook(hook)
from mergekit_lite.cli.app import execute
sys.exit(execute(sys.argv[1:]))
"""


@pytest.mark.parametrize("offline", ["", "1"])
def test_4_local_models_need_no_network(offline: str, tiny_checkpoint: Callable[..., Path]) -> None:
    """A run over folders must not ask the Hub anything, though their relative paths look like ids of the Hub."""
    for number, name in enumerate(("lab/one", "lab/two")):
        tiny_checkpoint(Path(name), seed=number)
        Path(name, "tokenizer.json").write_text("{}")
    write("merge_method: slerp\nbase_model: lab/one\nmodels: [{model: lab/two}]\nparameters: {t: 0.5}\n")
    program = (sys.executable, "-c", NO_NETWORK)
    ran = process("run", "r.yaml", "--out", "out", program=program, HF_HUB_OFFLINE=offline, HF_HOME="no/such/cache")
    assert ran.code == 0, ran.err
    names = {"README.md", "config.json", "model.safetensors", "recipe.lock.yaml", "recipe.yaml", "tokenizer.json"}
    assert {file.name for file in Path("out").iterdir()} == names


def test_5_an_encoder_without_a_head() -> None:
    """A plain BertModel, whose names have no prefix, must not be left out because no list of names knows it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    variants(BertModel(BertConfig(**sizes, num_hidden_layers=2)), "a", "b")
    assert execute(["run", str(native(LINEAR, "a", "b"))]) == 0
    is_the_mean(AutoModel)


def test_6_experts_stay_apart_where_they_were_apart() -> None:
    """What is stored expert by expert must not come out packed: other programs read the names that the parents have."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
    variants(Qwen3MoeForCausalLM(Qwen3MoeConfig(**DECODER, **experts, num_hidden_layers=2)), "a", "b")
    assert execute(["run", str(native(LINEAR, "a", "b"))]) == 0
    ours, theirs = load_file(Path("out", WEIGHTS)), load_file(Path("a", WEIGHTS))
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items()}
    parts = itertools.product(range(2), range(4), ("gate", "up", "down"))
    assert {f"model.layers.{i}.mlp.experts.{e}.{part}_proj.weight" for i, e, part in parts} <= set(ours)
    is_the_mean(AutoModelForCausalLM)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize(("gamma", "density"), [(0, 1), (0, 0.5), (0.01, 0.9)])
def test_7_a_share_of_outliers_below_one_entry_is_none(method: str, gamma: float, density: float) -> None:
    """A gamma of 0, or a tensor so small that gamma is less than one entry, must not cost the whole change."""
    parameters = f"weight: 1, gamma: {gamma}, density: {density}"
    text = f"merge_method: {method}\nbase_model: ./base\nmodels: [{{model: ./a}}]\nparameters: {{{parameters}}}\n"
    found = merged(Path("r.yaml"), text)
    for name, base in BASE.items():
        delta = MODELS["a"][name] - base
        assert delta.numel() < 100
        torch.testing.assert_close(found[name], base + largest(delta, density))


def test_8_small_changes_keep_their_weights() -> None:
    """The weights of SCE must not become equal because the changes are small; only their ratio counts."""
    text = "merge_method: sce\nbase_model: ./base\nmodels: [{model: ./a}, {model: ./b}]\n"
    a, b = (torch.rand(40, 30, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    for scale in (1.0, 1e-4, 1e-8):
        models = {"base": {"w": torch.zeros(40, 30)}, "a": {"w": scale * a}, "b": {"w": 3 * scale * b}}
        found = merge_in_memory(load_recipe(write(text)), models)["w"]
        shares = torch.stack([a.square().mean(), (3 * b).square().mean()])
        shares = shares / shares.sum()
        torch.testing.assert_close(found / scale, shares[0] * a + shares[1] * 3 * b, rtol=1e-5, atol=1e-6)


def test_9_a_first_attempt_that_failed_leaves_nothing_in_the_way(tiny_checkpoint: Callable[..., Path]) -> None:
    """After a run over a broken download, the same command must do what it would have done at first."""
    for number, name in enumerate("ab"):
        tiny_checkpoint(Path(name), seed=number)
    whole = Path("b", WEIGHTS).read_bytes()
    Path("b", WEIGHTS).write_bytes(whole[:-100])
    recipe = str(native(LINEAR, "a", "b"))
    assert execute(["run", recipe]) == 4
    Path("b", WEIGHTS).write_bytes(whole)
    assert execute(["run", recipe]) == 0
    assert execute(["run", recipe, "--out", "fresh"]) == 0
    assert Path("out", WEIGHTS).read_bytes() == Path("fresh", WEIGHTS).read_bytes()


def test_10_a_weight_of_0_is_a_weight() -> None:
    """0 must not be taken for a weight that is missing, and an input without settings takes the default."""
    models = {name: {"unet.in.weight": torch.randn(5, 3)} for name in "abc"}
    for name, tensors in models.items():
        save_file(tensors, f"{name}.safetensors")
    files = ", ".join(f"{name}: ./{name}.safetensors" for name in "abc")
    step = "{use: linear, of: {a: {weight: 0.0}, b: {weight: 1.0}, c: }}"
    write(f"version: 1\nmodels: {{{files}}}\nsteps: {{m: {step}}}\nsave: {{to: out}}\n")
    assert execute(["run", "r.yaml"]) == 0
    b, c = (models[name]["unet.in.weight"] for name in "bc")
    # The output of single files is one, named as the first.
    torch.testing.assert_close(load_file("out/a.safetensors")["unet.in.weight"], (b + c) / 2)


@pytest.mark.parametrize("threads", [1, 4])
def test_11_as_many_threads_work_as_were_asked_for(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of threads must not be read and then forgotten: each waits with its first read for all the others."""
    layers("ab", 8, 1)
    together, here = threading.Barrier(threads, timeout=30), threading.local()
    original, met = Reader.read_bytes, []

    def read(*arguments: Any) -> None:
        if not hasattr(here, "met"):
            here.met = True
            met.append(threading.current_thread().name)
            together.wait()
        original(*arguments)

    monkeypatch.setattr(Reader, "read_bytes", read)
    assert execute(["run", str(native(LINEAR, "a", "b")), "--threads", str(threads)]) == 0
    assert len(met) == threads


def layers(names: str, count: int, shards: int, shape: tuple[int, ...] = (4, 4)) -> None:
    """Checkpoints of `count` layers over `shards` files, the layers in the order of their numbers."""
    tensors = [f"model.layers.{i}.{part}.weight" for i in range(count) for part in ("attn", "mlp")]
    size = -(-len(tensors) // shards)
    for name in names:
        Path(name).mkdir()
        places = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = tensors[number * size : (number + 1) * size]
            save_file({tensor: torch.randn(shape) for tensor in part}, Path(name, file))
            places |= dict.fromkeys(part, file)
        Path(name, "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        Path(name, "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": count}))


def test_13_every_shard_is_read_once_from_its_start_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 10 must not come before layer 2: files are read in the order of their bytes, each opened once."""
    layers("ab", 24, 6)
    made = plan(load_recipe(native(LINEAR, "a", "b")), threads=1)
    reads: dict[str, list[tuple[str, int]]] = {"a": [], "b": []}
    opened: list[str] = []
    read_bytes, original = Reader.read_bytes, os.open

    def watched(self: Reader, meta: Any, start: int, *rest: Any) -> None:
        reads[Path(meta.file).parent.name].append((meta.file, meta.start + start))
        read_bytes(self, meta, start, *rest)

    monkeypatch.setattr(Reader, "read_bytes", watched)

    def watched_open(path: Any, *rest: Any, **options: Any) -> int:
        # The thread that digests the inputs opens them for itself.
        if any(reads.values()) and threading.current_thread().name != "digest":
            opened.append(str(path))
        return original(path, *rest, **options)

    done: list[int] = []

    def note(progress: Progress) -> None:
        if progress.done == progress.total:
            done.append(len(opened))

    monkeypatch.setattr(os, "open", watched_open)
    run(made, threads=1, progress=note)
    for name in "ab":
        assert len({file for file, _ in reads[name]}) == 6
        assert reads[name] == sorted(reads[name])
    during = [path for path in opened[: done[0]] if Path(path).parent.name in reads]
    assert len(during) == len(set(during)) == 12


def calls(work: Callable[[], Any]) -> int:
    """How many functions are called while `work` runs, in all of its threads."""
    count = itertools.count()

    def tally(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            next(count)

    threading.setprofile(tally)
    sys.setprofile(tally)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return next(count)


@pytest.mark.parametrize("step", [LINEAR, "m: {use: ties, base: a, of: [b]}"], ids=["linear", "ties"])
def test_14_the_work_grows_with_the_number_of_tensors_and_no_faster(step: str) -> None:
    """Twice as many tensors must not take four times the work, in planning or in running."""
    recipe = load_recipe(native(step, "a", "b"))
    planning, running = [], []
    for count in (50, 100, 200):
        names = [f"model.layers.{i}.weight" for i in range(count)]
        models = {model: {name: torch.ones(2) for name in names} for model in "ab"}
        running.append(calls(lambda: merge_in_memory(recipe, models, threads=1)))  # noqa: B023 - it runs at once
        for model, tensors in models.items():
            Path(model).mkdir(exist_ok=True)
            save_file(tensors, Path(model, WEIGHTS))
        planning.append(calls(lambda: plan(recipe, threads=1)))
        made = plan(recipe, threads=1)
        assert len(made.units) == count
        nodes = list(walk(tensor.node for output in made.outputs for tensor in output.tensors))
        assert len(nodes) == len({node.id for node in nodes}) <= 10 * count
    for first, second, third in (planning, running):
        assert third - second < 2.2 * (second - first)


PEAK = """
import sys, threading, time
import mergekit_lite.run.compute
from mergekit_lite import load_recipe, plan, run

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))

for path in sys.argv[1:]:
    made = plan(load_recipe(path), threads=1, block=1 << 17)
    ended, seen = threading.Event(), [0]
    def watch():
        while not ended.is_set():
            seen[0] = max(seen[0], anonymous())
            time.sleep(0.002)
    watcher = threading.Thread(target=watch, daemon=True)
    before = anonymous()
    watcher.start()
    run(made, threads=1, block=1 << 17)
    ended.set()
    watcher.join()
    print(seen[0] - before)
"""
MEASURED = {
    "warm": "{use: sce, base: base, of: [a, b], with: {select_topk: 0.5}}",
    "sce": "{use: sce, base: base, of: [a, b], with: {select_topk: 0.5}}",
    "breadcrumbs_ties": "{use: breadcrumbs_ties, base: base, of: [a, b], with: {density: 0.8}}",
    "model_stock": "{use: model_stock, base: base, of: [a, b]}",
    "ramplus_tl": "{use: ramplus_tl, base: base, of: [a, b]}",
}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the kernel does not say how much memory is used")
def test_16_no_tensor_is_in_memory_as_a_whole() -> None:
    """A large embedding must not be stacked, widened and sorted as a whole: one copy in float32 would have 48 MB."""
    drawn = torch.randn(12_000, 1000).bfloat16()
    for number, name in enumerate(("base", "a", "b")):
        for folder, count in (("small", 1000), ("large", 12_000)):
            Path(folder, name).mkdir(parents=True)
            tensor = drawn[:count] * (1 + number / 50)
            save_file({"model.embed_tokens.weight": tensor}, Path(folder, name, WEIGHTS))
    for method, step in MEASURED.items():
        folder = "small" if method == "warm" else "large"
        names = ", ".join(f"{name}: ./{folder}/{name}" for name in ("base", "a", "b"))
        text = f"version: 1\nmodels: {{{names}}}\nsteps: {{m: {step}}}\nsave: {{to: out/{method}}}\n"
        write(text, f"{method}.yaml")
    ran = process(*(f"{method}.yaml" for method in MEASURED), program=(sys.executable, "-c", PEAK))
    assert ran.code == 0, ran.err
    peaks = dict(zip(MEASURED, map(int, ran.out.split()), strict=True))
    assert max(peaks.values()) < 40_000_000, peaks


COMMIT = "1234567890" * 4
REPOSITORY = {
    "README.md": b"# words",
    "config.json": b'{"model_type": "llama", "num_hidden_layers": 1}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "consolidated.safetensors": save({"tok_embeddings.weight": torch.zeros(2, 2)}),
    "consolidated.00.pth": b"pickle",
    "original/model.safetensors": save({"tok_embeddings.weight": torch.zeros(2, 2)}),
    "original/params.json": b"{}",
    "onnx/model.onnx": b"graph",
    "pytorch_model.bin": b"pickle",
    WEIGHTS: save({"model.layers.0.weight": torch.ones(2, 2)}),
}


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A server that speaks the Hub's protocol for one repository: its address, and the files asked of it."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path, head = self.path.partition("?")[0], f"/org/name/resolve/{COMMIT}/"
            headers = {"Content-Type": "application/json"}
            if path.startswith("/api/models/org/name/tree/"):
                files = [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in REPOSITORY.items()
                ]
                body = json.dumps(files).encode()
            elif path.startswith("/api/models/org/name"):
                siblings = [{"rfilename": file} for file in REPOSITORY]
                body = json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode()
            elif path.startswith(head) and path.removeprefix(head) in REPOSITORY:
                asked.append(path.removeprefix(head))
                body = REPOSITORY[asked[-1]]
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
            else:
                return self.send_error(404)
            self.send_response(200)
            for name, value in (*headers.items(), ("Content-Length", str(len(body)))):
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_18_only_the_files_of_the_model_are_downloaded(hub: tuple[str, list[str]]) -> None:
    """A second copy of the weights in another layout must not be fetched, nor be merged with the first."""
    address, asked = hub
    write("version: 1\nmodels: {m: org/name}\nsave: {step: m, to: out}\n")
    kept = {"HF_HOME": str(Path("cache").absolute()), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    ran = process("run", "r.yaml", HF_ENDPOINT=address, NO_PROXY="127.0.0.1", **kept)
    assert ran.code == 0, ran.err
    assert set(asked) == {"config.json", "tokenizer.json", "chat_template.jinja", WEIGHTS}
    assert load_file(Path("out", WEIGHTS)).keys() == {"model.layers.0.weight"}
    assert COMMIT in Path("out", "recipe.lock.yaml").read_text()


@pytest.mark.parametrize(
    "settings", ["use: dare_linear, with: {drop_rate: 0.6}", "use: della_linear, with: {density: 0.5}"]
)
def test_20_a_random_mask_does_not_know_what_else_is_merged(settings: str) -> None:
    """What is drawn for a model must not change with other models, their order, or the tensors that came before."""
    use, _, more = settings.partition(", ")

    def result(of: str, *names: str) -> Tensor:
        generator = torch.Generator().manual_seed(4)
        drawn = {(m, n): torch.randn(30, 20, generator=generator) for m in ("base", "a", "b") for n in "wxyz"}
        models = {m: {n: drawn[m, n] for n in names} for m in ("base", "a", "b")}
        recipe = native(f"m: {{{use}, base: base, of: {of}, {more}}}", "base", "a", "b")
        return merge_in_memory(load_recipe(recipe), models)["w"]

    alone = result("{a: {weight: 1}}", "w")
    assert torch.equal(result("{a: {weight: 1}, b: {weight: 0}}", "w"), alone)
    assert torch.equal(result("{b: {weight: 0}, a: {weight: 1}}", "w"), alone)
    assert torch.equal(result("{a: {weight: 1}}", "z", "w", "x"), alone)
    assert not torch.equal(result("{b: {weight: 1}}", "w"), alone)

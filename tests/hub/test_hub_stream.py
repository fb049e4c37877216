"""Merges that read models from the Hub by ranges: what is fetched, what comes out, what goes wrong on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hub_models import CONFIG, HEAD, RECIPES, large_shard, model, recipe, weights
from hub_process import TOKEN, Ran, environ
from server import Fault, Hub
from store import File

import mergekit_lite
from mergekit_lite import InputError, RecipeError
from mergekit_lite.checkpoint import ranges, retry
from mergekit_lite.merge import Fetch, Result

NAMES = ("base", "math", "code")
FILES = {name: model(seed) for seed, name in enumerate(NAMES)}
BYTES = {name: weights(files) for name, files in FILES.items()}


@pytest.fixture
def models(hub: Hub) -> Hub:
    """The Hub with `org/base`, `org/math` and `org/code`."""
    for name, files in FILES.items():
        hub.add(f"org/{name}", files)
    return hub


def merged(use: str, fetch: Fetch, to: str, **more: object) -> Result:
    Path(f"{use}.yaml").write_text(recipe(use))
    plan = mergekit_lite.plan(mergekit_lite.load_recipe(f"{use}.yaml"), out=to, threads=2, fetch=fetch)
    return mergekit_lite.run(plan, threads=2, **more)  # type: ignore[arg-type]


def digests(result: Result) -> list[str]:
    return [digest for shards in result.shards.values() for digest in shards.values()]


def cached_weights(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 50_000)


# What is fetched


def test_a_plan_fetches_headers_alone(hub: Hub, merge: Callable[..., Ran], tmp_path: Path) -> None:
    sizes = 0
    for number, name in enumerate(NAMES):
        shard = large_shard(tmp_path / f"{name}.safetensors", (16 + number) << 20)
        sizes += shard.stat().st_size
        hub.add(f"org/{name}", {"model.safetensors": shard, "config.json": b"{}"})
        if number:  # the same shapes, or there is no merge
            hub.repos[f"org/{name}"].put({"model.safetensors": tmp_path / "base.safetensors"})
    (tmp_path / "r.yaml").write_text(f"{HEAD}{RECIPES['linear']}\nsave: {{step: m, to: out/x}}\n")
    ran = merge("plan", "r.yaml", "--json")
    assert ran.code == 0, ran.err
    assert 0 < hub.sent() < sizes / 100
    planned = json.loads(ran.out)
    assert planned["bytes_fetched"] == 2 * (16 << 20)
    assert {name: planned["models"][name]["revision"] for name in ("math", "code")} == {
        name: hub.repos[f"org/{name}"].refs["main"] for name in ("math", "code")
    }
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.parametrize("use", RECIPES)
def test_plans_from_headers_and_from_files_are_one(use: str, models: Hub, here: Path) -> None:
    Path("r.yaml").write_text(recipe(use))
    made = mergekit_lite.load_recipe("r.yaml")
    far = mergekit_lite.plan(made, fetch="stream")
    near = mergekit_lite.plan(made, fetch="cache")
    assert far.digest == near.digest
    assert (far.bytes_read, far.bytes_written) == (near.bytes_read, near.bytes_written)
    # What the cache holds by now is not fetched again.
    models.log.clear()
    again = mergekit_lite.plan(made, fetch="stream")
    assert again.digest == near.digest and models.sent("/objects/") == 0
    assert {shard.path for c in again.checkpoints.values() for shard in c.shards} == {
        shard.path for c in near.checkpoints.values() for shard in c.shards
    }


@pytest.mark.parametrize("use", RECIPES)
def test_streams_give_the_same_bytes_and_are_read_once(use: str, models: Hub, here: Path) -> None:
    streamed = merged(use, "stream", "far")
    assert cached_weights(here / "cache") == 0
    needed = sum(BYTES[name] for name in NAMES if name in streamed_models(use))
    sent = models.sent("/objects/")
    headers = sum(r.sent for r in models.log if r.range == "bytes=0-65535")
    # The last byte of each file is looked at before the merge and after it.
    assert needed <= sent <= needed + headers + 2 * 6
    assert streamed.bytes_fetched == sent - headers
    assert digests(merged(use, "cache", "near")) == digests(streamed)
    for name in ("tokenizer.json", "config.json"):
        assert Path("far", name).read_bytes() == Path("near", name).read_bytes()
    assert not list(here.glob("*.partial"))


def streamed_models(use: str) -> set[str]:
    return {"math", "code"} if use in ("linear", "slerp") else {"base", "math"} if use == "permute" else set(NAMES)


@pytest.mark.parametrize("use", ["ties", "pools", "permute"])
def test_little_memory_costs_what_the_plan_says(
    use: str, models: Hub, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of a few thousand bytes, of which hardly any can be kept: tensors that are read several times, or in
    another order, are fetched once all the same, and statistics over all tensors once for each pass."""
    from mergekit_lite.checkpoint import remote
    from mergekit_lite.plan.streaming import bytes_fetched

    for name, value in (("AHEAD", 1 << 14), ("_LEAST", 1 << 12), ("_MOST", 1 << 12)):
        monkeypatch.setattr(remote, name, value)
    Path("r.yaml").write_text(recipe(use))
    plan = mergekit_lite.plan(mergekit_lite.load_recipe("r.yaml"), out="far", threads=2, fetch="stream")
    models.log.clear()
    result = mergekit_lite.run(plan, threads=2, block=1 << 12)
    sent = models.sent("/objects/")
    # How many passes a statistic takes depends on the numbers: the plan says what is usual.
    planned = bytes_fetched(plan) if use == "ties" else bytes_fetched(plan) * result.bytes_read / plan.bytes_read
    assert sent <= 1.15 * planned
    assert digests(result) == digests(merged(use, "cache", "near"))


# What goes wrong on the way


@pytest.mark.parametrize("use", RECIPES)
def test_a_fifth_of_all_requests_fails(use: str, models: Hub, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_lite.checkpoint import remote

    monkeypatch.setattr(remote, "_LEAST", 1 << 14)
    monkeypatch.setattr(remote, "_MOST", 1 << 14)
    monkeypatch.setattr(retry, "TRIES", 30)
    models.faults[:] = [
        Fault(share=0.05, status=503),
        Fault(share=0.05, status=429, headers={"Retry-After": "0"}),
        Fault(share=0.05, status=500),
        Fault(share=0.05, cut=lambda draw, length: draw.randrange(length)),
        Fault("/objects/", share=0.05, cut=lambda draw, length: draw.randrange(length)),
    ]
    streamed = merged(use, "stream", "far")
    assert all(fault.hit for fault in models.faults), [fault.hit for fault in models.faults]
    models.faults.clear()
    assert digests(merged(use, "cache", "near")) == digests(streamed)


def test_a_cut_connection_is_taken_up_where_it_broke(models: Hub, here: Path) -> None:
    models.faults[:] = [Fault("/objects/", after=6, times=4, cut=10_000)]
    streamed = merged("linear", "stream", "far")
    headers = sum(r.sent for r in models.log if r.range == "bytes=0-65535")
    needed = BYTES["math"] + BYTES["code"]
    assert models.sent("/objects/") <= needed + headers + 2 * 4 + 4
    assert digests(streamed) == digests(merged("linear", "cache", "near"))


def test_signed_addresses_expire(models: Hub, here: Path) -> None:
    Path("r.yaml").write_text(recipe("linear"))
    plan = mergekit_lite.plan(mergekit_lite.load_recipe("r.yaml"), out="far", fetch="stream")

    def expire(progress: object) -> None:
        models.expire()

    models.log.clear()
    result = mergekit_lite.run(plan, threads=2, progress=expire)
    assert any(request.status == 403 for request in models.log)
    assert digests(result) == digests(merged("linear", "cache", "near"))


def test_an_address_may_be_over_before_it_is_asked(models: Hub, here: Path) -> None:
    """Every second answer of the large files' store is a 403, to addresses just given out and to older ones."""
    models.faults[:] = [Fault("/objects/", status=403, times=1, after=after) for after in range(0, 40, 2)]
    streamed = merged("linear", "stream", "far")
    assert sum(request.status == 403 for request in models.log) > 4
    models.faults.clear()
    assert digests(streamed) == digests(merged("linear", "cache", "near"))


@pytest.mark.parametrize(
    "fault, says",
    [
        (Fault("/objects/", after=8, etag="other"), "changed on the Hub"),
        (Fault("/objects/", after=8, size=123), "changed on the Hub"),
        (Fault("/resolve/", after=8, etag="other"), "changed on the Hub"),
        (Fault("/objects/", after=8, whole=True), "gives no ranges"),
        (Fault("/objects/", after=8, shift=3), "another range"),
        (Fault("/objects/", after=8, status=503), "answered 503"),
        (Fault("/objects/|/resolve/", after=8, cut=0), "cannot be read"),
    ],
)
def test_what_does_not_pass_is_told(fault: Fault, says: str, models: Hub, here: Path) -> None:
    models.faults[:] = [replace(fault)]
    with pytest.raises(InputError) as caught:
        merged("linear", "stream", "far")
    assert says in caught.value.problems[0].message and "@" in caught.value.problems[0].message
    assert models.faults[0].hit
    models.faults.clear()
    if Path("far.partial").exists():  # what was done is kept
        assert digests(merged("linear", "stream", "far", resume=True)) == digests(merged("linear", "cache", "near"))


def test_a_commit_that_is_rewritten_between_plan_and_run_is_refused(models: Hub, here: Path) -> None:
    Path("r.yaml").write_text(recipe("linear"))
    plan = mergekit_lite.plan(mergekit_lite.load_recipe("r.yaml"), out="far", fetch="stream")
    repo = models.repos["org/math"]
    name = "model-00002-of-00002.safetensors"
    data = bytearray(FILES["math"][name])
    data[-1] ^= 1
    repo.commits[repo.refs["main"]].files[name] = File(bytes(data), True)  # type: ignore[index]
    with pytest.raises(InputError, match=f"org/math@{repo.refs['main']}/{name}` changed on the Hub"):
        mergekit_lite.run(plan)
    assert not Path("far").exists() and not Path("far.partial").exists()


def test_a_branch_that_moves_does_not_move_a_plan(models: Hub, here: Path) -> None:
    Path("r.yaml").write_text(recipe("linear"))
    plan = mergekit_lite.plan(mergekit_lite.load_recipe("r.yaml"), out="far", fetch="stream")
    before = digests(merged("linear", "cache", "near"))
    models.repos["org/math"].put(FILES["code"])
    assert digests(mergekit_lite.run(plan)) == before
    assert digests(merged("linear", "stream", "moved")) != before


def test_a_server_that_asks_to_wait_is_waited_for(models: Hub, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float | None] = []
    made = ranges.wait

    def wait(number: int, asked: float | None) -> float:
        told.append(asked)
        return 0.0 if asked is not None else made(number, asked)

    monkeypatch.setattr(ranges, "wait", wait)
    models.faults[:] = [Fault("/objects/", after=5, times=2, status=429, headers={"Retry-After": "17"})]
    merged("linear", "stream", "far")
    assert told == [17.0, 17.0]


# Stopping and going on


def started(hub: Hub, folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mergekit_lite", "run", "r.yaml", "--fetch", "stream", "--threads", "1", *words],
        env=environ(hub, folder / "home", HF_HUB_DOWNLOAD_TIMEOUT="1"), cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def units_done(folder: Path) -> int:
    journal = folder / "out" / "x.partial" / "journal.jsonl"
    return sum('"unit"' in line for line in journal.read_text().splitlines()) if journal.exists() else 0


def test_a_killed_run_goes_on(models: Hub, here: Path, merge: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(recipe("linear"))
    plain = digests(merged("linear", "cache", "near"))
    # The second shards of all models are held back: what lies in the first ones gets done.
    late = [models.repos[f"org/{name}"].files["model-00002-of-00002.safetensors"].sha256 for name in NAMES]
    models.faults[:] = [Fault("|".join(late), after=4, delay=60.0)]
    run = started(models, tmp_path)
    while run.poll() is None and units_done(tmp_path) < 3:
        time.sleep(0.01)
    run.kill()
    models.faults.clear()
    _, err = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGKILL, err
    done = units_done(tmp_path)
    assert done >= 3
    ran = merge("run", "r.yaml", "--fetch", "stream", "--resume", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["resumed"] == done
    assert [shard["blake3"] for shard in found["outputs"][0]["shards"]] == plain
    assert not list((tmp_path / "out").glob("*.partial"))


def test_ctrl_c_does_not_wait_for_the_hub(models: Hub, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(recipe("linear"))
    models.faults[:] = [Fault("/objects/", after=8, status=503, headers={"Retry-After": "500"})]
    run = started(models, tmp_path)
    while run.poll() is None and not models.faults[0].hit:
        time.sleep(0.01)
    time.sleep(0.3)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=30)
    assert run.returncode == 130 and "`--resume` goes on" in err, err


# Locks


def test_a_lock_of_a_stream_is_a_recipe_again(models: Hub, here: Path) -> None:
    first = merged("linear", "stream", "far")
    models.repos["org/math"].put(FILES["code"])  # main has moved on: the lock names commits
    lock = mergekit_lite.load_recipe("far/recipe.lock.yaml")
    entry = lock.lock["inputs"]["math"][0]
    data = FILES["math"][entry["file"]]
    assert entry["sha256"] == File(data, True).sha256 and entry["bytes"] == len(data) and "blake3" not in entry
    for fetch in ("stream", "cache"):
        again = mergekit_lite.run(mergekit_lite.plan(lock, out=f"again-{fetch}", fetch=fetch))
        assert again.changed == () and again.notes == () and digests(again) == digests(first)
    # A lock of downloaded files is held against a stream as far as can be.
    lock = mergekit_lite.load_recipe("again-cache/recipe.lock.yaml")
    assert "blake3" in lock.lock["inputs"]["math"][0]
    (here / "cache").rename(here / "away")
    again = mergekit_lite.run(mergekit_lite.plan(lock, out="again", fetch="stream"))
    assert again.changed == () and digests(again) == digests(first)
    assert len(again.notes) == 1 and "`math`, `code`" in again.notes[0].message


@pytest.mark.parametrize("fetch", ["stream", "cache"])
def test_a_lock_with_another_digest_stops_the_run(fetch: Fetch, models: Hub, here: Path) -> None:
    merged("linear", "stream", "far")
    text = Path("far/recipe.lock.yaml").read_text()
    then = File(FILES["code"]["model-00001-of-00002.safetensors"], True).sha256
    Path("bad.yaml").write_text(text.replace(then, "ab" * 32))
    plan = mergekit_lite.plan(mergekit_lite.load_recipe("bad.yaml"), out="bad", fetch=fetch)
    with pytest.raises(RecipeError, match="other content"):
        mergekit_lite.run(plan)


# Who may read, and what is told


def test_a_private_model_and_its_token(models: Hub, merge: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(recipe("linear"))
    for name in ("math", "code"):
        models.repos[f"org/{name}"].private = True
    ran = merge("run", "r.yaml", "--fetch", "stream")
    assert ran.code == 4 and "no model on the Hub named `org/math`" in ran.err and "hf auth login" in ran.err
    for name in ("math", "code"):
        models.repos[f"org/{name}"].readers = {"me"}
    models.faults[:] = [Fault("/objects/", after=6, times=1, status=503), Fault("/objects/", after=8, times=1, cut=99)]
    models.log.clear()
    ran = merge("run", "r.yaml", "--fetch", "stream", HF_TOKEN=TOKEN, HF_HUB_VERBOSITY="debug")
    assert ran.code == 0, ran.err
    assert {request.token for request in models.log if request.path.startswith("/objects/")} == {None}
    assert TOKEN in {request.token for request in models.log}
    models.faults[:] = [Fault("/objects/", status=403)]
    failed = merge("run", "r.yaml", "--fetch", "stream", "--out", "out/y", HF_TOKEN=TOKEN, HF_HUB_VERBOSITY="debug")
    assert failed.code == 4
    for text in (ran.out, ran.err, failed.out, failed.err):
        assert TOKEN not in text and models.signature not in text
    for path in [*(tmp_path / "out").rglob("*"), *(tmp_path / "home").rglob("*")]:
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_a_gated_model(models: Hub, merge: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(recipe("linear"))
    models.repos["org/code"].gated = True
    for words in (["run", "r.yaml", "--fetch", "stream"], ["plan", "r.yaml"]):
        ran = merge(*words, HF_TOKEN=TOKEN)
        assert ran.code == 4 and "`org/code`" in ran.err and "is gated" in ran.err
        assert f"ask for access at {models.address}/org/code, then run `hf auth login`" in ran.err


def test_what_is_missing(models: Hub, merge: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        recipe("linear").replace("org/math", "org/maths").replace("org/code", "org/code@v9")
    )
    ran = merge("plan", "r.yaml")
    assert ran.code == 4
    assert "no model on the Hub named `org/maths`" in ran.err and "`org/code` has no revision `v9`" in ran.err
    assert ran.err.count("r.yaml:2:") == 2


def test_offline_is_the_cache_alone(models: Hub, here: Path, merge: Callable[..., Ran]) -> None:
    made = recipe("linear")
    Path("r.yaml").write_text(made)
    ran = merge("run", "r.yaml", "--fetch", "stream", HF_HUB_OFFLINE="1")
    assert ran.code == 4 and "not, or not wholly, in the cache" in ran.err, ran.err

    def planned(fetch: Fetch) -> str:
        return mergekit_lite.plan(mergekit_lite.load_recipe("r.yaml"), offline=True, fetch=fetch).digest

    for fetch in ("stream", "cache"):
        with pytest.raises(InputError, match="not, or not wholly, in the cache"):
            planned(fetch)
    assert models.log == []
    merged("linear", "stream", "far")
    models.log.clear()
    for fetch in ("stream", "cache"):  # the small files alone are there
        with pytest.raises(InputError, match="not, or not wholly, in the cache"):
            planned(fetch)
    merged("linear", "cache", "near")
    models.log.clear()
    assert planned("stream") == planned("cache")
    assert models.log == []


@pytest.mark.parametrize("fault", [Fault(status=502), Fault(cut=0)])
def test_a_hub_that_is_down_leaves_the_cache(fault: Fault, models: Hub, here: Path) -> None:
    before = digests(merged("linear", "cache", "near"))
    models.faults[:] = [replace(fault)]
    assert digests(merged("linear", "stream", "far")) == before
    (here / "cache").rename(here / "away")
    with pytest.raises(InputError, match=r"org/math` cannot be downloaded(?s:.)*org/code` cannot be downloaded"):
        merged("linear", "stream", "other")


def test_a_sandbox_has_no_hub(models: Hub, merge: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(recipe("linear"))
    ran = merge("run", "r.yaml", "--fetch", "stream", "--sandbox", ".")
    assert ran.code == 3 and "the Hub is out of its reach" in ran.err
    assert models.log == []


def test_headers_from_the_hub_are_judged_as_those_on_disk(hub: Hub, here: Path) -> None:
    """Truncated, overlapping and oversized: the same words as for a file."""
    good = FILES["base"]["model-00001-of-00002.safetensors"]
    size = int.from_bytes(good[:8], "little")
    broken = {
        "short": good[:-7],
        "long": good + b"\0" * 9,
        "claims": (1 << 40).to_bytes(8, "little") + good[8:],
        "text": good[:8] + b"[" + good[9:],
        "empty": b"",
        "prefix": good[: size // 2],
    }
    for name, data in broken.items():
        hub.add(f"org/{name}", {"model.safetensors": data, "config.json": json.dumps(CONFIG).encode()})
        Path(name).mkdir()
        Path(name, "model.safetensors").write_bytes(data)
        Path("far.yaml").write_text(f"version: 1\nmodels: {{m: org/{name}}}\nsave: {{step: m, to: out}}\n")
        Path("near.yaml").write_text(f"version: 1\nmodels: {{m: ./{name}}}\nsave: {{step: m, to: out}}\n")
        told = []
        for file in ("far.yaml", "near.yaml"):
            with pytest.raises(InputError) as caught:
                mergekit_lite.plan(mergekit_lite.load_recipe(file), fetch="stream")
            told.append([problem.message for problem in caught.value.problems])
        commit = hub.repos[f"org/{name}"].refs["main"]
        assert [text.replace(f"org/{name}@{commit}", f"./{name}") for text in told[0]] == told[1], told


def test_a_long_header_comes_in_two_parts(hub: Hub, here: Path) -> None:
    import torch
    from safetensors.torch import save

    data = save({f"model.layers.{n}.self_attn.q_proj.weight": torch.zeros(2) for n in range(1500)})
    assert int.from_bytes(data[:8], "little") > 1 << 16
    hub.add("org/m", {"model.safetensors": data})
    Path("r.yaml").write_text("version: 1\nmodels: {m: org/m}\nsave: {step: m, to: out}\n")
    plan = mergekit_lite.plan(mergekit_lite.load_recipe("r.yaml"), fetch="stream")
    assert len(plan.checkpoints["m"].tensors) == 1500


def test_the_source_gives_any_range(models: Hub, here: Path) -> None:
    """Ranges at random, from several threads, with blocks of odd places, against the files' bytes."""
    from concurrent.futures import ThreadPoolExecutor

    from mergekit_lite.checkpoint.find import open_checkpoint
    from mergekit_lite.checkpoint.remote import RemoteReader

    opened = open_checkpoint("org/math", None, stream=True)
    draw = random.Random(os.environ.get("PYTEST_SEED", "5"))
    wanted = []
    for meta in draw.choices(list(opened.tensors.values()), k=200):
        start = draw.randint(0, meta.nbytes)
        wanted.append((meta, start, draw.randint(start, meta.nbytes)))
    for spool in (0, 100_000):
        with RemoteReader(opened.shards, 2, 3, spool, here) as reader, ThreadPoolExecutor(4) as pool:
            reader._size, reader._most = 777, 5

            def one(what: tuple[object, int, int], reader: RemoteReader = reader) -> bool:
                meta, start, stop = what
                buffer = bytearray(stop - start)
                reader.read_bytes(meta, start, stop, memoryview(buffer))  # type: ignore[arg-type]
                data = FILES["math"][meta.file.rpartition("/")[2]]  # type: ignore[attr-defined]
                return data[meta.start + start : meta.start + stop] == buffer  # type: ignore[attr-defined]

            assert all(pool.map(one, wanted))


def test_tokenizers_are_fetched_where_vocabularies_are_united(hub: Hub, here: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def trained(text: str) -> bytes:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator([text], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
        return made.to_str().encode()

    texts = {"math": "sum sums summand product products " * 9, "code": "class classes method methods module " * 9}
    for name, text in texts.items():
        hub.add(f"org/{name}", FILES[name] | {"tokenizer.json": trained(text)})
    Path("union.yaml").write_text(
        "version: 1\nmodels: {math: org/math, code: org/code}\nsteps: {m: {use: linear, of: [math, code]}}\n"
        "save: {to: out, tokenizer: union}\n"
    )
    found = []
    for fetch in ("stream", "cache"):
        plan = mergekit_lite.plan(mergekit_lite.load_recipe("union.yaml"), out=f"out/{fetch}", fetch=fetch)
        found.append((digests(mergekit_lite.run(plan)), (Path("out") / fetch / "tokenizer.json").read_bytes()))
    assert found[0] == found[1]
    united = [found[0][1], *map(trained, texts.values())]
    words, *parents = (json.loads(text)["model"]["vocab"].keys() for text in united)
    assert words == parents[0] | parents[1] != parents[0]

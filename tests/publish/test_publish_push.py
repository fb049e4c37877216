"""Pushes to a Hub on loopback, by the real client."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_process import TOKEN, Ran
from huggingface_hub import ModelCard, snapshot_download
from server import Fault, Hub
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mergekit_lite import load_recipe, plan, run
from mergekit_lite.publish.card import is_ours
from mergekit_lite.report.verify import verify

Merge = Callable[..., Ran]
STEPS = "steps: {merged: {use: linear, of: [math, code]}}"
FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors", "recipe.lock.yaml", "recipe.yaml"}


@pytest.fixture(scope="session")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parents")
    for seed, name in enumerate(("math", "code")):
        torch.manual_seed(seed)
        sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).save_pretrained(folder / name)
    return folder


@pytest.fixture
def out(parents: Path, tmp_path: Path) -> Path:
    """A finished output of local parents, in two folders' names: `out`."""
    return merged(parents, tmp_path)


def merged(parents: Path, folder: Path, name: str = "out", save: str = "{}", steps: str = STEPS) -> Path:
    recipe = folder / f"{name}.yaml"
    models = f"models: {{math: {parents}/math, code: {parents}/code}}"
    recipe.write_text(f"version: 1\n{models}\n{steps}\nsave: {save}\n")
    run(plan(load_recipe(recipe), out=folder / name))
    return folder / name


def held(hub: Hub, repo: str, ref: str = "main") -> dict[str, bytes]:
    files = hub.repos[repo].at(ref).files
    return {name: file.read(0, file.size) for name, file in files.items() if name != ".gitattributes"}


def test_from_hub_ids_to_a_hub_id(hub: Any, merge: Merge, parents: Path, tmp_path: Path) -> None:
    """A recipe of ids, merged, pushed, downloaded by its id and loaded: the same bytes, and the parents' licence."""
    for name in ("math", "code"):
        hub.add(f"org/{name}", parents / name)
        hub.repos[f"org/{name}"].put({"README.md": b"---\nlicense: apache-2.0\nlanguage: [en]\n---\n# parent\n"})
    push = "{repo: me/both, message: the first}"
    Path("r.yaml").write_text(
        f"version: 1\nmodels: {{math: org/math, code: org/code}}\n{STEPS}\nsave: {{to: out/both, push: {push}}}\n"
    )
    ran = merge("run", "r.yaml")
    assert ran.code == 0, ran.err
    assert "pushed to me/both, new and private" in ran.out
    assert set(held(hub, "me/both")) == FILES
    assert hub.repos["me/both"].private and hub.repos["me/both"].at("main").title == "the first"
    place = snapshot_download("me/both", endpoint=hub.address, token=TOKEN, cache_dir=tmp_path / "there")
    found = verify(place)
    assert (found.faults, found.notes, found.sealed) == ((), (), True)
    mean = {
        name: (one + other) / 2
        for (name, one), other in zip(
            AutoModelForCausalLM.from_pretrained(parents / "math").state_dict().items(),
            AutoModelForCausalLM.from_pretrained(parents / "code").state_dict().values(),
            strict=True,
        )
    }
    loaded = AutoModelForCausalLM.from_pretrained(place).state_dict()
    assert all(torch.allclose(loaded[name], mean[name], atol=1e-6) for name in mean)
    data = ModelCard.load(Path(place) / "README.md").data.to_dict()
    assert data["base_model"] == ["org/math", "org/code"] and data["base_model_relation"] == "merge"
    assert (data["license"], data["language"], data["library_name"]) == ("apache-2.0", ["en"], "transformers")
    card = Path(place, "README.md").read_text()
    for name in ("math", "code"):
        assert hub.repos[f"org/{name}"].refs["main"] in card
    assert all(save.push is None for save in load_recipe(Path(place) / "recipe.lock.yaml").saves)


def test_a_coded_store_is_pushed_and_read_again(hub: Any, merge: Merge, parents: Path, tmp_path: Path) -> None:
    """The masks of a store are sent with it, and a task of the store at the Hub is that of the one on the disk."""
    steps = "steps: {sum: {use: task_arithmetic, base: math, of: [code], with: {lambda: 1}}}"
    save = "{step: sum, as: masks, base: math, tasks: [code], compress: zstd}"
    store = merged(parents, tmp_path, "store", save, steps)
    assert merge("push", "store", "me/store").code == 0
    assert "masks-zstd-1.safetensors" in held(hub, "me/store")
    assert all((store / name).read_bytes() == data for name, data in held(hub, "me/store").items() if "safe" in name)
    found = {}
    for name, place in (("far", "me/store#code"), ("near", "./store#code")):
        Path(f"{name}.yaml").write_text(f'version: 1\nmodels: {{m: "{place}"}}\nsave: {{step: m, to: {name}}}\n')
        ran = merge("run", f"{name}.yaml", "--fetch", "stream")
        assert ran.code == 0, ran.err
        found[name] = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
    assert all(torch.equal(found["far"][name], value) for name, value in found["near"].items())


def test_outputs_that_share_a_file_are_pushed_whole(hub: Any, merge: Merge, parents: Path, tmp_path: Path) -> None:
    """At the Hub each is a model of its own, though on this disk they are one file in part."""
    recipe = tmp_path / "r.yaml"
    steps = "  mean: {use: linear, of: [math, code]}\n"
    steps += "".join(f"  for_{t}: {{use: share, of: [mean, {t}], with: {{layers: [0]}}}}\n" for t in ("math", "code"))
    saves = "".join(f"  - {{step: for_{t}, to: out/{t}, push: {{repo: me/{t}}}}}\n" for t in ("math", "code"))
    models = f"models: {{math: {parents}/math, code: {parents}/code}}"
    recipe.write_text(f"version: 1\n{models}\nsteps:\n{steps}save:\n{saves}")
    ran = merge("run", "r.yaml")
    assert ran.code == 0, ran.err
    weights = [{p.name: p for p in Path("out", t).glob("*.safetensors")} for t in ("math", "code")]
    assert any(a.samefile(b) for a in weights[0].values() for b in weights[1].values())
    for t, local in zip(("math", "code"), weights, strict=True):
        there = held(hub, f"me/{t}")
        assert {name for name in there if name.endswith(".safetensors")} == set(local)
        place = snapshot_download(f"me/{t}", endpoint=hub.address, token=TOKEN, cache_dir=tmp_path / "there")
        assert (verify(place).faults, verify(place).sealed) == ((), True)
        loaded = AutoModelForCausalLM.from_pretrained(place).state_dict()
        own = AutoModelForCausalLM.from_pretrained(parents / t).state_dict()
        both = [AutoModelForCausalLM.from_pretrained(parents / p).state_dict() for p in ("math", "code")]
        for name, value in loaded.items():
            mean = (both[0][name] + both[1][name]) / 2
            assert torch.allclose(value, mean if ".layers.0." in name else own[name], atol=1e-6), name


def test_a_second_push_commits_nothing(hub: Any, merge: Merge, out: Path) -> None:
    assert merge("push", "out", "me/x").code == 0
    commits, sent = len(hub.repos["me/x"].commits), hub.sent_up()
    assert sent == (out / "model.safetensors").stat().st_size
    again = merge("push", "out", "me/x", "--json")
    told = json.loads(again.out)
    assert (again.code, told["pushed"], told["commit"], told["files"]) == (0, False, None, [])
    assert len(hub.repos["me/x"].commits) == commits and hub.sent_up() == sent
    assert "nothing has changed" in merge("push", "out", "me/x").out


def test_nothing_else_is_sent(hub: Any, merge: Merge, out: Path) -> None:
    for name in (".env", "journal.jsonl", "notes.txt", ".cache/x", "sub/more.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("private")
    assert merge("push", "out", "me/x").code == 0
    assert set(held(hub, "me/x")) == FILES


def test_only_what_is_as_the_lock_says(hub: Any, merge: Merge, out: Path) -> None:
    (out / "config.json").write_text((out / "config.json").read_text() + " ")
    ran = merge("push", "out", "me/x")
    assert ran.code == 1 and "config.json" in ran.err and "not pushed" in ran.err
    told = merge("push", "out", "me/x", "--json")
    assert told.code == 1 and json.loads(told.out)["faults"]
    assert "me/x" not in hub.repos and not hub.bodies


def test_private_and_public(hub: Any, merge: Merge, out: Path) -> None:
    assert merge("push", "out", "me/a").code == 0 and hub.repos["me/a"].private
    assert merge("push", "out", "me/b", "--public").code == 0 and not hub.repos["me/b"].private
    assert merge("push", "out", "me/c", "--private").code == 0 and hub.repos["me/c"].private
    refused = merge("push", "out", "me/b", "--private")
    assert refused.code == 4 and "exists and is public" in refused.err
    kept = merge("push", "out", "me/a", "--public")
    assert kept.code == 0 and "is private and stays so" in kept.err and hub.repos["me/a"].private


def test_a_branch_and_a_pull_request(hub: Any, merge: Merge, out: Path) -> None:
    ran = merge("push", "out", "me/x", "--branch", "next/one")
    assert ran.code == 0, ran.err
    assert set(held(hub, "me/x", "next/one")) == FILES and held(hub, "me/x") == {}
    ran = merge("push", "out", "me/x", "--pr", "--message", "look at this")
    assert ran.code == 0 and "/discussions/1" in ran.out
    assert set(held(hub, "me/x", "refs/pr/1")) == FILES and held(hub, "me/x") == {}
    assert hub.repos["me/x"].pulls[0]["title"] == "look at this"
    assert merge("push", "out", "me/x", "--branch", "a", "--pr").code == 2
    assert merge("push", "out", "me/x", "--branch", "a..b").code == 2
    assert hub.repos["me/x"].at("next/one").title == "Merge of math, code by linear"


def test_a_card_of_the_users_is_kept(hub: Any, merge: Merge, out: Path) -> None:
    """The card here is sent where it is the user's; the one there stays where it is."""
    assert merge("push", "out", "me/x").code == 0
    ours = held(hub, "me/x")["README.md"]
    assert is_ours(ours)
    hub.repos["me/x"].put({"README.md": ours + b"and words of mine\n"})
    ran = merge("push", "out", "me/x")
    assert ran.code == 0 and "stays as it is" in ran.err and "nothing has changed" in ran.out
    assert held(hub, "me/x")["README.md"] == ours + b"and words of mine\n"
    (out / "README.md").write_text("# Mine\n")
    assert "stays as it is" in merge("push", "out", "me/x").err
    assert merge("push", "out", "me/y").code == 0 and held(hub, "me/y")["README.md"] == b"# Mine\n"
    assert (out / "README.md").read_text() == "# Mine\n"
    hub.repos["me/x"].put({"README.md": ours.replace(b"merge", b"merger")})
    assert "stays as it is" in merge("push", "out", "me/x").err


def test_another_output_takes_the_place_of_the_first(
    hub: Any, merge: Merge, out: Path, parents: Path, tmp_path: Path
) -> None:
    """Files of the first that the second lacks would be loaded with it: they go. Those of other people stay."""
    merged(parents, tmp_path, "many", "{shard: 10KB}")
    assert merge("push", "many", "me/x").code == 0
    assert "model.safetensors.index.json" in held(hub, "me/x")
    hub.repos["me/x"].put({"images/plot.png": b"x"})
    ran = merge("push", "out", "me/x")
    assert ran.code == 0 and "of an earlier push removed" in ran.out
    assert set(held(hub, "me/x")) == FILES | {"images/plot.png"}


def test_the_model_of_someone_else_is_left_alone(hub: Any, merge: Merge, out: Path) -> None:
    hub.add("me/theirs", {"model.safetensors": b"weights", "config.json": b"{}"})
    before = held(hub, "me/theirs")
    ran = merge("push", "out", "me/theirs")
    assert ran.code == 4 and "`merge push` has not written" in ran.err and held(hub, "me/theirs") == before


@pytest.mark.parametrize(
    ("fault", "code", "told"),
    [
        (Fault("/api/models/me/x", status=401), 4, "hf auth login"),
        (Fault("/api/repos/create", status=403), 4, "may not write to `me/x`"),
        (Fault("/preupload/", status=404), 4, "finds no `me/x`"),
        (Fault("/commit/", status=409), 5, "has changed during the push"),
        (Fault("/commit/", status=412), 5, "has changed during the push"),
        (Fault("/commit/", status=429), 5, "wait some minutes"),
        (Fault("/commit/", status=500), 5, "answered 500"),
        (Fault("/objects/batch", status=503), 5, "answered 503"),
        (Fault("/uploads/", method="PUT", status=500), 5, "answered 500"),
        (Fault("/uploads/", method="PUT", status=403), 4, "may not write"),
    ],
)
def test_refusals_say_what_to_do(hub: Any, merge: Merge, out: Path, fault: Fault, code: int, told: str) -> None:
    """Nothing is half there after them, and the same command goes well once the fault is over."""
    hub.faults.append(fault)
    ran = merge("push", "out", "me/x")
    assert (ran.code, told in ran.err) == (code, True), ran.err
    assert "hint: " in ran.err and hub.signature not in ran.out + ran.err
    assert "me/x" not in hub.repos or held(hub, "me/x") == {}
    hub.faults.clear()
    assert merge("push", "out", "me/x").code == 0 and set(held(hub, "me/x")) == FILES


STATIONS = ["/api/models/me/x", "/api/repos/create", "/preupload/", "/batch", "/uploads/", "/api/verify/", "/commit/"]


@pytest.mark.parametrize("where", STATIONS)
@pytest.mark.parametrize("fault", [{"status": 503, "times": 2}, {"status": 429, "times": 2}, {"cut": 0, "times": 1}])
def test_passing_faults_are_waited_out(hub: Any, merge: Merge, out: Path, where: str, fault: dict[str, int]) -> None:
    """A commit whose answer is lost has been made once, and is not made again."""
    hub.faults.append(made := Fault(where, **fault))
    ran = merge("push", "out", "me/x")
    assert ran.code == 0, ran.err
    assert set(held(hub, "me/x")) == FILES and len(hub.repos["me/x"].commits) == 2
    assert made.hit or where == "/uploads/"  # an answer without a body has nothing to be cut


def test_the_hub_is_waited_for_as_long_as_it_asks(
    hub: Any, merge: Merge, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    hub.faults.append(fault := Fault("/commit/", status=429, times=2, headers={"Retry-After": "17"}))
    assert merge("push", "out", "me/x").code == 0
    assert [seconds for seconds in waits if seconds] == [17.0, 17.0] and fault.hit == 2
    hub.faults[:] = [Fault("/preupload/", status=429, headers={"Retry-After": "43"})]
    ran = merge("push", "out", "me/y")
    assert ran.code == 5 and "asks for fewer requests" in ran.err and "wait 43 seconds" in ran.err


def test_a_killed_push_goes_on(hub: Any, environment: dict[str, str], parents: Path, tmp_path: Path) -> None:
    """After a kill amid the uploads the same command sends only what is missing."""
    folder = merged(parents, tmp_path, "many", "{shard: 4KB}")
    sizes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    words = [sys.executable, "-m", "mergekit_lite", "push", "many", "me/x"]
    hub.faults.append(stuck := Fault("/uploads/", method="PUT", after=4, status=503, delay=60))
    first = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until = time.monotonic() + 60
    while stuck.hit < 1 and first.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    first.kill()
    first.communicate()
    assert stuck.hit >= 1 and len(hub.objects) == 4 and held(hub, "me/x") == {}
    there = sum(map(len, hub.objects.values()))
    hub.faults.clear()
    hub.bodies.clear()
    second = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    assert 0 < there < sizes and hub.sent_up() == sizes - there
    for path in folder.glob("*.safetensors"):
        assert held(hub, "me/x")[path.name] == path.read_bytes()


def test_large_files_go_in_parts(hub: Any, merge: Merge, out: Path) -> None:
    hub.part_size = 5_000
    assert merge("push", "out", "me/x").code == 0
    assert held(hub, "me/x")["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert max(len(body) for method, path, body in hub.bodies if method == "PUT") == 5_000


def test_a_push_that_fails_after_a_run(hub: Any, merge: Merge, parents: Path, tmp_path: Path) -> None:
    """The output is whole, and the hint is a command that works."""
    text = f"version: 1\nmodels: {{math: {parents}/math, code: {parents}/code}}\n{STEPS}\n"
    Path("r.yaml").write_text(text + "save: {to: out, push: {repo: me/x, branch: b}}\n")
    hub.faults.append(Fault("/commit/", status=500))
    ran = merge("run", "r.yaml")
    assert ran.code == 5 and "wrote out" in ran.out
    assert "the output is whole; `merge push out me/x --branch b` publishes it" in ran.err
    assert verify("out").faults == ()
    hub.faults.clear()
    assert merge("push", "out", "me/x", "--branch", "b").code == 0
    for words in (["--offline"], ["--sandbox", "."]):
        refused = merge("plan", "r.yaml", "--out", "new", *words)
        assert refused.code == 3 and "nothing can be pushed to `me/x`" in refused.err
    Path("r.yaml").write_text(text + "save: {to: new, push: {repo: not/an/id}}\n")
    refused = merge("plan", "r.yaml")
    assert refused.code == 3 and "`not/an/id` cannot be a repository" in refused.err


def test_without_network_or_token(hub: Any, merge: Merge, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    from mergekit_lite import sandbox
    from mergekit_lite.errors import UsageError
    from mergekit_lite.publish.push import check_ready

    assert merge("push", "out", "x").code == 2
    monkeypatch.setenv("HF_TOKEN", "hf_nobodyKNOWSthis123")
    assert merge("push", "out", "me/x").code == 4
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(out / "none"))
    ran = merge("push", "out", "me/x")
    assert ran.code == 4 and "hf auth login" in ran.err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert merge("push", "out", "me/x").code == 2
    with sandbox.confined(out), pytest.raises(UsageError, match="sandbox"):
        check_ready("me/x")
    assert "me/x" not in hub.repos


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--offline"], "the command is offline"),
        (["--sandbox", "."], "a sandbox has no network"),
        (["--sandbox", "out"], "a sandbox has no network"),
        (["--sandbox", "elsewhere"], "`out` lies outside the sandbox"),
    ],
)
def test_offline_and_the_sandbox_refuse_before_anything_is_read(
    words: list[str], says: str, hub: Any, merge: Merge, out: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (out / "config.json").write_text("{}")  # a fault that is not told: nobody has looked
    for more in ([], ["--json"]):
        ran = merge("push", "out", "me/x", *words, *more)
        assert ran.code == 2 and says in ran.out + ran.err and "config.json" not in ran.out + ran.err
        assert "hint" in ran.out + ran.err
    assert hub.log == []


def test_no_token_leaves_but_in_its_header(hub: Any, merge: Merge, parents: Path, tmp_path: Path) -> None:
    canary = "hf_" + "canaryPARENT01234567"
    for name in ("math", "code"):
        hub.add(f"org/{name}", parents / name)
        card = f"---\nlicense: other\nlicense_name: {canary}\nlanguage: [en, {canary}]\n---\n{canary}\n"
        hub.repos[f"org/{name}"].put({"README.md": card.encode()})
    Path("r.yaml").write_text(f"version: 1\nmodels: {{math: org/math, code: org/code}}\n{STEPS}\nsave: {{to: out}}\n")
    shown = [merge("run", "r.yaml")]
    hub.faults.append(Fault("/commit/", status=500, times=1))
    shown += [merge("push", "out", "me/x", "--message", f"by {TOKEN}"), merge("push", "out", "me/y", "--json")]
    assert [ran.code for ran in shown] == [0, 2, 0]
    for secret in (TOKEN, canary, hub.signature):
        assert not any(secret in ran.out + ran.err for ran in shown)
    sent = b"\n".join(body for _, _, body in hub.bodies)
    assert canary.encode() not in sent and TOKEN.encode() not in sent
    assert all(TOKEN not in path for _, path, _ in hub.bodies)
    assert set(held(hub, "me/y")) == FILES

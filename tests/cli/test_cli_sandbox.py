"""`--sandbox DIR`: every way out of it that a recipe, a checkpoint or an option may try, one by one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
from cli_process import Ran, environ

from mergekit_lite import StoppedError, sandbox
from mergekit_lite.methods.registry import GROUP

ADAPTER = '{"peft_type": "LORA", "lora_alpha": 1, "r": 1}'
STEP = "steps: {m: {use: linear, of: {base: {weight: 1}, math: {weight: 1}}}}\n"


def digest(folder: Path) -> str:
    """Names, kinds, links, contents and modification times of all that lies below `folder`."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        kind = os.lstat(path)
        found.update(repr((str(path.relative_to(folder)), kind.st_mode, kind.st_mtime_ns)).encode())
        found.update(os.readlink(path).encode() if path.is_symlink() else b"")
        found.update(path.read_bytes() if path.is_file() and not path.is_symlink() else b"")
    return found.hexdigest()


@pytest.fixture
def box(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory `box` that holds checkpoints and the recipe ties.yaml, and a folder `outside` beside it."""
    home, away = folder / "box", folder / "outside"
    home.mkdir()
    away.mkdir()
    for name in ("base", "math", "code", "ties.yaml"):
        shutil.move(folder / name, home / name)
    shutil.copytree(home / "base", away / "base")
    (away / "lora").mkdir()
    (away / "lora" / "adapter_config.json").write_text(ADAPTER)
    (away / "secret.yaml").write_text((home / "ties.yaml").read_text())
    (away / "order.safetensors").write_bytes((home / "base" / "model.safetensors").read_bytes())
    (home / "link").symlink_to(away)
    (home / "far" / "down").mkdir(parents=True)
    (home / "deep").symlink_to(home / "far" / "down")  # the system and a text disagree on `deep/../..`
    (home / "linked.safetensors").symlink_to(away / "base" / "model.safetensors")
    (home / "linked.yaml").symlink_to(away / "secret.yaml")
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(away))
    return home


MODEL = "version: 1\nmodels:\n  base: {}\n  math: ./math\n" + STEP + "save: {{to: out/m}}\n"
FILE = "version: 1\nmodels: {{base: ./base, math: ./math}}\nsteps:\n  m: {{use: permute, of: base, with: {{{}}}}}\n" + (
    "save: {{step: m, to: out/m}}\n"
)
SAVE = (
    "version: 1\nmodels: {{base: ./base, math: ./math}}\n" + STEP.replace("{", "{{").replace("}", "}}") + "save: {}\n"
)
MODEL = MODEL.replace(STEP, STEP.replace("{", "{{").replace("}", "}}"))
THEIRS = "models:\n  - {{model: {}, parameters: {{weight: 1}}}}\n  - {{model: ./math, parameters: {{weight: 1}}}}\n" + (
    "merge_method: linear\ndtype: float32\n"
)
ESCAPES = [
    *((MODEL, place, 3) for place in (
        "../outside/base", "{away}/base", "./link/base", "./math/../../outside/base", "~/base", "~root/base",
        "./linked.safetensors", "/etc", "org/name", "org/name@main", "./missing/../../outside/none", "link/../math",
        "./deep/../../outside/base",
        "{{path: ./base, adapter: ../outside/lora}}", "{{path: ./base, adapter: ./link/lora}}",
        "{{path: ./base, adapter: org/lora}}", "{{path: ~/base, adapter: ./link}}",
    )),
    *((FILE, setting, 4) for setting in (
        "from: ../outside/order.safetensors", "from: ./link/order.safetensors", "from: /etc/passwd",
        "from: ~/order.safetensors", "like: math, family: ../outside/secret.yaml", "like: math, family: /etc/passwd",
        "like: ../outside/base", "like: org/name",
    )),
    *((SAVE, place, 4) for place in (
        "{{to: ../outside/out}}", "{{to: '{away}/out'}}", "{{to: ./link/out}}", "{{to: '~/out'}}",
        "{{to: out/../../outside/out}}", "{{to: leads}}",
    )),
    *((THEIRS, place, 2) for place in (
        "../outside/base", "org/name", "./base+../outside/lora", "./base+org/lora",
        "{{model: {{path: ../outside/base}}}}", "{{model: {{path: ./base}}, lora: {{path: ~/lora}}}}",
    )),
]  # fmt: skip


@pytest.mark.parametrize("form, place, line", ESCAPES, ids=[place for _, place, _ in ESCAPES])
def test_a_place_outside_is_refused_at_its_line(
    form: str, place: str, line: int, box: Path, merge: Callable[..., Ran]
) -> None:
    away = box.parent / "outside"
    (box / "leads.partial").symlink_to(away)
    text = form.replace("{}", place).replace("{away}", str(away)).replace("{{", "{").replace("}}", "}")
    (box / "r.yaml").write_text(text)
    before = digest(away), digest(box)
    out = ["--out", "out/m"] if form == THEIRS else []
    for command in ("plan", "run"):
        ran = merge(command, "r.yaml", "--sandbox", ".", *out)
        assert ran.code == 3, ran.err
        assert "sandbox" in ran.err and f"--> r.yaml:{line}:" in ran.err
        assert (digest(away), digest(box)) == before


def test_a_recipe_outside_and_an_option_that_leads_out(box: Path, merge: Callable[..., Ran]) -> None:
    before = digest(box.parent / "outside"), digest(box)
    for recipe in ("../outside/secret.yaml", "linked.yaml", "link/secret.yaml", "/etc/passwd"):
        for command in ("run", "plan", "convert"):
            ran = merge(command, recipe, "--sandbox", ".")
            assert ran.code == 3 and f"`{recipe}` lies outside the sandbox" in ran.err
    for out in ("../outside/x", "link/x", str(box.parent / "x")):
        for command, code in (("run", 3), ("plan", 3), ("convert", 2)):
            ran = merge(command, "ties.yaml", "--sandbox", ".", "--out", out)
            assert ran.code == code and "outside the sandbox" in ran.err, ran.err
    ran = merge("run", "ties.yaml", "--sandbox", ".", "--set", "models.math=../outside/base")
    assert ran.code == 3 and "`../outside/base` lies outside the sandbox" in ran.err
    for place in ("../outside/base", "link/base", "org/name", "/etc"):
        for words in (["inspect", place], ["diff", "base", place], ["diff", place, "base"], ["doctor", place]):
            ran = merge(*words, "--sandbox", ".")
            assert ran.code == 2 and "sandbox" in ran.err, (words, ran.err)
    for command in ("inspect", "doctor"):
        ran = merge(command, "base", "--family", "../outside/secret.yaml", "--sandbox", ".")
        assert ran.code == 2 and "outside the sandbox" in ran.err
    assert (digest(box.parent / "outside"), digest(box)) == before


WATCH = """
import json, os, sys
opened = []
def hear(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        writes = isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        writes = writes or (arguments[1] is None and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        opened.append([os.path.realpath(arguments[0]), bool(writes)])
sys.dont_write_bytecode = True
sys.addaudithook(hear)
from mergekit_lite.cli.app import execute
code = execute(sys.argv[1:])
print(json.dumps([code, opened]))
"""


def test_all_places_are_told_together_before_anything_is_read_or_written(box: Path, merge: Callable[..., Ran]) -> None:
    text = (
        "version: 1\nmodels:\n  base: ../outside/base\n  math: org/name\n  code: ./code\n"
        "  tuned: {path: ./base, adapter: ~/lora}\n  idle: /etc\n"
        "steps:\n  p: {use: permute, of: base, with: {from: /etc/passwd, family: /etc/shadow}}\n"
        "  q: {use: permute, of: p, with: {from: p}}\n"
        "  m: {use: linear, of: {q: {weight: 1}, code: {weight: 1}}}\nsave: {step: m, to: ../outside/m}\n"
    )
    (box / "r.yaml").write_text(text)
    ran = merge("run", "r.yaml", "--sandbox", ".", "--json")
    lines = [problem["place"]["line"] for problem in ran.json["error"]["problems"]]
    assert ran.code == 3 and lines == [3, 4, 6, 7, 9, 9, 12]

    ran_alone = subprocess.run(
        [sys.executable, "-P", "-c", WATCH, "run", "r.yaml", "--sandbox", "."],
        env=environ(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    code, opened = json.loads(ran_alone.stdout)
    home = str(box.parent)
    assert code == 3, ran_alone.stderr
    assert [path for path, writes in opened if writes] == []
    assert {path for path, _ in opened if path.startswith(home)} == {str(box / "r.yaml")}


def test_right_use_gives_the_same_bytes(box: Path, merge: Callable[..., Ran]) -> None:
    """Also from elsewhere, with the folder named by a link, and into a folder that is made on the way."""
    state = sys.dont_write_bytecode, list(sys.path), tempfile.gettempdir()
    assert merge("run", "ties.yaml", "--out", "plain").code == 0
    before = digest(box.parent / "outside")
    ran = merge("run", "ties.yaml", "--sandbox", ".", "--out", "deep/er/walled")
    assert ran.code == 0, ran.err
    assert digest(box.parent / "outside") == before
    (box.parent / "way").symlink_to(box)
    for words in (["plan", "ties.yaml"], ["inspect", "base", "--stats"], ["doctor", "base"], ["diff", "base", "base"]):
        assert merge(*words, "--sandbox", str(box.parent / "way")).code == 0, words
    assert merge("convert", "ties.yaml", "--sandbox", ".", "--out", "tidy.yaml").code == 0
    same = [(box / name / "model.safetensors").read_bytes() for name in ("plain", "deep/er/walled")]
    assert same[0] == same[1]
    for name in ("config.json", "recipe.yaml"):
        assert (box / "plain" / name).read_bytes() == (box / "deep/er/walled" / name).read_bytes()
    assert sandbox.current() is None
    assert (sys.dont_write_bytecode, sys.path, tempfile.gettempdir()) == state


def test_caches_are_left_alone(box: Path, merge: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    cache = box.parent / "outside" / "cache"
    monkeypatch.setenv("MERGEKIT_LITE_CACHE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(
        import_module("mergekit_lite.run.remembered"), "REST", -(10**18)
    )  # no file is too young to be remembered
    assert merge("run", "ties.yaml", "--sandbox", ".", "--out", "a").code == 0
    assert not cache.exists()
    assert merge("run", "ties.yaml", "--out", "b").code == 0
    assert cache.exists()


def test_links_in_a_checkpoint_do_not_lead_out(box: Path, merge: Callable[..., Ran]) -> None:
    away = box.parent / "outside"
    before = digest(away)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copytree(box / "base", box / "trap")
        (box / "trap" / name).unlink(missing_ok=True)
        (box / "trap" / name).symlink_to(away / "base" / name if name != "tokenizer.json" else away / "secret.yaml")
        ran = merge("run", "ties.yaml", "--set", "models.base=./trap", "--sandbox", ".")
        assert ran.code == 4 and "outside its folder" in ran.err, ran.err
        assert not (box / "out").exists()  # not even begun
        shutil.rmtree(box / "trap")
    shutil.copytree(box / "base", box / "trap")
    index = {"weight_map": {"a": "../../outside/base/model.safetensors"}}
    (box / "trap" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert merge("run", "ties.yaml", "--set", "models.base=./trap", "--sandbox", ".").code == 4
    assert digest(away) == before


def test_blobs_of_the_hubs_cache_outside(folder: Path, merge: Callable[..., Ran]) -> None:
    """In the Hub's cache, links from a snapshot to its blobs are right; a sandbox that ends between them says no."""
    home = folder / "models--a--b"
    (home / "blobs").mkdir(parents=True)
    snapshot = home / "snapshots" / "c"
    snapshot.mkdir(parents=True)
    for file in (folder / "base").iterdir():
        shutil.move(file, home / "blobs" / file.name)
        (snapshot / file.name).symlink_to(home / "blobs" / file.name)
    assert merge("inspect", str(snapshot)).code == 0
    assert merge("inspect", str(snapshot), "--sandbox", str(home)).code == 0
    ran = merge("inspect", str(snapshot), "--sandbox", str(snapshot.parent))
    assert ran.code == 4 and "the sandbox" in ran.err and "reading" in ran.err


def test_a_link_planted_in_an_unfinished_output(
    box: Path, merge: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise StoppedError("stopped on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(import_module("mergekit_lite.run.perform"), "complete", stop)
        assert merge("run", "ties.yaml", "--sandbox", ".").code == 5
    victim = box.parent / "outside" / "secret.yaml"
    before = digest(box.parent / "outside")
    (box / "out" / "ties.partial" / "config.json").symlink_to(victim)
    ran = merge("run", "ties.yaml", "--resume", "--sandbox", ".")
    assert ran.code == 5 and "writing" in ran.err
    assert digest(box.parent / "outside") == before
    (box / "out" / "ties.partial" / "config.json").unlink()
    assert merge("run", "ties.yaml", "--resume", "--sandbox", ".").code == 0


@pytest.fixture
def canary() -> Iterator[tuple[int, list[object]]]:
    """A server on loopback that closes whatever connects, and remembers it: its port, and who came."""
    came: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, address = server.accept()
                except OSError:
                    return
                came.append(address)
                connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1], came
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_nothing_reaches_the_network(
    box: Path, process: Callable[..., Ran], canary: tuple[int, list[object]], tmp_path: Path
) -> None:
    port, came = canary
    address = f"http://127.0.0.1:{port}"
    environment = {
        "HF_ENDPOINT": address, "HTTP_PROXY": address, "HTTPS_PROXY": address, "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hub"), "NO_PROXY": "",
    }  # fmt: skip
    (box / "hub.yaml").write_text("version: 1\nmodels: {m: org/name}\nsave: {step: m, to: out/hub}\n")
    ran = process("run", "hub.yaml", "--sandbox", ".", **environment)
    assert ran.code == 3 and "org/name" in ran.err
    assert process("run", "ties.yaml", "--sandbox", ".", **environment).code == 0
    assert came == [] and not (tmp_path / "hub").exists()
    assert process("inspect", "org/name", **environment).code == 4
    assert came  # so the canary would have sung


def test_a_module_beside_the_recipe_is_not_imported(box: Path, process: Callable[..., Ran]) -> None:
    """`python -m` looks for modules, and for packages that add methods, in the working directory first."""
    config = json.loads((box / "base" / "config.json").read_text())
    (box / "base" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "x.X"}}))
    for name in ("transformers", "torch", "huggingface_hub"):
        (box / f"{name}.py").write_text(f"open('{box}/sung', 'w').close()")
    (box / "tune.py").write_text((box / "torch.py").read_text())
    (box / "tune-1.dist-info").mkdir()
    (box / "tune-1.dist-info" / "entry_points.txt").write_text(f"[{GROUP}]\ntune = tune\n")
    ran = process("run", "ties.yaml", "--sandbox", ".")
    assert ran.code == 0, ran.err
    assert not (box / "sung").exists()


def test_wrong_use(box: Path, merge: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    assert merge("run", "ties.yaml", "--sandbox", "none").code == 2
    assert merge("run", "ties.yaml", "--sandbox", "ties.yaml").code == 2
    assert merge("run", "ties.yaml", "--sandbox", "/").code == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    ran = merge("run", "ties.yaml", "--sandbox", ".")
    assert ran.code == 2 and "several processes" in ran.err
    assert not (box / "out").exists()


ATTACKS = """
import ctypes, os, shutil, socket, sqlite3, subprocess, sys
from mergekit_lite import MergeError, sandbox
box, away, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
f = lambda name: os.path.join(away, name)
g = lambda name: os.path.join(box, name)
tcp, udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
directory = os.open(away, os.O_RDONLY)
def swapped():
    os.unlink(g("swap")); os.symlink(f("file"), g("swap"))
attacks = {
    "connect": lambda: tcp.connect(("127.0.0.1", port)),
    "connect_ex": lambda: tcp.connect_ex(("127.0.0.1", port)),
    "create": lambda: socket.create_connection(("127.0.0.1", port)),
    "bind": lambda: tcp.bind(("127.0.0.1", 0)),
    "sendto": lambda: udp.sendto(b"x", ("127.0.0.1", port)),
    "sendmsg": lambda: udp.sendmsg([b"x"], [], 0, ("127.0.0.1", port)),
    "getaddrinfo": lambda: socket.getaddrinfo("localhost", 80),
    "gethostbyname": lambda: socket.gethostbyname("localhost"),
    "Popen": lambda: subprocess.run(["true"]),
    "system": lambda: os.system("true"),
    "popen": lambda: os.popen("true"),
    "fork": lambda: os.fork(),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "posix_spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "kill": lambda: os.kill(os.getppid(), 0),
    "database": lambda: sqlite3.connect(f("new")),
    "library": lambda: ctypes.CDLL(g("lib.so")),
    "library outside": lambda: ctypes.CDLL(f("lib.so")),
    "read": lambda: open(f("file")),
    "read low": lambda: os.open(f("file"), os.O_RDONLY),
    "read through a link": lambda: open(g("link/file")),
    "read through ..": lambda: open(g("../outside/file")),
    "read a password": lambda: open("/etc/passwd"),
    "read an environment": lambda: open("/proc/self/environ"),
    "list": lambda: os.listdir(away),
    "scan": lambda: os.scandir(g("link")),
    "write": lambda: open(f("new"), "w"),
    "append": lambda: open(f("file"), "ab"),
    "update": lambda: open(f("file"), "r+b"),
    "exclusive": lambda: open(f("new"), "x"),
    "write low": lambda: os.open(f("new"), os.O_WRONLY | os.O_CREAT),
    "write through a link": lambda: open(g("swap"), "w"),
    "write to a device": lambda: open("/dev/shm/mergekit_lite_canary", "w"),
    "rename out": lambda: os.rename(g("mine"), f("new")),
    "rename in": lambda: os.rename(f("file"), g("new")),
    "replace out": lambda: os.replace(g("mine"), f("file")),
    "move out": lambda: shutil.move(g("mine"), away),
    "copy in": lambda: shutil.copy(f("file"), box),
    "hard link in": lambda: os.link(f("file"), g("new")),
    "hard link out": lambda: os.link(g("mine"), f("new")),
    "link in": lambda: os.symlink(f("file"), g("new")),
    "link out": lambda: os.symlink(g("mine"), f("new")),
    "remove": lambda: os.remove(f("file")),
    "remove by folder": lambda: os.unlink("file", dir_fd=directory),
    "rmdir": lambda: os.rmdir(f("empty")),
    "mkdir": lambda: os.mkdir(f("new")),
    "mkdir through a link": lambda: os.mkdir(g("link/new")),
    "rmtree": lambda: shutil.rmtree(away),
    "truncate": lambda: os.truncate(f("file"), 0),
    "chmod": lambda: os.chmod(f("file"), 0o777),
    "utime": lambda: os.utime(f("file")),
    "chown": lambda: os.chown(f("file"), os.getuid(), os.getgid()),
    "sandbox in a sandbox": lambda: sandbox.enter("/tmp"),
}
right = {
    "write": lambda: open(g("a"), "w").close(),
    "read": lambda: open(g("a")).close(),
    "null": lambda: open(os.devnull, "w").close(),
    "rename": lambda: os.rename(g("a"), g("b")),
    "mkdir": lambda: os.makedirs(g("c/d")),
    "link": lambda: os.symlink("b", g("e")),
    "rmtree": lambda: shutil.rmtree(g("c")),
    "cores": lambda: open("/proc/cpuinfo").close(),
    "own": lambda: open("/proc/self/status").close(),
    "late import": lambda: __import__("xml.dom.minidom"),
    "torch": lambda: __import__("torch"),
    "transformers": lambda: __import__("transformers.models.auto.configuration_auto"),
    "libc": lambda: ctypes.CDLL(None),
}
with sandbox.confined(box):
    for name, attack in attacks.items():
        try:
            attack()
            print("done:", name)
        except MergeError as fault:
            assert "sandbox" in str(fault)
        except BaseException as fault:
            print("otherwise:", name, repr(fault))
    for name, use in right.items():
        try:
            use()
        except BaseException as fault:
            print("refused:", name, repr(fault))
open(f("file")).close()
subprocess.run(["true"], check=True)
"""


def test_the_second_wall_stops_each_way_out(box: Path, canary: tuple[int, list[object]]) -> None:
    port, came = canary
    away = box.parent / "outside"
    (away / "file").write_text("secret")
    (away / "empty").mkdir()
    (box / "mine").write_text("mine")
    (box / "swap").symlink_to(away / "file")
    for place in (box, away):
        (place / "lib.so").write_bytes(b"no library")
    before = digest(away)
    ran = subprocess.run(
        [sys.executable, "-P", "-c", ATTACKS, str(box), str(away), str(port)],
        env=environ(), cwd=box, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stdout + ran.stderr
    assert digest(away) == before
    assert came == [] and not Path("/dev/shm/mergekit_lite_canary").exists()
    assert (box / "mine").read_text() == "mine"

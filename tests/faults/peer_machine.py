"""Runs mergekit, undisturbed or under faults, and tells what it left. See peer.py."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from layer import Layer

Row = tuple[str, int, str]  # fault or attack, times tried (0: not), what happened
SECONDS = 60  # after which a run counts as hanging
ONE = ("--quiet", "--no-copy-tokenizer")
SHARDS = ("--no-copy-tokenizer", "--out-shard-size", "2M")  # several shards
# Does what mergekit-yaml does, in forks of one process that has made its imports, which take most of a run's time. On
# "load" a fork has transformers load a folder instead.
SERVER = """
import ctypes, json, os, resource, sys
import torch, transformers, transformers.models.llama.modeling_llama
from mergekit.scripts.run_yaml import main

def load(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    print("MISSING", len(info["missing_keys"]), flush=True)

for line in sys.stdin:
    order = json.loads(line)
    if "poll" in order:
        pid, status = os.waitpid(order["poll"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        os.chdir(order["folder"])
        os.environ.update(order["variables"])
        for name, value in order["limits"].items():
            if name == "RLIMIT_AS":
                value += int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(getattr(resource, name), (value, value))
        sys.argv = ["mergekit-yaml", *order["words"]]
        ctypes.CDLL(None).faults_set(order["rules"].encode(), order["log"].encode())
        code = 1
        try:
            load(*order["words"]) if order["load"] else main()
            code = 0
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        ctypes.CDLL(None).faults_set(b"", b"")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
"""


@dataclass(frozen=True)
class Ran:
    """Exit code (negative: the signal that ended it; None: it was still running after SECONDS), what it printed, and
    the calls its rules apply to."""

    code: int | None
    out: str
    err: str
    calls: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        """Exit code and the line of the message that names the error, or its last one."""
        ended = ("still running after a minute" if self.code is None else f"exit {self.code}" if self.code >= 0
                 else f"ended by {signal.Signals(-self.code).name}")  # fmt: skip
        lines = [line.strip() for line in re.split(r"[\r\n]+", self.err) if line.strip()]
        lines = [line for line in lines if "it/s]" not in line and "?it" not in line and "is deprecated!" not in line]
        if not lines or not self.code:
            return ended
        raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Abort)\b", line)]
        kind = "traceback" if "Traceback (most" in self.err else "message"
        return f"{ended}, {kind}, {code((raised or lines)[-1])}"


@dataclass
class Process:
    """A run that goes on. `stop` ends it by SIGKILL."""

    peer: Peer
    pid: int
    popen: subprocess.Popen[bytes] | None
    out: Path
    err: Path
    log: Path
    code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self.popen.poll() if self.popen else self.peer.order({"poll": self.pid})
        return self.code

    def send(self, number: int) -> None:
        """Send a signal; nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def finish(self) -> Ran:
        until = time.monotonic() + SECONDS
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        ended = self.poll()
        if ended is None:
            self.send(signal.SIGKILL)
            while self.poll() is None:
                time.sleep(0.005)
        calls = tuple(self.log.read_text(errors="replace").splitlines()) if self.log.exists() else ()
        return Ran(ended, self.out.read_text(errors="replace"), self.err.read_text(errors="replace"), calls)


class Peer:
    """mergekit by its executable `mergekit-yaml`; `models` holds the folders `base`, `a`, `b`, `c`."""

    def __init__(self, executable: Path, models: Path, folder: Path):
        self.executable, self.models, self.folder = executable.absolute(), models.absolute(), folder
        self.layer = Layer(folder)
        self.number = 0
        self.server = subprocess.Popen(
            [self.executable.parent / "python", "-c", SERVER],
            env=self.variables(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.run("--help")  # returns once the imports are made

    def variables(self, **more: str) -> dict[str, str]:
        """An environment without this program's import path, with the layer of faults, off line."""
        kept = {key: text for key, text in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
        return kept | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "hf"), "NO_COLOR": "1",
                       "OMP_NUM_THREADS": "1",
                       "LD_PRELOAD": str(self.layer.shared_object), "FAULTS": "", "FAULTS_LOG": ""} | more  # fmt: skip

    def order(self, what: dict[str, Any]) -> Any:
        assert self.server.stdin is not None and self.server.stdout is not None
        print(json.dumps(what), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(
        self,
        *words: str | Path,
        rules: str = "",
        limits: dict[str, int] | None = None,
        whole: bool = False,
        load: bool = False,
        **variables: str,
    ) -> Process:
        """`mergekit-yaml` with these words. `whole`: the executable itself, not a fork; it alone follows variables that
        are read at an import."""
        self.number += 1
        out, err, log = (self.folder / f"{self.number}.{name}" for name in ("out", "err", "log"))
        for file in (out, err):
            file.touch()
        plain = [str(word) for word in words]
        if whole:
            with open(out, "wb") as o, open(err, "wb") as e:
                popen = subprocess.Popen(
                    [self.executable, *plain],
                    env=self.variables(FAULTS=rules, FAULTS_LOG=str(log), **variables),
                    stdin=subprocess.DEVNULL,
                    stdout=o,
                    stderr=e,
                )
            return Process(self, popen.pid, popen, out, err, log)
        told = {"words": plain, "rules": rules, "limits": limits or {}, "variables": variables, "load": load}
        told |= {"out": str(out), "err": str(err), "log": str(log), "folder": str(self.folder)}
        return Process(self, self.order(told), None, out, err, log)

    def run(self, *words: str | Path, **more: Any) -> Ran:
        return self.start(*words, **more).finish()

    def recipe(self, place: Path, **more: Any) -> Path:
        """A linear merge of a and b. `models` names other folders, `weights` other weights; the rest goes into the
        recipe as it is."""
        models = more.pop("models", (self.models / "a", self.models / "b"))
        weights = more.pop("weights", (0.5, 0.5))
        listed = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models, weights, strict=True)]
        path = place / f"{len(list(place.glob('*.yaml')))}.yaml"
        made = {"merge_method": "linear", "dtype": "bfloat16", "models": listed} | more
        path.write_text(yaml.safe_dump(made), encoding="utf-8")
        return path

    def merge(self, place: Path, *flags: str, **more: Any) -> Ran:
        """The copy of `a` in `place` with `b`, into `out` there, in one shard."""
        recipe = self.recipe(place, models=(place / "a", self.models / "b"))
        return self.run(recipe, place / "out", *(flags or ONE), **more)

    @contextlib.contextmanager
    def place(self, *copied: str) -> Iterator[Path]:
        """A fresh folder with copies of these models; removed at the end."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            for name in copied:
                shutil.copytree(self.models / name, Path(folder) / name)
            yield Path(folder)

    def loads(self, folder: Path) -> str:
        """What transformers makes of a folder."""
        ran = self.run(folder, load=True)
        missing = re.search(r"MISSING (\d+)", ran.out)
        if missing is None:
            return "from_pretrained refuses it"
        return "from_pretrained takes it" + (f" with {missing[1]} tensors missing" if int(missing[1]) else "")

    def left(self, out: Path, whole: dict[str, str]) -> str:
        """What stands in an output's folder, held against the shards of an undisturbed run."""
        if not out.exists():
            return "no folder"
        if not any(out.iterdir()):
            return "an empty folder"
        begun = "" if not [*out.glob(".tmp*")] else ", a `.tmp…` of a shard"
        found = digests(out)
        if not found:
            return f"a folder without a shard{begun}"
        same = "all shards as undisturbed" if found == whole else f"{len(found)} of {len(whole)} shards"
        lacks = "" if (out / "config.json").exists() else ", no config.json"
        if len(whole) > 1 and not (out / "model.safetensors.index.json").exists():
            lacks += ", no index"
        return f"{same}{begun}{lacks}, {self.loads(out)}"

    def again(self, recipe: Path, out: Path, whole: dict[str, str]) -> str:
        """The same command without the fault."""
        ran = self.run(recipe, out, "--quiet", *SHARDS)
        rest = [*out.glob(".tmp*"), *loose(out)]
        same = "same bytes as undisturbed" if covered(out, whole) else "OTHER bytes"
        return f"{ran.told}" + (f", {same}" if not ran.code else "") + (", older files stay" if rest else "")

    def close(self) -> None:
        self.server.communicate()


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}


def covered(folder: Path, whole: dict[str, str]) -> bool:
    """Whether these shards are there, whatever else is."""
    return whole.items() <= digests(folder).items()


def loose(folder: Path) -> set[str]:
    """Shards that a folder's index does not name."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return set()
    return digests(folder).keys() - set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())


def code(text: str) -> str:
    """A line of a message as code in a table: without places, control characters and bars, cut."""
    text = re.sub(r"(?<![\w:/])/[^ '\",:]*/(?=[^/ ])", "…/", re.sub(r"\x1b\[[01]m", "", text))
    text = re.sub(r"\.tmp\w+", ".tmp…", re.sub(r"0x[0-9a-f]+", "0x…", text))
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).replace("|", "¦").replace("`", "'")
    return f"`{text if len(text) <= 160 else text[:157] + '…'}`"


def counted(texts: Iterable[str]) -> str:
    """Outcomes with how often each was seen, the most frequent first."""
    found = Counter(texts)
    if len(found) == 1:
        return next(iter(found))
    return "<br>".join(f"{count}×: {text}" for text, count in found.most_common())

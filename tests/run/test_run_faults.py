"""Faults of the operating system, provoked below the program by `tests/faults/preload.c`: what a user is promised then
holds (`tests/faults/every_call.py`), and what is easily taken for a bug is told for what it is."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.faults.every_call import FULL, Bench, bench, tree, write_place
from tests.faults.layer import Layer, NoCompiler, Ran

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Layer:
    if sys.platform != "linux":
        pytest.skip("the faults are made by a library for Linux")
    try:
        return Layer(tmp_path_factory.mktemp("layer"))
    except NoCompiler as fault:
        pytest.skip(str(fault))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "place"
    write_place(folder)
    return folder


@pytest.fixture(scope="module")
def fork(layer: Layer) -> Iterator[Callable[..., Ran]]:
    with layer.forks() as made:
        yield made


@pytest.fixture(scope="module")
def linear(place: Path, fork: Callable[..., Ran]) -> Bench:
    return bench(place, "linear", fork)


@pytest.fixture(scope="module")
def two(place: Path, fork: Callable[..., Ran]) -> Bench:
    """Two outputs."""
    return bench(place, "two", fork)


def number(made: Bench, call: str, name: str, nth: int = 1) -> int:
    """Which call on the outputs is the n-th `call` on a file of that name."""
    found = [k for k, line in enumerate(made.calls, 1) if line.split()[0] == call and line.endswith(name)]
    return found[nth - 1]


# The layer itself


REACHED = """
import fcntl, mmap, os, sys, threading, time
os.mkdir("x"); fd = os.open("x/f", os.O_RDWR | os.O_CREAT); os.posix_fallocate(fd, 0, 9); os.ftruncate(fd, 5)
os.pwrite(fd, b"abc", 0); os.pwritev(fd, [b"de"], 3); os.pread(fd, 2, 0); os.preadv(fd, [bytearray(2)], 0)
os.read(fd, 1); os.write(fd, b"z"); os.fsync(fd); os.fdatasync(fd); fcntl.flock(fd, fcntl.LOCK_EX)
mmap.mmap(fd, 5).close(); os.close(fd); os.rename("x/f", "x/g")
with open("x/g", "rb") as file: file.read()
os.unlink("x/g"); os.rmdir("x"); time.time()
thread = threading.Thread(target=print); thread.start(); thread.join()
"""


def test_every_call_is_reached(layer: Layer, tmp_path: Path) -> None:
    every = "open,pread,preadv,read,pwrite,pwritev,write,fsync,fdatasync,fallocate,ftruncate,mmap,flock,close,rename,"
    every += "mkdir,rmdir,unlink,clock,thread"
    ran = layer.run(["-c", REACHED], f"calls={every}", program=(), folder=tmp_path)
    assert ran.code == 0, ran.err
    assert {line.split()[0] for line in ran.calls} == set(every.split(","))
    assert f"pwrite {tmp_path}/x/f" in ran.calls and f"open {tmp_path}/x/g" in ran.calls


@pytest.mark.parametrize(
    "rule, code",
    [
        ("calls=preadv short=1", "os.preadv(fd, [bytearray(9)], 0) == 1"),
        ("calls=write at=2 short=3", "os.write(fd, b'abcde') == 5 and os.write(fd, b'abcde') == 3"),
        ("calls=clock jump=-900000000", "time.time() < 1e9"),
        ("calls=close errno=5", "fails(5, os.close, fd)"),
        ("calls=fsync from=2 errno=28", "not os.fsync(fd) and fails(28, os.fsync, fd) and fails(28, os.fsync, fd)"),
        ("calls=fsync at=1 signal=15", "not os.fsync(fd) and stopped == [15]"),
    ],
)
def test_what_a_rule_does(rule: str, code: str, layer: Layer, tmp_path: Path) -> None:
    program = f"""
import os, signal, time
stopped = []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
def fails(number, call, *arguments):
    try: call(*arguments)
    except OSError as fault: return fault.errno == number
fd = os.open("f", os.O_RDWR | os.O_CREAT); os.pwrite(fd, b"0123456789", 0)
assert {code}
"""
    path = "" if "clock" in rule else f" path={tmp_path}"
    ran = layer.run(["-c", program], rule + path, program=(), folder=tmp_path)
    assert ran.code == 0, ran.err


# One call of each kind fails; every_call.py does all of them


@pytest.mark.parametrize(
    "call, name, nth, error",
    [
        ("mkdir", "out.partial", 1, errno.EROFS),
        ("open", "journal.jsonl", 1, errno.EACCES),
        ("open", "00002-of-00004.safetensors", 1, errno.EDQUOT),
        ("fallocate", "00002-of-00004.safetensors", 1, errno.ENOSPC),
        ("pwrite", "00002-of-00004.safetensors", 1, errno.ENOSPC),  # its header
        ("pwrite", "00002-of-00004.safetensors", 2, errno.EIO),
        ("fdatasync", "00001-of-00004.safetensors", 1, errno.EIO),
        ("fdatasync", "00001-of-00004.safetensors", 2, errno.EIO),
        ("ftruncate", "journal.jsonl", 1, errno.EIO),
        ("write", "journal.jsonl", 1, errno.ENOSPC),
        ("fsync", "journal.jsonl", 1, errno.EIO),
        ("preadv", "00002-of-00004.safetensors", 1, errno.EIO),  # its digest
        ("write", "config.json", 1, errno.ENOSPC),
        ("fsync", "tokenizer.json", 1, errno.EIO),
        ("open", "recipe.lock.yaml", 1, errno.ENOSPC),
        ("rename", "out.partial", 1, errno.EIO),
        ("unlink", "journal.jsonl", 1, errno.EIO),
        ("close", "00003-of-00004.safetensors", 1, errno.EIO),
    ],
)
@pytest.mark.parametrize("lasting", [False, True])
def test_one_call_fails(call: str, name: str, nth: int, error: int, lasting: bool, linear: Bench) -> None:
    k = number(linear, call, name, nth)
    linear.hold(f"path={linear.outputs} {'from' if lasting else 'at'}={k} errno={error}")


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_two_outputs_on_a_disk_that_fills_up(share: float, two: Bench) -> None:
    calls = FULL.removeprefix("calls=").strip().split(",")
    count = sum(line.split()[0] in calls for line in two.calls)
    two.hold(f"{FULL}path={two.outputs} from={int(share * count)} errno={errno.ENOSPC}")


@pytest.mark.parametrize("what", ["errno=5", "errno=4", "short=1", "short=7"])
def test_reads_of_an_input(what: str, linear: Bench) -> None:
    """EIO stops the run wherever it comes; EINTR and short reads change nothing."""
    for call in ("calls=read at=1", "calls=read at=2", "calls=preadv at=1", "calls=preadv at=3", "calls=preadv at=6"):
        happened = linear.hold(f"{call if 'errno' in what else call.split()[0]} path={linear.folder}/b/model {what}")
        assert happened.startswith("exit 4" if what == "errno=5" else "exit 0")


def test_short_writes(linear: Bench) -> None:
    assert linear.hold(f"calls=pwrite,write path={linear.outputs} short=5").startswith("exit 0")


def test_a_file_system_with_little_to_offer(two: Bench) -> None:
    """No fallocate, no mmap, no rename of folders."""
    place = f"path={two.folder}"
    lacks = [f"calls=mmap {place} errno={errno.ENODEV}"]
    lacks += [f"calls=rename path={two.outputs}/{name}.partial at=1 errno={errno.EXDEV}" for name in ("out", "half")]
    for error in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
        assert two.hold("\n".join([*lacks, f"calls=fallocate {place} errno={error}"])).startswith("exit 0")
        assert not list(two.outputs.glob("*.partial"))


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(error: int, linear: Bench) -> None:
    """Two runs could write into one output there: refused in these words, and nothing is left behind."""
    rule = f"calls=flock path={linear.outputs} errno={error}"
    assert linear.hold(rule).startswith("exit 5")
    linear.clear()
    assert "cannot lock" in linear.run(rules=rule).err
    assert not list(linear.outputs.rglob("*.partial"))


# Killed while the outputs get their names, which may take many steps


@pytest.mark.parametrize("renames", [True, False])
def test_killed_while_outputs_get_their_names(renames: bool, two: Bench) -> None:
    """Wherever it happens, a folder with a lock is whole, and `--resume` ends in the same bytes."""
    rule = f"path={two.outputs}"
    lacks = [] if renames else [f"calls=rename path={two.outputs}/{n}.partial at=1 errno=1" for n in ("out", "half")]
    two.clear()
    calls = two.run(rules="\n".join([*lacks, rule])).calls
    first = next(k for k, line in enumerate(calls, 1) if line.startswith("rename"))
    killed = 0
    # The first ones too, one by one: what tells whose folder it is has only begun to be written then.
    for k in sorted({*range(first, first + 6), *range(first, len(calls) + 1, 3 if renames else 9)}):
        two.clear()
        ran = two.run(rules="\n".join([*lacks, f"{rule} at={k} signal={signal.SIGKILL}"]))
        assert ran.code == -signal.SIGKILL
        killed += 1
        for name in ("out", "half"):
            if (two.outputs / name / "recipe.lock.yaml").exists():
                inside = {n: d for n, d in tree(two.outputs).items() if n.startswith(f"{name}/")}
                assert {n: inside.get(n) for n in two.whole if n.startswith(f"{name}/")}.items() <= inside.items()
        if (two.outputs / "out.partial/journal.jsonl").exists():
            again = two.run("--resume")
            assert again.code == 0, again.err
        left = {n: d for n, d in tree(two.outputs).items() if "journal" not in n}
        assert left == two.whole, (k, calls[k - 1])
        assert not [n for n in left if "merge-moving" in n]
    assert killed >= 5


# A flush that fails


def test_a_failed_flush_is_not_forgotten(linear: Bench) -> None:
    """The system tells of lost bytes once and calls the next flush a success. What it lost must be written again."""
    linear.clear()
    k = number(linear, "fdatasync", "00001-of-00004.safetensors", 2)
    ran = linear.run(rules=f"path={linear.outputs} at={k} errno={errno.EIO}")
    assert ran.code == 5 and "cannot flush" in ran.err and "--resume" in ran.err
    shards = sorted((linear.outputs / "deep/out.partial").glob("*.safetensors"))
    data = bytearray(shards[0].read_bytes())
    data[-64:] = bytes(64)  # what the disk did not take
    shards[0].write_bytes(data)
    again = linear.run("--resume")
    assert again.code == 0, again.err
    assert tree(linear.outputs) == linear.whole


# Inputs that change


@pytest.mark.parametrize("change", ["content", "rights"])
def test_an_input_changed_with_its_time_set_back(change: str, place: Path, layer: Layer, linear: Bench) -> None:
    """Held just after the digest of `b` is formed and before its tensors are read."""
    linear.clear()
    path = place / "b" / WEIGHTS
    kept, seen = path.read_bytes(), path.stat()
    process = layer.start(
        ["run", "linear.yaml", "--threads", "1"],
        f"calls=pwrite path={linear.outputs} at=5 delay=2000 signal={signal.SIGSTOP}",
        folder=place,
    )
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    try:
        if change == "content":
            path.write_bytes(kept[:-64] + bytes(64))
        else:
            path.chmod(0o600)
        os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (4 if change == "content" else 0), err
        if change == "content":
            assert f"b/{WEIGHTS}` changed during the run" in err and not (linear.outputs / "deep/out").exists()
        else:
            assert tree(linear.outputs) == linear.whole
    finally:
        process.kill()
        path.chmod(0o644)
        path.write_bytes(kept)
        os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


# Signals


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    "call, name, nth",
    [
        ("mkdir", "out.partial", 1),
        ("fallocate", "00002-of-00004.safetensors", 1),
        ("pwrite", "00002-of-00004.safetensors", 2),
        ("fsync", "journal.jsonl", 2),
        ("write", "tokenizer.json", 1),
        ("rename", "out.partial", 1),
    ],
)
def test_a_scheduler_ends_it(sent: signal.Signals, call: str, name: str, nth: int, linear: Bench) -> None:
    linear.clear()
    ran = linear.run(rules=f"path={linear.outputs} at={number(linear, call, name, nth)} signal={int(sent)}")
    assert ran.code == 130 and "Traceback" not in ran.err, ran.err
    if "is whole" not in ran.err:
        assert not (linear.outputs / "deep/out").exists()
        linear.follow(ran)
    assert {n: d for n, d in tree(linear.outputs).items() if "journal" not in n} == linear.whole


# Places and clocks


@pytest.mark.parametrize("jump", [-(10**9), 10**9])
def test_a_clock_that_jumps(jump: int, linear: Bench) -> None:
    for at in ("at=1", "at=3", "from=2"):
        linear.clear()
        ran = linear.run(rules=f"calls=clock {at} jump={jump}")
        assert ran.code == 0, ran.err
        assert tree(linear.outputs) == linear.whole


@pytest.mark.parametrize(
    "variables",
    [
        {"TMPDIR": "/nonexistent"},
        {"HOME": "/nonexistent", "MERGEKIT_LITE_CACHE": "1", "XDG_CACHE_HOME": ""},
        {"HOME": "", "MERGEKIT_LITE_CACHE": "1", "XDG_CACHE_HOME": ""},
        {"XDG_CACHE_HOME": "/proc/nothing", "MERGEKIT_LITE_CACHE": "1"},
    ],
)
def test_without_places_of_ones_own(variables: dict[str, str], layer: Layer, place: Path, linear: Bench) -> None:
    """No folder for temporary files, no home, no cache; nor may anything be written to any of them."""
    linear.clear()
    # The environment that the tests run in may itself lie in the system's folder for temporary files.
    full = place / "full_tmp"
    full.mkdir(exist_ok=True)
    paths = [path for path in (str(full), "/nonexistent", ".cache") if path not in sys.prefix]
    rules = "\n".join(f"calls=open,write,mkdir path={path} from=1 errno={errno.ENOSPC}" for path in paths)
    ran = layer.run(["run", "linear.yaml"], rules, folder=place, **{"TMPDIR": str(full), **variables})
    assert ran.code == 0, ran.err
    assert tree(linear.outputs) == linear.whole


# Limits of the process


@pytest.fixture(scope="module")
def sharded(place: Path) -> Path:
    """A recipe whose output has 40 shards, from inputs of 40."""
    for name in ("x", "y"):
        (place / name).mkdir()
        tensors = load_file(place / "a" / WEIGHTS)
        (tensor,) = [tensors["lm_head.weight"]]
        weight_map = {}
        for i in range(40):
            file = f"model-{i + 1:05d}-of-00040.safetensors"
            save_file({f"model.layers.{i}.weight": tensor}, place / name / file, {"format": "pt"})
            weight_map[f"model.layers.{i}.weight"] = file
        index = json.dumps({"weight_map": weight_map})
        (place / name / "model.safetensors.index.json").write_text(index, encoding="utf-8")
        (place / name / "config.json").write_text(json.dumps({"num_hidden_layers": 40}), encoding="utf-8")
    text = (
        "version: 1\nmodels: {x: ./x, y: ./y}\nsteps: {m: {use: linear, of: [x, y]}}\nsave: {to: o/many, shard: 1KB}\n"
    )
    (place / "many.yaml").write_text(text, encoding="utf-8")
    return place


def limited(place: Path, recipe: str, what: int, soft: int, hard: int, *flags: str) -> Ran:
    def limit() -> None:
        resource.setrlimit(what, (soft, hard))

    done = subprocess.run(
        [sys.executable, "-m", "mergekit_lite", "run", recipe, *flags],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "NO_COLOR": "1"},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def test_few_open_files(sharded: Path, linear: Bench) -> None:
    linear.clear()
    for hard in (12, 44):
        ran = limited(sharded, "many.yaml", resource.RLIMIT_NOFILE, hard, hard)
        assert ran.code == 5 and "Too many open files" in ran.err and "ulimit -n" in ran.err, ran.err
        assert "Traceback" not in ran.err and not linear.outputs.exists()
    # Inputs are closed for one another; a soft limit is the process's own to raise.
    for soft, hard in ((64, 64), (16, 1024)):
        ran = limited(sharded, "many.yaml", resource.RLIMIT_NOFILE, soft, hard)
        assert ran.code == 0, ran.err
        linear.clear()


def test_no_further_thread(layer: Layer, place: Path, linear: Bench) -> None:
    """At whichever thread it happens: a clear error, or a run that does with fewer."""
    for k in (1, 2, 3):
        linear.clear()
        ran = linear.fork(
            ["run", "linear.yaml", "--threads", "2"], f"calls=thread from={k} errno={errno.EAGAIN}", linear.folder
        )
        assert ran.code in (0, 5) and "Traceback" not in ran.err, ran.err
        if ran.code:
            assert "no further thread" in ran.err and "--threads 1" in ran.err, ran.err
            linear.follow(ran)
        assert tree(linear.outputs) == linear.whole


def test_little_address_space(place: Path, linear: Bench) -> None:
    """Whatever fails first, torch's libraries or a tensor's memory, it is no bug."""
    recipe = place / "little.yaml"
    recipe.write_text((place / "ties.yaml").read_text(), encoding="utf-8")
    for megabytes in (150, 400):
        linear.clear()
        ran = limited(place, "little.yaml", resource.RLIMIT_AS, megabytes << 20, megabytes << 20, "--threads", "1")
        assert ran.code == 5, ran.err
        assert "memory" in ran.err and "ulimit -v" in ran.err and "Traceback" not in ran.err, ran.err
        again = linear.fork(["run", "little.yaml", *(["--resume"] if "--resume" in ran.err else [])], "", place)
        assert again.code == 0, again.err

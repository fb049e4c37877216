"""Folders from strangers: what lies where a file is expected is not trusted before it is looked at."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_files import factors, write_adapter
from raw_safetensors import entry, put, put_floats, raw

from mergekit_lite.checkpoint import adapter, header, listing
from mergekit_lite.checkpoint.adapter import open_adapter
from mergekit_lite.checkpoint.find import INDEX, open_checkpoint
from mergekit_lite.checkpoint.inside import read_object
from mergekit_lite.errors import InputError

SINGLE = "model.safetensors"
SHARD = "model-00001-of-00001.safetensors"


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def endless(path: Path) -> None:
    """100 GB that take no room."""
    with path.open("wb") as file:
        file.truncate(10**11)


def elsewhere(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def circle(path: Path) -> None:
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path.name)


def chain(path: Path) -> None:
    """Links to links, more of them than a system follows."""
    for i in range(60):
        path.with_name(f"link{i}").symlink_to(f"link{i + 1}")
    path.symlink_to("link0")


def upwards(path: Path) -> None:
    path.symlink_to("../../../../../../../../etc/passwd")


TRICKS: list[Callable[[Path], None]] = [pipe, folder, device, endless, elsewhere, circle, chain, upwards]


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("name", [SINGLE, SHARD, INDEX, "config.json"])
def test_what_lies_where_a_file_of_a_checkpoint_is_expected(
    name: str, trick: Callable[[Path], None], tmp_path: Path
) -> None:
    if name == "config.json":
        put_floats(tmp_path / SINGLE, "a")
    if name == SHARD:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SHARD}}))
    trick(tmp_path / name)
    with pytest.raises(InputError, match=re.escape(name)) as caught:
        open_checkpoint(str(tmp_path), None, offline=True)
    assert "root:" not in str(caught.value)


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("name", [adapter.CONFIG, adapter.WEIGHTS])
def test_what_lies_where_a_file_of_an_adapter_is_expected(
    name: str, trick: Callable[[Path], None], tmp_path: Path
) -> None:
    write_adapter(tmp_path, factors({"layers.0.q_proj": (6, 8)}))
    (tmp_path / name).unlink()
    trick(tmp_path / name)
    with pytest.raises(InputError, match=re.escape(name)) as caught:
        open_adapter(str(tmp_path), None, offline=True)
    assert "root:" not in str(caught.value)


def test_a_pipe_that_somebody_holds_open(tmp_path: Path) -> None:
    """Reading it gives neither bytes nor an end."""
    put_floats(tmp_path / SINGLE, "a")
    os.mkfifo(tmp_path / "config.json")
    held = os.open(tmp_path / "config.json", os.O_RDWR)
    try:
        with pytest.raises(InputError, match=r"config\.json` is not a regular file"):
            open_checkpoint(str(tmp_path), None)
    finally:
        os.close(held)


def test_no_file_stays_open(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    before = os.listdir("/dev/fd")
    for _ in range(3):
        with pytest.raises(InputError):
            read_object(tmp_path / "x", 10)
        with pytest.raises(InputError):
            header.read_header(tmp_path / "x", "x")
    assert len(os.listdir("/dev/fd")) == len(before)


def test_a_file_of_the_largest_size_and_of_one_byte_more(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}" + " " * 98)
    assert read_object(path, 100) == {}
    with pytest.raises(InputError, match="more than 99 bytes"):
        read_object(path, 99)


def test_an_index_that_names_a_tensor_twice(tmp_path: Path) -> None:
    """Two readers may look for it in two files."""
    put_floats(tmp_path / "one.safetensors", "a")
    put_floats(tmp_path / "two.safetensors", "a")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')
    with pytest.raises(InputError, match="`a` stands twice in"):
        open_checkpoint(str(tmp_path), None)


def test_an_index_of_a_million_tensors_and_one_of_many_files(tmp_path: Path) -> None:
    put_floats(tmp_path / "one.safetensors", "t5")
    names = {f"t{i}": "one.safetensors" for i in range(1_000_000)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(InputError, match="promises 999999 tensors that its shards lack: t0") as caught:
        open_checkpoint(str(tmp_path), None)
    assert len(str(caught.value)) < 1000
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(100_000)}}))
    with pytest.raises(InputError, match="lacks 100000 of its 100000 shards") as caught:
        open_checkpoint(str(tmp_path), None)
    assert len(str(caught.value)) < 1000


def test_a_set_of_shards_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of a hundred thousand files made a list of all: a folder of empty files kept the program busy for days."""
    names = [f"m-{i:06d}-of-020000.safetensors" for i in range(1, 20_001)]
    listing._check_numbers(names, "model")
    with pytest.raises(InputError, match="lacks 1 of its 20000 shards: m-000003-of"):
        listing._check_numbers([name for name in names if "000003-" not in name], "model")
    with pytest.raises(InputError, match="claims to be one of 999999 shards"):
        listing._check_numbers(["m-000001-of-999999.safetensors"], "model")


@pytest.mark.parametrize("base", ["../secret", "/etc", "org/private", "https://example.com/x", "\x1b[31m", ["a"], {}])
def test_the_base_that_an_adapter_names_is_never_looked_for(
    base: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "lora", factors({"layers.0.q_proj": (6, 8)}), base_model_name_or_path=base)
    opened: list[str] = []
    original = os.open

    def watched(path: str, *more: int, **named: int) -> int:
        opened.append(os.fspath(path))
        return original(path, *more, **named)

    def never(*anything: object, **more: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(os, "open", watched)
    monkeypatch.setattr(adapter, "fetch", never)
    open_adapter(str(tmp_path / "lora"), None)
    assert sorted({Path(path).name for path in opened}) == [adapter.CONFIG, adapter.WEIGHTS]
    assert {Path(path).parent for path in opened} == {tmp_path / "lora"}


def test_patterns_that_together_take_too_long_are_refused(tmp_path: Path) -> None:
    """Without that this test would not end."""
    long = "a." * 5000 + "q_proj"
    fails = pytest.raises(InputError, match="too many patterns in `alpha_pattern`, or too long names")
    with fails:
        write_adapter(tmp_path / "long", factors({long: (6, 8)}), alpha_pattern={".*x.*": 1})
        open_adapter(str(tmp_path / "long"), None)
    with fails:
        patterns = {f"x{i}": 1 for i in range(100_000)}
        modules = {f"model.layers.{i}.self_attn.q_proj": (1, 1) for i in range(3000)}
        write_adapter(tmp_path / "many", factors(modules), alpha_pattern=patterns)
        open_adapter(str(tmp_path / "many"), None)


def test_an_adapter_with_a_pattern_for_each_module(tmp_path: Path) -> None:
    modules = {f"model.layers.{i}.self_attn.q_proj": (1, 1) for i in range(600)}
    write_adapter(tmp_path, factors(modules, rank=1), alpha_pattern={name: i for i, name in enumerate(modules)})
    found = open_adapter(str(tmp_path), None)
    assert [found.low_rank[name].scale for name in modules] == list(range(600))


# What a header may make of the memory

BOMBS = {
    "lists": b'{"a":[' + b"[]," * 700_000 + b"0]}",
    "objects": b'{"a":[' + b'{"":0},' * 300_000 + b"0]}",
    "a dtype": b'{"a":{"shape":[1],"data_offsets":[0,1],"dtype":"' + b"F3" * 1_000_000 + b'"}}',
    "sizes": b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[0,' + b"999," * 500_000 + b"1]}}",
    "metadata": json.dumps({"__metadata__": {str(i): "" for i in range(150_000)}}, separators=(",", ":")).encode(),
    "a name": b'{"' + b"\\u202e" * 330_000 + b'":{"shape":[1],"data_offsets":[0,1],"dtype":"F3"}}',
    "an exponent": b'{"a":1e' + b"9" * 2_000_000 + b"}",
    "digits": b'{"a":0.' + b"1" * 2_000_000 + b"}",
}
PROGRAM = """
import sys
from pathlib import Path
from mergekit_lite.checkpoint.header import read_header
from mergekit_lite.errors import InputError

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

before = peak()
for path in sys.argv[1:]:
    try:
        read_header(Path(path), "x")
    except InputError as error:
        assert len(str(error)) < 2000
print(peak() - before)
"""


def test_the_memory_for_a_header_is_bounded_by_its_length(tmp_path: Path) -> None:
    """A dtype took 43 bytes for each of the file's."""
    for name, text in BOMBS.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(raw(text))
        words = [sys.executable, "-c", PROGRAM, str(path)]
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        assert int(done.stdout) < 40 * path.stat().st_size, name


def test_headers_that_are_remembered_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "_KNOWN", {})
    monkeypatch.setattr(header, "_MOST_KNOWN", 1000)
    for i in range(50):
        put(tmp_path / "x.safetensors", {"__metadata__": {"text": "x" * 20 * i}, f"t{i}": entry()}, b"1234")
        header.read_header(tmp_path / "x.safetensors", "x")
        assert sum(nbytes for nbytes, _ in header._KNOWN.values()) <= 1000
    assert header._KNOWN

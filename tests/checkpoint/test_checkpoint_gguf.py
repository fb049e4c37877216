"""GGUF: the numbers that transformers reads, whatever the part; hostile files are one error each."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from mergekit_lite import InputError, load_recipe, plan, run
from mergekit_lite.checkpoint.find import open_checkpoint
from mergekit_lite.checkpoint.gguf_header import read_gguf_header
from mergekit_lite.checkpoint.meta import Checkpoint, TensorMeta
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.unpack import Unpacker
from mergekit_lite.cli.app import execute
from tests.checkpoint.gguf_files import HEADS, HIDDEN, KINDS, KV, LAYERS, VOCABULARY, shapes, write_gguf

SIZES = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}


def numbers(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    with Reader(checkpoint.shards) as reader:
        return {n: reader.read(m, 0, m.numel).view(m.shape).float() for n, m in checkpoint.tensors.items()}


def theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.gguf", dtype=torch.float32)


@pytest.mark.parametrize(
    ("arch", "kind"), [*(("llama", kind) for kind in KINDS), ("qwen2", "Q8_0"), ("qwen2", "Q6_K"), ("qwen3", "Q4_K")]
)
def test_numbers_and_configuration_are_those_of_transformers(tmp_path: Path, arch: str, kind: str) -> None:
    tied = kind in ("F16", "Q6_K")
    write_gguf(tmp_path / "m.gguf", arch, kind, tied=tied, biases=arch == "qwen2")
    model = theirs(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"), None)
    found = numbers(checkpoint)
    expected = model.state_dict()
    if tied:
        expected.pop("lm_head.weight")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    config = dict(checkpoint.config)
    ours = AutoConfig.for_model(config.pop("model_type"), **config).to_dict()
    said = model.config.to_dict()
    aside = {"architectures", "dtype", "quantization_config", "_name_or_path", "_model_name_or_path"}
    assert {key: ours.get(key) for key in said.keys() - aside} == {key: said[key] for key in said.keys() - aside}


def test_biases_of_llama(tmp_path: Path) -> None:
    """transformers does not see from a GGUF file that Llama has any, so they are put in order by hand."""
    write_gguf(tmp_path / "m.gguf", biases=True)
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"), None)
    found = numbers(checkpoint)
    raw = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for part, heads in (("q", HEADS), ("k", KV)):
        for layer in range(LAYERS):
            stored = raw[f"blk.{layer}.attn_{part}.bias"].reshape(heads, -1, 2)
            expected = np.concatenate([stored[..., 0], stored[..., 1]], 1).reshape(-1)
            assert np.array_equal(found[f"model.layers.{layer}.self_attn.{part}_proj.bias"].numpy(), expected)
    assert checkpoint.config["attention_bias"] is True and checkpoint.config["mlp_bias"] is False


@settings(max_examples=40, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["F16", "Q8_0", "Q4_K"]))
def test_a_part_is_the_part_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str
) -> None:
    """Also where a part begins within a group, a row or a head; and no more is read than twice what is asked for, with
    the groups at its ends."""
    path = tmp_path_factory.getbasetemp() / f"part_{kind}" / "m.gguf"
    if not path.exists():
        path.parent.mkdir()
        write_gguf(path, kind=kind, biases=True)
    checkpoint = open_checkpoint(str(path), None)
    packed = sorted(name for name, meta in checkpoint.tensors.items() if meta.packed is not None)
    meta = checkpoint.tensors[data.draw(st.sampled_from(packed))]
    start = data.draw(st.integers(0, meta.numel))
    stop = data.draw(st.integers(start, meta.numel))
    asked: list[int] = []

    class Counting:
        def __init__(self, reader: Reader):
            self.reader = reader

        def read_bytes(self, meta: TensorMeta, start: int, stop: int, buffer: memoryview) -> None:
            asked.append(stop - start)
            self.reader.read_bytes(meta, start, stop, buffer)

    with Reader(checkpoint.shards) as reader:
        whole = reader.read(meta, 0, meta.numel)
        part = Unpacker(Counting(reader)).load(meta, start, stop)
    assert torch.equal(part, whole[start:stop])
    assert meta.packed is not None
    group, nbytes = meta.packed.group
    rows = 2 * (HIDDEN if len(meta.shape) > 1 else 1)  # of the rows at both ends, which are read whole
    assert sum(asked) <= (2 * (stop - start + rows) // group + 8) * nbytes


def test_a_merge_with_gguf(tmp_path: Path) -> None:
    """A quantised model as one input of several; the output is a whole model, the same with any threads and blocks."""
    (tmp_path / "a").mkdir()
    write_gguf(tmp_path / "a" / "m.gguf", kind="Q4_K", seed=1)
    write_gguf(tmp_path / "b.gguf", kind="Q8_0", seed=2)
    outs = []
    for number, (threads, block) in enumerate([(1, None), (3, 4096)]):
        path = tmp_path / f"r{number}.yaml"
        out = tmp_path / f"out{number}"
        models = f"{{a: {tmp_path / 'a'}, b: {tmp_path / 'b.gguf'}}}"
        steps = "{m: {use: linear, of: {a: {weight: 0.25}, b: {weight: 0.75}}}}"
        path.write_text(f"version: 1\nmodels: {models}\nsteps: {steps}\nsave: {{to: {out}}}\n")
        made = plan(load_recipe(path), threads=threads)
        run(made, threads=threads, block=block)
        outs.append(out)
    assert (outs[0] / "model.safetensors").read_bytes() == (outs[1] / "model.safetensors").read_bytes()
    ours = AutoModelForCausalLM.from_pretrained(outs[0])
    one, other = theirs(tmp_path / "a").state_dict(), numbers(open_checkpoint(str(tmp_path / "b.gguf"), None))
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, 0.25 * one[name] + 0.75 * other[name], rtol=1e-6, atol=1e-8)
    assert "quantization_config" not in json.loads((outs[0] / "config.json").read_text())


def test_a_single_file_saved_as_it_is(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind="Q6_K")
    path = tmp_path / "r.yaml"
    path.write_text(f"version: 1\nmodels: {{a: {tmp_path / 'm.gguf'}}}\nsave: {{step: a, to: {tmp_path / 'out'}}}\n")
    run(plan(load_recipe(path)))
    expected = theirs(tmp_path).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_parts(tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    write_gguf(tmp_path / "whole" / "m.gguf", kind="Q8_0")
    write_gguf(tmp_path / "parts" / "m.gguf", kind="Q8_0", split=8)
    files = sorted((tmp_path / "parts").iterdir())
    assert len(files) == 3
    whole, parts = (numbers(open_checkpoint(str(tmp_path / name), None)) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    files[1].rename(tmp_path / "aside")
    with pytest.raises(InputError, match="No such file"):
        open_checkpoint(str(files[0]), None)
    files[2].rename(files[1])
    (tmp_path / "aside").rename(files[2])
    with pytest.raises(InputError, match="part number 2, not 1"):
        open_checkpoint(str(files[0]), None)


def test_several_models_in_a_folder(tmp_path: Path) -> None:
    for kind in ("Q8_0", "F16"):
        write_gguf(tmp_path / f"m.{kind}.gguf", kind=kind)
    with pytest.raises(InputError, match="holds 2 GGUF models"):
        open_checkpoint(str(tmp_path), None)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"mergekit_lite\[gguf\]"):
        open_checkpoint(str(tmp_path / "m.gguf"), None)


def test_what_is_not_taken(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", more={"rope_freqs.weight": np.ones(32, dtype=np.float32)})
    notes = open_checkpoint(str(tmp_path / "m.gguf"), None).notes
    assert ["rope_freqs" in note.message for note in notes] == [True]
    write_gguf(tmp_path / "n.gguf", more={"blk.0.ffn_gate_inp.weight": np.ones((4, 4), dtype=np.float32)})
    with pytest.raises(InputError, match=r"a model of `llama` does not have: `blk[.]0[.]ffn_gate_inp"):
        open_checkpoint(str(tmp_path / "n.gguf"), None)
    write_gguf(tmp_path / "g.gguf", "gemma2")
    with pytest.raises(InputError, match="of the architecture `gemma2`"):
        open_checkpoint(str(tmp_path / "g.gguf"), None)


# Headers by hand


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


ARCH = key(b"general.architecture", 8, text(b"llama"))


def entry(name: bytes = b"t", shape: tuple[int, ...] = (32, 4), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(keys: list[bytes], tensors: list[bytes], counts: tuple[int, int] | None = None, version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys))))
    made = head + b"".join(keys) + b"".join(tensors)
    return made + b"\0" * (-len(made) % 32) + b"\0" * 512


HEADER = 2000  # bytes that the header of the sound file has at least
HUGE = 2**64 - 1
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "left"),
    "another kind of file": (b"PK\3\4" + b"\0" * 100, "does not begin with `GGUF`"),
    "version 1": (header([ARCH], [entry()], version=1), "version 1"),
    "big-endian": (header([ARCH], [entry()], version=3 << 24), "big-endian"),
    "2**64 - 1 tensors": (header([ARCH], [entry()], (HUGE, 1)), "tensors"),
    "2**64 - 1 keys": (header([ARCH], [entry()], (1, HUGE)), "keys"),
    "one key too many": (header([ARCH], [entry()], (1, 2)), "`"),
    "a key of 2**63 bytes": (header([struct.pack("<Q", 2**63) + b"x"], []), "promises"),
    "a text of 2**64 - 1 bytes": (header([key(b"a", 8, struct.pack("<Q", HUGE))], []), "promises"),
    "a list of 2**64 - 1 texts": (header([key(b"a", 9, struct.pack("<IQ", 8, HUGE))], []), "promises"),
    "a list of 2**62 numbers": (header([key(b"a", 9, struct.pack("<IQ", 10, 2**62))], []), "promises"),
    "a list of lists": (header([key(b"a", 9, struct.pack("<IQ", 9, 3))], []), "a list of an unknown type"),
    "an unknown type of value": (header([key(b"a", 77, b"")], []), "an unknown type"),
    "a key twice": (header([ARCH, ARCH], [entry()]), "twice"),
    "a key that is no text": (header([key(b"\xff\xfe", 4, b"\0" * 4)], []), "not UTF-8"),
    "an alignment of 0": (header([ARCH, key(b"general.alignment", 4, struct.pack("<I", 0))], [entry()]), "alignment"),
    "an alignment of 3": (header([ARCH, key(b"general.alignment", 4, struct.pack("<I", 3))], [entry()]), "alignment"),
    "an alignment that is a text": (header([ARCH, key(b"general.alignment", 8, text(b"32"))], []), "alignment"),
    "a tensor twice": (header([ARCH], [entry(), entry(offset=512)]), "twice"),
    "no name": (header([ARCH], [entry(b"")]), "is empty"),
    "a name of 300 bytes": (header([ARCH], [entry(b"n" * 300)]), "more than 256 bytes"),
    "a rank of 2**32 - 1": (header([ARCH], [text(b"t") + struct.pack("<I", 2**32 - 1)]), "dimensions"),
    "a shape that overflows": (header([ARCH], [entry(shape=(2**63, 2))]), "overflows"),
    "a shape that overflows to 0": (header([ARCH], [entry(shape=(2**32, 2**32))]), "overflows"),
    "a shape with 0": (header([ARCH], [entry(shape=(32, 0))]), "is empty"),
    "an unknown type": (header([ARCH], [entry(kind=4)]), "an unknown type"),
    "half a group": (header([ARCH], [entry(shape=(33, 4), kind=8)]), "not in groups of 32"),
    "an offset out of the file": (header([ARCH], [entry(offset=2**40)]), "and the file has"),
    "an offset of 2**64 - 32": (header([ARCH], [entry(offset=2**64 - 32)]), "and the file has"),
    "an offset within a word": (header([ARCH], [entry(offset=4)]), "no multiple"),
    "two in one place": (header([ARCH], [entry(), entry(b"u", offset=32)]), "overlaps"),
    "a tensor beyond the end": (header([ARCH], [entry(shape=(32, 5))]), "and the file has"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(tmp_path: Path, name: str) -> None:
    data, says = HOSTILE[name]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(tmp_path / "m.gguf"), None)
    (problem,) = caught.value.problems
    assert says in problem.message and problem.hint


def test_escapes_in_names_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = key(b"llama.block_count", 4, struct.pack("<I", 1))
    for number, data in enumerate(
        [
            header([ARCH, layers], [entry(b"\x1b]0;owned\x07\x1b[2J")]),
            header([key(b"general.architecture", 8, text(b"\x1b[2Jx"))], [entry()]),
            header([ARCH, key(b"\x1b[2J", 77, b"")], []),
        ]
    ):
        (tmp_path / f"{number}.gguf").write_bytes(data)
        assert execute(["inspect", str(tmp_path / f"{number}.gguf")]) == 4
        shown = capsys.readouterr()
        assert "\x1b" not in shown.out + shown.err and "\x07" not in shown.err
        assert "hint: " in shown.err


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("sound") / "m.gguf", kind="Q8_0", biases=True).read_bytes()


def refused_or_inside(path: Path, data: bytes) -> bool:
    """Whether the file is refused; where not, no tensor may reach out of it, and all can be read."""
    path.write_bytes(data)
    try:
        checkpoint = open_checkpoint(str(path), None)
    except InputError:
        return True
    for meta in checkpoint.tensors.values():
        assert 0 < meta.start <= meta.start + meta.nbytes <= len(data)
    with Reader(checkpoint.shards) as reader:
        for meta in checkpoint.tensors.values():
            assert len(reader.read(meta, max(0, meta.numel - 3), meta.numel)) == min(3, meta.numel)
    return False


def test_cut_anywhere(tmp_path: Path, sound: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(sound)
    first = min(e.start for e in read_gguf_header(tmp_path / "m.gguf", "m", SIZES).entries)
    assert first > HEADER
    for length in [*range(0, first, 7), *range(first, len(sound), len(sound) // 50), len(sound) - 33]:
        assert refused_or_inside(tmp_path / "m.gguf", sound[:length]), length


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations(tmp_path: Path, sound: bytes, data: st.DataObject) -> None:
    """Bytes of the header changed at random, alone or in words of four and eight that are taken to be counts."""
    made = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, HEADER))
        value = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=1),
                st.sampled_from([0, 1, 9, 2**31, 2**32 - 1]).map(lambda n: struct.pack("<I", n)),
                st.sampled_from([0, 1, 2**32, 2**62, 2**63, 2**64 - 1]).map(lambda n: struct.pack("<Q", n)),
            )
        )
        made[at : at + len(value)] = value
    refused_or_inside(tmp_path / "m.gguf", bytes(made))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400))
def test_any_bytes_behind_a_sound_start(tmp_path: Path, data: bytes) -> None:
    refused_or_inside(tmp_path / "m.gguf", b"GGUF" + struct.pack("<I", 3) + data)


@pytest.mark.parametrize("kind", ["F32", "Q4_K"])
def test_the_header_is_what_the_library_reads(tmp_path: Path, kind: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", kind=kind)
    ours = read_gguf_header(path, "m", SIZES)
    reader = gguf.GGUFReader(path)
    there = {t.name: (tuple(int(n) for n in t.shape[::-1]), int(t.tensor_type), t.data_offset) for t in reader.tensors}
    assert {e.name: (e.shape, e.kind, e.start) for e in ours.entries} == there
    assert there.keys() == shapes("llama").keys()
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields and fields["llama.vocab_size"] == VOCABULARY

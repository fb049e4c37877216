"""Hostile files, code and secrets, tried on mergekit. See peer.py."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peer_machine import ONE, Peer, Ran, Row, counted, digests
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[1] / "checkpoint"))
from raw_safetensors import entry, put

ESCAPE = "\x1b[31mcanary"
TOKEN = "hf_canaryCANARYcanaryCANARYcanary0"
INDEX = "model.safetensors.index.json"


class Canary:
    """Unpickled by an unwary reader, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.path), "w")


class Attacks:
    def __init__(self, peer: Peer):
        self.peer = peer
        with peer.place() as place:
            peer.run(peer.recipe(place), place / "out", *ONE)
            self.whole = digests(place / "out")
            self.names = sorted(load_file(place / "out" / "model.safetensors"))

    def rows(self) -> Iterator[Row]:
        yield from self.headers()
        yield from self.indexes()
        for row in (self.config, self.tokenizer, self.escapes, self.pickles, self.good_pickles, self.auto_map,
                    self.auto_map_trusted, self.yaml_tags, self.environment, self.token,
                    self.token_written):  # fmt: skip
            yield row()

    def ended(self, ran: Ran, place: Path) -> str:
        if ran.code == 0 and digests(place / "out") == self.whole:
            return "exit 0, the bytes that the untouched input gives"
        left = self.peer.left(place / "out", self.whole)
        return f"{ran.told}; left: {left}"

    def headers(self) -> Iterator[Row]:
        def raw(header: object, data: bytes = b"") -> Callable[[Path], Any]:
            return lambda file: put(file, header, data)

        def cut(keep: int) -> Callable[[Path], Any]:
            return lambda file: os.truncate(file, keep)

        def twice(file: Path) -> None:
            blob = file.read_bytes()
            length = int.from_bytes(blob[:8], "little")
            header = blob[8 : 8 + length].rstrip()
            norm = json.dumps(json.loads(header)["model.norm.weight"])
            put(file, header[:-1] + f',"model.norm.weight":{norm}}}'.encode(), blob[8 + length :])

        def claims(length: int) -> Callable[[Path], Any]:
            return lambda file: file.write_bytes(length.to_bytes(8, "little") + b"{}")

        tried: dict[str, dict[str, Callable[[Path], Any]]] = {
            "truncated safetensors": {"in the header": cut(100), "in the data": cut(10**6), "to nothing": cut(0)},
            "offsets of tensors": {
                "overlap": raw({"w": entry(), "x": entry(offsets=(0, 4))}, bytes(8)),
                "leave a hole": raw({"w": entry(), "x": entry(offsets=(8, 12))}, bytes(12)),
                "end behind the file": raw({"w": entry(shape=(256,), offsets=(0, 1024))}, bytes(8)),
            },
            "a header that claims more than the file": {"99,999,999 bytes": claims(10**8 - 1), "2^63": claims(2**63)},
            "a header": {
                "nested 100,000 deep": raw('{"x":' * 100_000 + "1" + "}" * 100_000),
                "a tensor twice": twice,
                "a size of NaN": raw('{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
                "sizes whose product overflows": raw({"w": entry(shape=(2**33, 2**33))}, bytes(4)),
            },
        }
        for name, tricks in tried.items():
            seen = []
            for label, trick in tricks.items():
                with self.peer.place("a") as place:
                    trick(place / "a" / "model.safetensors")
                    seen.append(f"{label}: {self.ended(self.peer.merge(place), place)}")
            yield name, len(tricks), "<br>".join(seen)

    def indexes(self) -> Iterator[Row]:
        """`a` has an index, its weights stand elsewhere."""
        for name, where in {
            "an index that names `../outside/model.safetensors`": "../outside/model.safetensors",
            "an index that names an absolute path": "/",
            "weights that are a link out of the folder (such as the hub's cache has)": "link",
        }.items():
            with self.peer.place("a") as place:
                (place / "outside").mkdir()
                target = (place / "a" / "model.safetensors").rename(place / "outside" / "model.safetensors")
                if where == "link":
                    (place / "a" / "model.safetensors").symlink_to(target)
                else:
                    self.index(place, str(target) if where == "/" else where)
                found = self.ended(self.peer.merge(place), place)
                read = "the outside file was read: " if found.startswith("exit 0") else ""
                yield name, 1, read + found
        with self.peer.place("a") as place:
            (place / "a" / "model.safetensors").unlink()
            (place / "a" / "x.safetensors").symlink_to("x.safetensors")
            self.index(place, "x.safetensors")
            yield "an index whose file is a link to itself", 1, self.ended(self.peer.merge(place), place)
        with self.peer.place("a") as place:
            (place / "a" / INDEX).write_text("[" * 100_000 + "]" * 100_000)
            yield "an index nested 100,000 deep", 1, self.ended(self.peer.merge(place), place)

    def index(self, place: Path, file: str, name: str = INDEX) -> None:
        (place / "a" / name).write_text(json.dumps({"weight_map": dict.fromkeys(self.names, file)}))

    def config(self) -> Row:
        with self.peer.place("a") as place:
            file = place / "a" / "config.json"
            file.write_text(file.read_text()[:-1] + ',"x":' + '{"x":' * 100_000 + "1" + "}" * 100_001)
            return "config.json nested 100,000 deep", 1, self.ended(self.peer.merge(place), place)

    def tokenizer(self) -> Row:
        with self.peer.place("a") as place:
            (place / "a" / "tokenizer_config.json").write_text("{}")
            (place / "a" / "tokenizer.json").write_text("[" * 100_000 + "]" * 100_000)
            recipe = self.peer.recipe(place, models=(place / "a",), weights=(1,))
            ran = self.peer.run(recipe, place / "out", "--quiet")
            kept = (place / "out" / "tokenizer.json").exists()
            copied = "tokenizer.json was copied" if kept else "tokenizer.json was not copied"
            return "tokenizer.json nested 100,000 deep", 1, f"{ran.told}; {copied}"

    def escapes(self) -> Row:
        def tensor(folder: Path) -> None:
            weights = load_file(folder / "model.safetensors") | {ESCAPE: torch.ones(1)}
            save_file(weights, folder / "model.safetensors")

        def architecture(folder: Path) -> None:
            file = folder / "config.json"
            config = json.loads(file.read_text()) | {"architectures": [f"{ESCAPE}ForCausalLM"]}
            file.write_text(json.dumps(config))

        def shard(folder: Path) -> None:
            self.index(folder.parent, f"{ESCAPE}.safetensors")

        def both(folder: Path) -> None:
            architecture(folder)
            tensor(folder)

        seen = []
        for trick in (tensor, both, architecture, shard):
            with self.peer.place("a") as place:
                trick(place / "a")
                ran = self.peer.merge(place, "--no-copy-tokenizer", "-vv")
                text = ran.out + ran.err
                raw = "written raw" if ESCAPE in text else "escaped" if "canary" in text else "not written"
                seen.append(f"in {trick.__name__}: {raw} ({ran.told})".replace("in both", "in tensor and architecture"))
        return "terminal escapes in names of a tensor, an architecture, a shard (`-vv`)", len(seen), "<br>".join(seen)

    def pickles(self) -> Row:
        seen = []
        for form in ("zip", "plain pickle"):
            for index in (False, True):
                for flags in ((), ("--lazy-unpickle",)):
                    with self.peer.place("a") as place:
                        (place / "a" / "model.safetensors").unlink()
                        file = place / "a" / ("x.bin" if index else "pytorch_model.bin")
                        torch.save({self.names[0]: Canary(place / "canary")}, file,
                                   _use_new_zipfile_serialization=form == "zip")  # fmt: skip
                        if index:
                            self.index(place, "x.bin", "pytorch_model.bin.index.json")
                        found = self.ended(self.peer.merge(place, *ONE, *flags), place)
                        ran = "EXECUTED" if (place / "canary").exists() else "not executed"
                        seen.append(f"{ran}, {found}")
        name = "a `.bin` whose pickle makes a file (zip, plain; alone, with index; default, `--lazy-unpickle`)"
        return name, len(seen), counted(seen)

    def good_pickles(self) -> Row:
        seen = []
        for flags in ((), ("--lazy-unpickle",)):
            with self.peer.place("a") as place:
                weights = load_file(place / "a" / "model.safetensors")
                (place / "a" / "model.safetensors").unlink()
                torch.save(weights, place / "a" / "pytorch_model.bin")
                found = self.ended(self.peer.merge(place, *ONE, *flags), place)
                seen.append(f"{flags[0] if flags else 'default'}: {found}")
        return "the same with honest weights", len(seen), "<br>".join(seen)

    def coded(self, place: Path, model_type: str, *flags: str) -> str:
        """`a` with code beside it that its config.json and tokenizer_config.json name."""
        folder = place / "a"
        file = folder / "config.json"
        named = {"auto_map": {"AutoConfig": "code.CodeConfig"}}
        file.write_text(json.dumps(json.loads(file.read_text()) | named | {"model_type": model_type}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.X", None]}}))
        (folder / "tokenizer.json").write_text("{}")
        (folder / "code.py").write_text(
            f"open({str(place / 'canary')!r}, 'w').close()\nfrom transformers import LlamaConfig\n"
            f"class CodeConfig(LlamaConfig):\n    model_type = {model_type!r}\n"
        )
        out = place / "out"
        ran = self.peer.run(self.peer.recipe(place, models=(folder,), weights=(1,)), out, "--quiet", *flags)
        told = [f"{model_type}: {ran.told}", "EXECUTED" if (place / "canary").exists() else "not executed"]
        if ran.code == 0:
            for name in ("config.json", "tokenizer_config.json"):
                kept = (out / name).exists() and "auto_map" in (out / name).read_text()
                told.append(f"auto_map {'kept in' if kept else 'not in'} the output's {name}")
            told.append("code.py copied" if (out / "code.py").exists() else "code.py not copied")
        return ", ".join(told)

    def auto_map(self) -> Row:
        seen = []
        for kind in ("llama", "unheard"):
            with self.peer.place("a") as place:
                seen.append(self.coded(place, kind))
        return "`auto_map` and a .py beside, by default; model_type llama and one unheard of", 2, "<br>".join(seen)

    def auto_map_trusted(self) -> Row:
        seen = []
        for kind in ("llama", "unheard"):
            with self.peer.place("a") as place:
                seen.append(self.coded(place, kind, "--trust-remote-code"))
        return "the same with `--trust-remote-code`", 2, "<br>".join(seen)

    def yaml_tags(self) -> Row:
        tags = ('!!python/object/apply:os.system ["touch CANARY"]', "!!python/name:os.system", "!!python/object:x.Y {}")
        seen = []
        for tag in tags:
            with self.peer.place() as place:
                recipe = self.peer.recipe(place)
                recipe.write_text(f"{recipe.read_text()}x: {tag.replace('CANARY', str(place / 'canary'))}\n")
                ran = self.peer.run(recipe, place / "out", *ONE)
                made = "EXECUTED" if (place / "canary").exists() else "not executed"
                seen.append(f"{made}, {ran.told}; left: {self.peer.left(place / 'out', self.whole)}")
        return "`!!python/…` tags in the recipe", len(tags), counted(seen)

    def environment(self) -> Row:
        with self.peer.place() as place:
            recipe = self.peer.recipe(place, models=("${HF_TOKEN}/a", self.peer.models / "b"))
            ran = self.peer.run(recipe, place / "out", *ONE, HF_TOKEN=TOKEN)
            return "`${HF_TOKEN}` as a model", 1, f"{'EXPANDED' if TOKEN in ran.err else 'not expanded'}, {ran.told}"

    def token(self) -> Row:
        seen = []
        for name, more in {
            "cut weights": {},
            "a model id, no hub there": {"HF_ENDPOINT": "http://127.0.0.1:9"},
        }.items():
            with self.peer.place("a") as place:
                os.truncate(place / "a" / "model.safetensors", 10**6)
                recipe = self.peer.recipe(place, models=("no/such" if more else place / "a", self.peer.models / "b"))
                variables = more | {"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0" if more else "1"}
                ran = self.peer.run(recipe, place / "out", "-vv", "--no-copy-tokenizer", whole=True, **variables)
                shown = "PRINTED" if TOKEN in ran.out + ran.err else "not printed"
                seen.append(f"{name}: {shown} ({ran.told})")
        return "a token in HF_TOKEN, runs that fail (`-vv`)", len(seen), "<br>".join(seen)

    def token_written(self) -> Row:
        with self.peer.place() as place:
            recipe = self.peer.recipe(place)
            recipe.write_text(f"# from https://user:{TOKEN}@huggingface.co/x/y\n{recipe.read_text()}")
            ran = self.peer.run(recipe, place / "out", *ONE, HF_TOKEN=TOKEN)
            held = [file.name for file in sorted((place / "out").iterdir()) if TOKEN.encode() in file.read_bytes()]
            text = f"{ran.told}; the recipe's text, with the token, is in {' and '.join(held)}" if held else ran.told
            return "a token in a URL in a comment of the recipe", 1, text

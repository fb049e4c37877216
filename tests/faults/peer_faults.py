"""Faults of the machine, provoked on mergekit. See peer.py.

Each function is a row or more: name, times tried, what happened.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peer_machine import SHARDS, Peer, Process, Row, code, counted, covered, digests

KILLS = 20


class Faults:
    def __init__(self, peer: Peer):
        self.peer = peer
        with peer.place() as place:
            began = time.monotonic()
            ran = peer.run(peer.recipe(place), place / "out", "--quiet", *SHARDS, rules=f"path={place}/out delay=0")
            if ran.code:
                raise RuntimeError(ran.err)
            self.seconds = time.monotonic() - began
            self.calls = ran.calls
            self.whole = digests(place / "out")

    def rows(self) -> Iterator[Row]:
        for row in (self.kills, self.kills_over, self.two_at_once, self.disk_full, self.size_limit, self.write_calls,
                    self.unflushed, self.read_errors, self.short_reads, self.short_writes, self.changed, self.signals,
                    self.address_space, self.descriptors, self.tmpdir, self.clock, self.ranks,
                    self.memory):  # fmt: skip
            yield row()

    def each(self, runs: dict[str, dict[str, Any]]) -> str:
        """What becomes of a merge under each of these rules or limits, by name, and of the same command without
        them."""
        seen = []
        for run in runs.values():
            with self.peer.place() as place:
                out = place / "out"
                given = run | ({"rules": run["rules"].replace("OUT", str(out))} if "rules" in run else {})
                recipe = self.peer.recipe(place)
                ran = self.peer.run(recipe, out, "--quiet", *SHARDS, **given)
                if ran.code == 0 and digests(out) == self.whole:
                    seen.append("exit 0, same bytes as undisturbed")
                    continue
                left = self.peer.left(out, self.whole)
                seen.append(f"{ran.told}; left: {left}; again: {self.peer.again(recipe, out, self.whole)}")
        if len({*seen}) == 1:
            return seen[0]
        names = {text: [name for name, found in zip(runs, seen, strict=True) if found == text] for text in seen}
        return "<br>".join(f"{', '.join(those)}: {text}" for text, those in names.items())

    def kills(self) -> Row:
        draw, seen, last = random.Random(0), [], []
        spans = [self.seconds, self.seconds / 2]  # from the start, from the folder's making
        while len(seen) < KILLS:
            with self.peer.place() as place:
                recipe, out = self.peer.recipe(place), place / "out"
                process = self.peer.start(recipe, out, "--quiet", *SHARDS)
                kind = len(seen) % 2
                while kind and not out.exists() and process.poll() is None:
                    time.sleep(0.001)
                time.sleep(draw.uniform(0, spans[kind]))
                process.send(signal.SIGKILL)
                if process.finish().code == 0:
                    spans[kind] *= 0.8
                    continue
                seen.append(f"left: {self.peer.left(out, self.whole)}")
                ran = self.peer.run(recipe, out, *SHARDS)
                done = re.findall(r"(\d+)/(\d+) \[", ran.err)
                all_of = f", {done[-1][0]} of {done[-1][1]} tasks executed" if done else ""
                rest = ", a `.tmp…` stays" if [*out.glob(".tmp*")] else ""
                same = "same bytes as undisturbed" if covered(out, self.whole) else "OTHER bytes"
                last.append(f"{ran.told}, {same}{all_of}{rest}")
        return (
            "`kill -9` at random moments, every other after the output's folder was made; then the same command",
            KILLS,
            f"{counted(seen)}<br>Then the same command (it has no option to resume):<br>{counted(last)}",
        )

    def kills_over(self) -> Row:
        """The folder holds another merge of the same shape already."""
        spots = ["calls=write path=OUT at=3", *(f"calls=rename path=OUT at={n}" for n in (2, 3)),
                 "calls=open path=OUT/config.json at=1"]  # fmt: skip
        seen = []
        for spot in spots:
            with self.peer.place() as place:
                out = place / "out"
                self.peer.run(self.peer.recipe(place, weights=(0.9, 0.1)), out, "--quiet", *SHARDS)
                older = digests(out)
                rules = spot.replace("OUT", str(out)) + " signal=9"
                ran = self.peer.run(self.peer.recipe(place), out, "--quiet", *SHARDS, rules=rules)
                now = {name: found for name, found in digests(out).items() if name in self.whole}
                new = sum(now[name] == self.whole[name] for name in now)
                old = sum(now[name] == older[name] for name in now)
                told = "older" if "0.9" in (out / "mergekit_config.yml").read_text() else "new"
                seen.append(
                    f"{ran.told}; left: {old} shards of the older merge and {new} of the new one under the names of "
                    f"the index, the recipe of the {told} one, {self.peer.loads(out)}"
                )
        return "`kill -9` of a merge into the folder of an older one", len(spots), counted(seen)

    def two_at_once(self) -> Row:
        draw, seen = random.Random(1), []
        for number in range(10):
            with self.peer.place() as place:
                out = place / "out"
                recipes = self.peer.recipe(place), self.peer.recipe(place, weights=(0.9, 0.1))
                self.peer.run(recipes[1], place / "other", "--quiet", *SHARDS)
                both = [self.peer.start(recipes[0], out, "--quiet", *SHARDS)]
                time.sleep(draw.uniform(0, self.seconds) if number % 2 else 0)
                both.append(self.peer.start(recipes[1], out, "--quiet", *SHARDS))
                ends = sorted(process.finish().told for process in both)
                one, two = self.whole, digests(place / "other")
                now = digests(out)
                mixed = {("first" if now.get(n) == one[n] else "second" if now.get(n) == two[n] else "?") for n in one}
                of = f"shards of the {' and the '.join(sorted(mixed))} run" if "?" not in mixed else "shards of no run"
                seen.append(f"{'; '.join(ends)}; left: {of}, {self.peer.loads(out)}")
        return "two different merges into one output at once", len(seen), counted(seen)

    def disk_full(self) -> Row:
        many = sum(call.startswith("write ") for call in self.calls)
        points = sorted({1 + round(i * (many - 1) / 6) for i in range(7)})
        text = self.each({str(n): {"rules": f"calls=write path=OUT from={n} errno=28"} for n in points})
        return f"disk full (ENOSPC) from one of {many} writes on, whose number is given", len(points), text

    def size_limit(self) -> Row:
        sizes = (100_000, 1_900_000)
        text = self.each({f"{size:,} bytes": {"limits": {"RLIMIT_FSIZE": size}} for size in sizes})
        return "files limited in size (RLIMIT_FSIZE)", len(sizes), text

    def write_calls(self) -> Row:
        faults = {"mkdir": "calls=mkdir path=OUT errno=13", "second ftruncate": "calls=ftruncate path=OUT at=2 errno=5",
                  "first rename": "calls=rename path=OUT at=1 errno=5", "close": "calls=close path=OUT errno=5",
                  "third rename": "calls=rename path=OUT at=3 errno=5",
                  "open of config.json": "calls=open path=OUT/config.json errno=5"}  # fmt: skip
        text = self.each({name: {"rules": rule} for name, rule in faults.items()})
        return "a call on the output fails", len(faults), text

    def unflushed(self) -> Row:
        flushes = sum(call.split()[0] in ("fsync", "fdatasync") for call in self.calls)
        text = self.each({"": {"rules": "calls=fsync,fdatasync errno=5"}})
        return "fsync fails", 1, f"fsync and fdatasync were called {flushes} times on files of the output; {text}"

    def read_errors(self) -> Row:
        models = self.peer.models
        faults = {
            f"{what} of {name}'s {file}": f"calls={call} path={models}/{name}/{file} at={at} errno={number}"
            for name in "ab"
            for what, call, file, at, number in (
                ("EIO in read 1", "read", "config.json", 1, 5),
                ("EIO in read 3", "read", "config.json", 3, 5),
                ("EIO in mmap", "mmap", "model.safetensors", 1, 5),
                ("ENODEV (no mmap there) in mmap", "mmap", "model.safetensors", 2, 19),
            )
        }
        text = self.each({name: {"rules": rule} for name, rule in faults.items()})
        note = "weights are mapped, not read, so that EIO of a page would be SIGBUS: see the truncated input below"
        return "read errors", len(faults), f"{text}<br>Not tried: {note}"

    def short_reads(self) -> Row:
        rules = {f"{n}": {"rules": f"calls=read,pread path={self.peer.models} short={n}"} for n in (1, 7)}
        return "reads that give 1 or 7 bytes", len(rules), self.each(rules)

    def short_writes(self) -> Row:
        return "writes that take 1000 bytes", 1, self.each({"": {"rules": "calls=write path=OUT short=1000"}})

    def changed(self) -> Row:
        def rewritten(file: Path, other: Path) -> None:
            with open(file, "r+b") as f:
                f.write(other.read_bytes())

        def replaced(file: Path, other: Path) -> None:
            shutil.copy(other, file.with_name("new"))
            file.with_name("new").rename(file)

        def truncated(file: Path, other: Path) -> None:
            with open(file, "r+b") as f:
                f.truncate(100_000)

        seen = []
        for change in (rewritten, replaced, truncated):
            with self.peer.place("a", "c") as place:
                recipe, out = self.peer.recipe(place, models=(place / "a", self.peer.models / "b")), place / "out"
                self.paused(self.peer.start(recipe, out, "--quiet", *SHARDS), out)
                process = self.process
                change(place / "a" / "model.safetensors", place / "c" / "model.safetensors")
                process.send(signal.SIGCONT)
                ran = process.finish()
                what = f"{ran.told}; left: {self.peer.left(out, self.whole)}"
                if ran.code == 0 and change is not truncated:
                    self.peer.run(recipe, place / "new", "--quiet", *SHARDS)
                    now, new = digests(out), digests(place / "new")
                    old = sum(now[name] == self.whole[name] for name in now)
                    fresh = sum(now[name] == new[name] for name in now)
                    what += (f" ({old} of {len(now)} as of the old bytes, {fresh} as of the new, "
                             f"{len(now) - old - fresh} as of neither)")  # fmt: skip
                seen.append(f"{change.__name__}: {what}")
        return "an input is changed once the first shard is written (process stopped meanwhile)", 3, "<br>".join(seen)

    def paused(self, process: Process, out: Path) -> None:
        """Stop the process as soon as a shard stands in its output."""
        self.process = process
        while not [*out.glob("*.safetensors")] and process.poll() is None:
            time.sleep(0.001)
        process.send(signal.SIGSTOP)

    def signals(self) -> Row:
        seen = []
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            with self.peer.place() as place:
                recipe, out = self.peer.recipe(place), place / "out"
                self.paused(self.peer.start(recipe, out, "--quiet", *SHARDS), out)
                self.process.send(number)
                self.process.send(signal.SIGCONT)
                ran = self.process.finish()
                left = f"left: {self.peer.left(out, self.whole)}"
                again = self.peer.again(recipe, out, self.whole)
                seen.append(f"{signal.Signals(number).name}: {ran.told}; {left}; again: {again}")
        return "SIGTERM, SIGINT once the first shard is written", 3, counted(seen)

    def address_space(self) -> Row:
        sizes = (1, 4, 8, 16, 64)
        text = self.each({f"{size} MB": {"limits": {"RLIMIT_AS": size * 10**6}} for size in sizes})
        return "`ulimit -v`: so much more than after the imports", len(sizes), text

    def descriptors(self) -> Row:
        counts = (4, 8, 12, 24)
        return "`ulimit -n`", len(counts), self.each({f"{n}": {"limits": {"RLIMIT_NOFILE": n}} for n in counts})

    def tmpdir(self) -> Row:
        with self.peer.place() as place:
            (place / "full").mkdir()
            rules = f"calls=write,mkdir,ftruncate path={place}/full errno=28"
            ran = self.peer.run(self.peer.recipe(place), place / "out", "--quiet", *SHARDS, rules=rules, whole=True,
                                TMPDIR=str(place / "full"))  # fmt: skip
            same = "same bytes as undisturbed" if digests(place / "out") == self.whole else "OTHER bytes"
            return "a full TMPDIR", 1, f"{ran.told}, {same}; {len(ran.calls)} calls met the full folder"

    def clock(self) -> Row:
        jumps = {"back": -86400, "forward": 86400}
        rules = {name: {"rules": f"calls=clock jump={seconds} from=2"} for name, seconds in jumps.items()}
        return "the clock jumps a day after it was read once", len(rules), self.each(rules)

    def ranks(self) -> Row:
        text = "not tried: it has no run of several processes; `--multi-gpu` uses threads of one process and needs GPUs"
        return "a rank that dies", 0, text

    def memory(self) -> Row:
        ran = self.peer.run("--help")
        options = sorted({word for word in re.findall(r"--[\w-]+", ran.out) if re.search("memory|ram|budget", word)})
        text = f"there is no option for a budget: of its options {' and '.join(map(code, options))} name memory"
        return "a memory budget", 0, f"{text}, and mean the accelerator's"

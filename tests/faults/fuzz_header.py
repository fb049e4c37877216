"""Fuzz the reader of safetensors headers; the safetensors library is the judge of every file.

    python tests/faults/fuzz_header.py --times 1000000 [--corpus DIR] [--seed N]
    python tests/faults/fuzz_header.py --atheris [--corpus DIR] [libFuzzer's options, such as -runs=1000000]

Without `--atheris` files are drawn from those of the corpus and the seeds, without a look at what they reach. With it,
atheris (`pip install atheris`, Python 3.11 to 3.13) guides the fuzzer by coverage and adds to the corpus what reaches
new code. Both make and judge their files by header_mutations.py and header_oracle.py of tests/checkpoint: the same
verdict, names, dtypes, shapes, bytes and metadata, no error but InputError, and no message that could drive a
terminal. Each file goes through memory, in /dev/shm, so that what is tried is `read_header` as the program calls it.

Ends with 1 at the first disagreement and leaves the file as `disagreement-SHA256` (atheris: `crash-SHA1`) in the
current folder.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "checkpoint")]
SLOW = 5.0  # seconds for a file of a few kilobytes; any more is a way to make the reader hang
MEMORY = 2 * 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, default=Path(__file__).parent / "corpus")
    parser.add_argument("--atheris", action="store_true")
    args, rest = parser.parse_known_args()
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as folder:
        target = Path(folder) / "x.safetensors"
        return guided(args, rest, target) if args.atheris else drawn(args, target)


def drawn(args: argparse.Namespace, target: Path) -> int:
    from header_mutations import mutate, seeds
    from header_oracle import compare

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    r = random.Random(args.seed)
    files = [path.read_bytes() for path in sorted(args.corpus.iterdir())] if args.corpus.is_dir() else []
    files += seeds()
    began, accepted, slowest = time.perf_counter(), 0, 0.0
    for number in range(args.times):
        blob = r.choice(files)
        for _ in range(r.choice([1, 1, 1, 2, 4])):
            blob = mutate(blob, r)
        at = time.perf_counter()
        try:
            accepted += compare(blob, target, metadata=number % 16 == 0)
        except Exception:
            kept = Path(f"disagreement-{hashlib.sha256(blob).hexdigest()}")
            kept.write_bytes(blob)
            print(f"after {number:,} files: see {kept}", file=sys.stderr)
            raise
        slowest = max(slowest, time.perf_counter() - at)
        if slowest > SLOW:
            Path(f"disagreement-{hashlib.sha256(blob).hexdigest()}").write_bytes(blob)
            raise TimeoutError(f"{slowest:.1f} s for a file of {len(blob)} bytes")
    took = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{args.times:,} files in {took:.0f} s, {accepted:,} accepted, slowest {slowest:.3f} s, peak {peak} MB")
    return 0


def guided(args: argparse.Namespace, rest: list[str], target: Path) -> int:
    import atheris
    from header_mutations import mutate, seeds

    with atheris.instrument_imports(
        include=["mergekit_lite.checkpoint.header", "mergekit_lite.errors", "json.decoder"]
    ):
        from header_oracle import compare
    count = 0

    def try_one(blob: bytes) -> None:
        nonlocal count
        count += 1
        compare(blob, target, metadata=count % 16 == 0)

    def make(blob: bytes, limit: int, seed: int) -> bytes:
        r = random.Random(seed)
        # A sixth is left to libFuzzer, which puts in the constants that the reader compares with.
        made = atheris.Mutate(blob, limit) if r.random() < 0.17 else mutate(blob, r)
        if r.random() < 0.1:
            made = mutate(made, r)
        return bytes(made[:limit])

    args.corpus.mkdir(parents=True, exist_ok=True)
    if not any(args.corpus.iterdir()):
        for number, blob in enumerate(seeds()):
            (args.corpus / f"seed-{number:02d}").write_bytes(blob)
    options = [f"-rss_limit_mb={MEMORY >> 20}", f"-timeout={SLOW:.0f}", "-max_len=8192", f"-seed={args.seed}", *rest]
    atheris.Setup([sys.argv[0], *options, str(args.corpus)], try_one, custom_mutator=make)
    atheris.Fuzz()  # leaves the process
    return 0


if __name__ == "__main__":
    sys.exit(main())

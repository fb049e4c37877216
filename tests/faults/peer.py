"""The faults and attacks that this program is tested with, tried on mergekit: a table of what it does.

    python tests/faults/peer.py --mergekit PATH/mergekit-yaml --models DIR [--write docs/reliability_mergekit.md]

mergekit is not a dependency: install it in an environment of its own and name its executable. DIR is made and filled
with four tiny models (those of kill.py) where it does not exist. Needs a C compiler for the layer of faults. Most runs
are forks of one process that has made mergekit's imports and then does what `mergekit-yaml` does; where an import may
matter (variables of the environment, TMPDIR, what reaches the terminal) it is the executable itself.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
from kill import write_models
from peer_attacks import Attacks
from peer_faults import Faults
from peer_machine import Peer
from peer_numbers import Numbers

PACKAGES = ("mergekit", "torch", "transformers", "safetensors")
INTRODUCTION = """# mergekit under the same faults

What [mergekit](https://github.com/arcee-ai/mergekit) does under the faults and attacks that this program is tested
with, as measured on {date} with {versions}, Python {python}, {system}. The table is what this command prints:

```sh
python tests/faults/peer.py --mergekit PATH/mergekit-yaml --models DIR --write docs/reliability_mergekit.md
```

The models are Llamas of two layers in bfloat16 (4.2 MB each); where nothing else is said the merge is `linear` of two
of them, and under faults of the machine `--out-shard-size 2M` makes three shards of it. "As undisturbed" and "same
bytes" compare SHA-256 of the shards with those of a run without a fault; "again" is the same command into the same
folder without the fault; `from_pretrained` is that of transformers. `N×` says how many of the tries ended so. Runs have
OMP_NUM_THREADS=1 where nothing else is said. Most are forks of one process that has made mergekit's imports and then
does what `mergekit-yaml` does; where variables of the environment, TMPDIR or random numbers matter it is the executable
itself.

"""


def versions(executable: Path) -> dict[str, str]:
    """Of mergekit and what it stands on, and of its Python."""
    names = ", ".join(f"m.version({name!r})" for name in PACKAGES)
    program = f"import importlib.metadata as m, platform; print({names}, platform.python_version())"
    python = executable.absolute().parent / "python"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True, env={})
    return dict(zip((*PACKAGES, "Python"), done.stdout.split(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True, help="mergekit-yaml of an environment that has it")
    parser.add_argument("--models", type=Path, required=True, help="folder of the models; made where there is none")
    parser.add_argument("--write", type=Path, help="a Markdown file that is written: the table and how it was made")
    given = parser.parse_args()
    if not given.models.exists():
        write_models(given.models, layers=2)
    found = versions(given.mergekit)
    python = found.pop("Python")
    began = time.monotonic()
    lines = ["| fault or attack | times tried | what mergekit did |", "|---|---|---|"]
    print(*lines, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(given.mergekit, given.models, Path(folder))
        try:
            for group in (Faults(peer), Attacks(peer), Numbers(peer)):
                for name, times, text in group.rows():
                    lines.append(f"| {name} | {times or '–'} | {text} |")
                    print(lines[-1], flush=True)
        finally:
            peer.close()
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    if given.write:
        head = INTRODUCTION.format(
            date=datetime.date.today().isoformat(),
            versions=", ".join(f"{name} {version}" for name, version in found.items()),
            python=python,
            system=platform.system(),
        )
        given.write.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

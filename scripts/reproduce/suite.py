"""Running tests of this project for what they measure."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from measured import ROOT


def environment() -> dict[str, str]:
    """That of a test run that finds this project and the plugins beside this file, and uses one thread."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def pytest_failed(done: subprocess.CompletedProcess[str]) -> RuntimeError:
    """What says why pytest itself did not get to its end."""
    return RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

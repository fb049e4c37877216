"""Which sorts NumPy is told to use, by the processor and before it is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mergekit_lite.cli.processor import avoid_avx512

ZEN4 = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx avx2 avx512f avx512bw\nbugs\t: none\n"


def test_only_where_it_is_slower() -> None:
    assert avoid_avx512(ZEN4)
    assert not avoid_avx512(ZEN4.replace("AuthenticAMD", "GenuineIntel"))
    assert not avoid_avx512(ZEN4.replace(" avx512f", ""))
    assert avoid_avx512(ZEN4.replace(" avx512bw", ""))
    assert not avoid_avx512("")


@pytest.mark.parametrize("own", [None, ""])
def test_numpy_sorts_the_same_and_a_setting_of_the_users_stays(own: str | None) -> None:
    program = (
        "import os, sys\n"
        "from mergekit_lite.cli import processor\n"
        "assert 'numpy' not in sys.modules\n"
        "processor.avoid_avx512 = lambda text: True\n"
        "processor.choose_sorts()\n"
        "import numpy as np\n"
        "numbers = np.random.default_rng(0).integers(-2**62, 2**62, 5000)\n"
        "assert np.sort(numbers).tolist() == sorted(numbers.tolist())\n"
        "print(os.environ['NPY_DISABLE_CPU_FEATURES'])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "NPY_DISABLE_CPU_FEATURES"}
    if own is not None:
        environment["NPY_DISABLE_CPU_FEATURES"] = own
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert (ran.stdout.strip() == "") == (own is not None)

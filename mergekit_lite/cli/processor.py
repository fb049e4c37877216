"""Settings of NumPy that depend on the processor, made before NumPy is imported."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

_SETTING = "NPY_DISABLE_CPU_FEATURES"
# The names of AVX-512 in NumPy since 2.4, and before; others than its own it passes over.
_AVX512 = "X86_V4 AVX512_ICL AVX512_SPR AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL"


def choose_sorts() -> None:
    """Leave NumPy's sorts for AVX-512 unused where those for AVX2 are faster. Does nothing where NumPy is imported
    already or the user has a setting of his own."""
    if "numpy" in sys.modules or _SETTING in os.environ:
        return
    with suppress(OSError), open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        if avoid_avx512(file.read(1 << 14)):
            os.environ[_SETTING] = _AVX512


def avoid_avx512(cpuinfo: str) -> bool:
    """Whether this is a processor of AMD's with AVX-512: there the instruction that NumPy's sorts are built on,
    compressed stores to memory, runs in microcode. Measured on a Zen 4: 23 ns an element in rows of 2048 64-bit numbers
    with AVX-512, 6 ns with AVX2."""
    return "AuthenticAMD" in cpuinfo and " avx512f " in cpuinfo.replace("\n", " ")


def spare_threads() -> None:
    """Where this process's address space is limited, have NumPy's OpenBLAS start no threads, each of which takes some
    of it. One that it cannot start it reports by a SIGINT, as if somebody had pressed Ctrl-C."""
    try:
        import resource
    except ImportError:  # Windows
        return
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

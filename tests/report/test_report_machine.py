"""What `merge doctor` says of a machine: limits of containers, the disk, open files, versions."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest

from mergekit_lite.report import disk, environment, machine
from mergekit_lite.report.machine import Limits, cgroup_limits
from mergekit_lite.run import device

GB = 10**9


def tree(root: Path, own: str, files: Mapping[str, str]) -> tuple[Path, Path]:
    """A /proc whose own process is in the groups `own`, and a /sys/fs/cgroup with these files."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(own)
    for name, text in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "proc", root / "cgroup"


def test_limits_of_version_2_count_from_all_groups_above(tmp_path: Path) -> None:
    proc, groups = tree(
        tmp_path, "0::/pod/app\n",
        {
            "pod/app/memory.max": "max\n", "pod/app/memory.current": "5\n", "pod/app/cpu.max": "350000 100000\n",
            "pod/memory.max": f"{8 * GB}\n", "pod/memory.current": f"{7 * GB}\n",
            "pod/memory.stat": f"anon 1\ninactive_file {2 * GB}\n", "pod/cpu.max": "max 100000\n",
        },
    )  # fmt: skip
    # 7 GB are in use, 2 of which are pages of files.
    assert cgroup_limits(proc, groups) == Limits(8 * GB, 3 * GB, 3.5)


def test_limits_of_version_1_in_a_container_that_sees_its_root_alone(tmp_path: Path) -> None:
    proc, groups = tree(
        tmp_path, "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n",
        {
            "memory/memory.limit_in_bytes": f"{4 * GB}\n", "memory/memory.usage_in_bytes": f"{GB}\n",
            "cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n",
        },
    )  # fmt: skip
    assert cgroup_limits(proc, groups) == Limits(4 * GB, 3 * GB, 2.0)


def test_no_limits(tmp_path: Path) -> None:
    files = {"memory/memory.limit_in_bytes": "9223372036854771712\n", "cpu/cpu.cfs_quota_us": "-1\n"}
    assert cgroup_limits(*tree(tmp_path, "5:memory:/\n4:cpu:/\nnonsense\n0::/none\n", files)) == Limits()
    assert cgroup_limits(tmp_path / "nowhere", tmp_path) == Limits()


def test_a_limit_of_the_container_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: (64 * GB, 60 * GB))
    assert machine.memory(Limits()).detail == "60.0 GB free of 64.0 GB"
    tight = machine.memory(Limits(4 * GB, GB // 2))
    assert tight.verdict == "warn" and tight.detail == "0.5 GB free of 4.0 GB, the limit of the container"
    assert machine.memory(Limits(100 * GB, 90 * GB)).detail == "60.0 GB free of 64.0 GB"
    found = machine.cores(8, Limits(cores=2.5))
    assert found.verdict == "warn" and "`--threads 3`" in (found.hint or "")
    assert machine.cores(8, Limits(cores=8.0)).verdict == machine.cores(8, Limits()).verdict == "ok"


def test_few_open_files() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (machine.FEW_FILES - 1, before[1]))
        assert machine.open_files().verdict == "warn"
        resource.setrlimit(resource.RLIMIT_NOFILE, (machine.FEW_FILES, before[1]))
        assert machine.open_files().verdict == "ok"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("found", "driver", "verdict", "words"),
    [
        (device.Graphics(("H200, 1 GB free of 2 GB",), "13.0", "13.0"), "580.1", "ok", "H200"),
        (device.Graphics((), None, None), "580.1", "ok", "built without CUDA"),
        (device.Graphics((), None, None), None, "ok", "none is needed"),
        (device.Graphics((), "13.0", None), None, "ok", "no driver"),
        (device.Graphics((), "13.0", "12.2"), "535.1", "warn", "goes up to CUDA 12.2"),
    ],
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    found: device.Graphics,
    driver: str | None,
    verdict: str,
    words: str,
) -> None:
    monkeypatch.setattr(device, "graphics", lambda: found)
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    if driver:
        (tmp_path / "version").write_text(f"{driver}\n")
    check = machine.gpus()
    assert check.verdict == verdict and words in check.detail
    assert driver is None or f"driver {driver}" in check.detail


def test_the_disk_is_measured_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: asked.append(len(data)) or plain(fd, data, at))
    checks = {check.name: check for check in disk.disk(tmp_path)}
    assert 0 < sum(asked) <= disk.PROBE
    assert list(tmp_path.iterdir()) == []
    assert "write" in checks["disk speed"].detail and "read" in checks["disk speed"].detail


def test_a_disk_that_is_slow_full_or_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def verdict(name: str, folder: Path = tmp_path) -> str:
        return {check.name: check.verdict for check in disk.disk(folder)}[name]

    monkeypatch.setattr(disk, "speed", lambda folder: (400e6, 40e6))
    assert verdict("disk speed") == "warn"
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 10**6)
    monkeypatch.setattr(disk, "speed", None)  # it is not called
    assert verdict("disk") == verdict("disk speed") == "warn"
    monkeypatch.undo()
    assert verdict("disk speed", tmp_path / "gone") == "warn"


def test_time_bounds_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that gains a second at each look: after `LONGEST` looks both parts end."""
    ticks = iter(range(1000))
    monkeypatch.setattr(disk.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(disk, "PROBE", 1 << 40)
    write, read = disk.speed(tmp_path)
    assert 0 < write <= disk.PIECE and 0 < read <= disk.PIECE


def test_versions_against_the_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        metadata, "requires", lambda name: ["torch<3,>=2.4", "numpy>=999", "nowhere>=1", "pytest>=8; extra == 'test'"]
    )
    found = {check.name: check for check in environment._packages()}
    assert {name: check.verdict for name, check in found.items()} == {"torch": "ok", "numpy": "fail", "nowhere": "fail"}
    assert "'numpy>=999'" in (found["numpy"].hint or "") and "not installed" in found["nowhere"].detail


def test_a_program_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert [(check.name, check.verdict) for check in environment._packages()] == [("packages", "warn")]

"""A plugin of pytest that notes which answers of tests/oracles.json tests read, which of these tests pass, and how far
a method's answer is from an oracle's where `method_cases.close` holds them against each other.

    python -m pytest -p oracle_watch --noted FILE ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

_reading: list[set[str]] = [set()]  # cases whose answers the test that runs has read
_read: dict[str, list[bool]] = {}  # by case: whether each of the tests that read it passed
_apart: dict[str, float] = {"float64": 0.0, "float32": 0.0}
_all: set[str] = set()


class Expected(dict[str, Any]):
    """The answers of one case, which notes that they are read."""

    def __init__(self, case: str, answers: dict[str, Any]):
        super().__init__(answers)
        self.case = case

    def __getitem__(self, name: str) -> Any:
        _reading[0].add(self.case)
        return super().__getitem__(name)

    def items(self) -> Any:
        _reading[0].add(self.case)
        return super().items()

    def values(self) -> Any:
        _reading[0].add(self.case)
        return super().values()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--noted", type=Path, required=True, help="JSON file for what is found")


def pytest_configure(config: pytest.Config) -> None:
    """Before tests are collected, for they read the file when they are imported."""
    loads = json.loads

    def noting(text: Any, *args: Any, **kwargs: Any) -> Any:
        found = loads(text, *args, **kwargs)
        if isinstance(found, dict) and "meta" in found and "cases" in found:
            for case in found["cases"]:
                case["expected"] = Expected(case["id"], case["expected"])
                _all.add(case["id"])
        return found

    json.loads = noting  # type: ignore[assignment]


def pytest_collection_modifyitems() -> None:
    """Tests have imported `close` by now, so it is replaced where they have it too."""
    for home in [module for name, module in sys.modules.items() if name.rpartition(".")[2] == "method_cases"]:
        plain = home.close
        noted = _noting(plain, home)
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get("close") is plain:
                module.__dict__["close"] = noted


def _noting(check: Callable[..., None], home: Any) -> Callable[..., None]:
    """`check`, which then notes the largest difference: in float32 relative to the largest number expected."""

    def close(got: torch.Tensor, case: str, name: str, compute: torch.dtype) -> None:
        check(got, case, name, compute)
        expected = home.tensor(home.ORACLES[case]["expected"][name])
        if expected.numel():
            apart = float((got.double() - expected.double()).abs().max())
            if compute == torch.float32:
                apart /= float(expected.abs().max()) or 1.0
            key = str(compute).removeprefix("torch.")
            _apart[key] = max(_apart[key], apart)

    return close


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    _reading[0] = set()
    passed = False
    try:
        yield
        passed = True
    finally:
        for case in _reading[0]:
            _read.setdefault(case, []).append(passed)


def pytest_sessionfinish(session: pytest.Session) -> None:
    found = {
        "cases": len(_all),
        "read": len(_read),
        "held": sum(all(passed) for passed in _read.values()),
        "unread": sorted(_all - set(_read)),
        "apart": _apart,
    }
    session.config.getoption("--noted").write_text(json.dumps(found), encoding="utf-8")

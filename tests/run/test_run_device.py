"""Where kernels run: names of devices, and on a GPU the results of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipes_for_runs import STEPS, write_models, write_recipe
from safetensors.torch import load_file

from mergekit_lite import load_recipe, plan, run
from mergekit_lite.errors import UsageError
from mergekit_lite.run.device import find_device

HAS_GPU = torch.cuda.is_available()


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "", "CPU", "mps"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="there is no device"):
        find_device(name)


def test_the_cpu_is_always_there() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if HAS_GPU else "cpu")


def test_a_missing_gpu_is_told_before_anything_is_written(tmp_path: Path) -> None:
    write_models(tmp_path, torch.bfloat16)
    file = write_recipe(tmp_path / "r.yaml", tmp_path, STEPS["linear"], tmp_path / "out")
    with pytest.raises(UsageError, match=r"there is no GPU `cuda:99`"):
        run(plan(load_recipe(file)), device="cuda:99")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.skipif(not HAS_GPU, reason="torch sees no GPU")
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_gpu_gives_what_the_cpu_gives(name: str, threads: int, tmp_path: Path) -> None:
    write_models(tmp_path, torch.float32)
    made = {}
    for device in ("cpu", "cuda"):
        file = write_recipe(tmp_path / f"{device}.yaml", tmp_path, STEPS[name], tmp_path / device)
        run(plan(load_recipe(file)), device=device, threads=threads)
        made[device] = [load_file(shard) for shard in sorted((tmp_path / device).rglob("*.safetensors"))]
    assert made["cpu"]
    torch.testing.assert_close(made["cuda"], made["cpu"], rtol=1e-5, atol=1e-6)

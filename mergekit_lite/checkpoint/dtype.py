"""The dtypes of safetensors files as torch's."""

from __future__ import annotations

import torch

from mergekit_lite.checkpoint.meta import DTYPE_NAMES

# safetensors dtype code -> torch dtype, for those that this version of torch has. Sub-byte dtypes are read as bytes.
TORCH_DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in DTYPE_NAMES.items() if hasattr(torch, name)
}

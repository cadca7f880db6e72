"""BlinkDL's own inference package (rwkv on PyPI), in a process of its own: it sets torch's switches by their old names,
after which torch refuses to read them by their new ones."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

_CODE = """
import sys, torch
from rwkv.model import RWKV
path, *ids = sys.argv[1:]
with torch.no_grad():
    logits, _ = RWKV(path, "cpu fp32").forward([int(i) for i in ids], None, full_output=True)
torch.save(logits.float(), path + ".logits")
"""


def package_logits(file: Path, ids: list[int]) -> Tensor:
    """Its logits [tokens, vocabulary] after each of ``ids``, of the model in ``file`` (.pth)."""
    if importlib.util.find_spec("rwkv") is None:
        pytest.skip("rwkv is not installed (pip install --no-deps rwkv==0.8.32)")
    path = str(file.with_suffix(""))
    switches = {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    subprocess.run([sys.executable, "-c", _CODE, path, *map(str, ids)], env={**os.environ, **switches}, check=True)
    logits: Tensor = torch.load(f"{path}.logits", weights_only=True)
    return logits

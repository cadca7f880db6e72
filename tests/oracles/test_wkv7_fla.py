"""WKV-7 against flash-linear-attention's plain torch form of the generalised delta rule (fla-org, fla-core)."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megaforge.kernels.wkv7 import wkv7
from tests.kernels.wkv7_cases import HardCase, hard, make_inputs, relative_error


@pytest.fixture(scope="module")
def naive() -> ModuleType:
    """The one file, on its own: importing the package would ask for Triton."""
    pytest.importorskip("einops", reason="fla-core's naive operators need einops (extra 'test')")
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations:
        pytest.skip("fla-core is not installed (pip install --no-deps fla-core==0.6.0)")
    path = f"{found.submodule_search_locations[0]}/ops/generalized_delta_rule/dplr/naive.py"
    spec = importlib.util.spec_from_file_location("fla_dplr_naive", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(naive: ModuleType, form: str, inputs: list[Tensor], tolerance: float) -> None:
    """Outputs and gradients of both, in the precision of ``inputs``."""
    n = inputs[0].shape[-1]

    def theirs(r, log_w, k, v, a, b, state):
        """Theirs is [b, h, s, n], scales r by n^-0.5 and keeps the state [key, value]."""
        r, log_w, k, v, a, b = (x.permute(1, 2, 0, 3) for x in (r, log_w, k, v, a, b))
        y, state = getattr(naive, form)(r * n**0.5, k, v, a, b, log_w, initial_state=state.transpose(-1, -2))
        return y.permute(2, 0, 1, 3), state.transpose(-1, -2)

    results = []
    for function in (wkv7, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        generator = torch.Generator().manual_seed(4)
        loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    names = ("y", "state", "dr", "dlog_w", "dk", "dv", "da", "db", "dstate")
    for name, ours, expected in zip(names, *results, strict=True):
        error = relative_error(ours.detach(), expected.detach())
        assert error <= tolerance, f"{name}: relative difference {error:.2e}"


@pytest.mark.parametrize("form", ["dplr_recurrence", "dplr_chunkwise"])
@pytest.mark.parametrize("minimum_decay", [False, True])
def test_outputs_and_gradients_agree_with_fla(naive: ModuleType, form: str, minimum_decay: bool) -> None:
    inputs = [x.float() for x in make_inputs(64, n=64, heads=2, minimum_decay=minimum_decay)]
    compare(naive, form, inputs, 5e-6)


@hard
def test_hard_inputs_agree_with_fla(naive: ModuleType, case: HardCase) -> None:
    """In fp32, which is all that theirs computes in; sums cancel in both."""
    compare(naive, "dplr_recurrence", [x.float() for x in case.inputs(16)], 2e-5)

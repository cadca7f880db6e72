"""What the cases of Triton kernels share.

``test_triton.py`` runs them in Triton's interpreter, which must be chosen before Triton is imported; on a GPU
``tests/gpu/test_triton.py`` runs them as they are.
"""

from __future__ import annotations

import os

import torch

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
# The interpreter truncates to bf16 where a GPU rounds.
BF16 = (torch.bfloat16, 8e-3)


def compare(function, reference, inputs: list, dtype: torch.dtype, tolerance: float) -> None:
    """Outputs and the gradients of all tensors that take one; the reference in fp64."""
    results = []
    for candidate, wide in ((function, False), (reference, True)):
        leaves = [None if x is None else x.detach().clone().to(DEVICE) for x in inputs]
        for x in leaves:
            if x is not None and x.is_floating_point():
                x.requires_grad_()
        floating = [x for x in leaves if x is not None and x.requires_grad]
        out = candidate(*(x.double() if wide and x is not None and x.requires_grad else x for x in leaves))
        out = out if isinstance(out, tuple) else (out,)
        generator = torch.Generator().manual_seed(5)
        weights = [torch.randn(x.shape, generator=generator).to(DEVICE, dtype) for x in out]
        grads = torch.autograd.grad(out, floating, [w.to(x.dtype) for w, x in zip(weights, out, strict=True)])
        results.append([*out, *grads])
    for place, (ours, expected) in enumerate(zip(*results, strict=True)):
        error = (ours.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-9)
        assert error <= tolerance, f"result {place}: relative error {error:.2e}"

"""The head's cross-entropy by Triton kernels on a GPU: their cases."""

from __future__ import annotations

import pytest
import torch

from megaforge.kernels.native import triton_kernels

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or triton_kernels("cross_entropy")[0] is None, reason="needs a GPU and Triton"
)

if torch.cuda.is_available():
    from tests.kernels.cross_entropy_cases import *  # noqa: F403

"""Triton kernels where there is no GPU: interpreted, and compiled for two generations; which tensors they take."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from megaforge.kernels import native, pointwise, rwkv7_fused
from megaforge.kernels.native import triton_kernels

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[2]
CASES = [str(HERE / f"{op}_cases.py") for op in ("rwkv7_fused", "pointwise", "cross_entropy")]
with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton; bash run_scripts/check_triton.sh brings it"
)


def run_python(*arguments: str, **environment: str) -> None:
    """In a process of its own: Triton's interpreter is chosen once a process."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "MEGAFORGE_NATIVE": "1", **environment}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@with_triton
def test_the_kernels_agree_with_torch_in_tritons_interpreter() -> None:
    run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", *CASES, TRITON_INTERPRET="1")


@with_triton
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    script = str(HERE / "compile_triton.py")
    run_python(script, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


def test_without_triton_plain_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 2, 8)
    assert not rwkv7_fused.fused(x)  # not on a GPU
    triton_kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "megaforge.kernels.rwkv7_fused.triton_kernels", raising=False)
    assert (
        triton_kernels("rwkv7_fused")[0] is None and "pip install 'megaforge[gpu]'" in triton_kernels("rwkv7_fused")[1]
    )
    triton_kernels.cache_clear()


def test_a_gpu_without_the_kernels_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(native, "print_rank_0", said.append)
    monkeypatch.setenv("MEGAFORGE_NATIVE", "0")
    for cached in (triton_kernels, native.say_fallback):
        cached.cache_clear()
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    try:
        assert not rwkv7_fused.fused(torch.ones(1)) and not said
        assert not any(rwkv7_fused.fused(on_gpu) for _ in range(2))  # type: ignore[arg-type]
        assert len(said) == 1 and "no Triton kernel (MEGAFORGE_NATIVE=0); using plain torch" in said[0]
        on_gpu.dtype = torch.float64
        assert not rwkv7_fused.fused(on_gpu)  # type: ignore[arg-type]
        assert len(said) == 2 and "not in fp64" in said[1]
    finally:
        for cached in (triton_kernels, native.say_fallback):
            cached.cache_clear()


FORMS = {
    "rms_norm": "Norm", "layer_norm": "Norm", "squared_relu": "SquaredReLU", "swiglu": "Gated",
    "stream_rms_norm": "StreamNorm", "stream_layer_norm": "StreamNorm",
    "gated_squared_relu": "Gated", "weighted_activation": "Weighted", "apply_rotary": "Rotate",
}  # fmt: skip


@pytest.mark.parametrize("name", list(FORMS))
def test_tensors_of_a_gpu_go_to_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rooms' faces call where a kernel takes the tensor."""
    function = FORMS[name]
    called: list[str] = []
    monkeypatch.setattr(pointwise.native, "takes", lambda *tensors: False)
    monkeypatch.setattr(pointwise.triton, "takes", lambda x: True)
    monkeypatch.setattr(getattr(pointwise.triton, function), "apply", lambda *arguments: called.append(function))
    x, vector = torch.ones(2, 1, 2, 8), torch.ones(8)
    more = {
        "rms_norm": (vector, 1e-5),
        "layer_norm": (vector, vector, 1e-5),
        "stream_rms_norm": (x, vector, 1e-5),
        "stream_layer_norm": (None, vector, vector, 1e-5),
        "apply_rotary": (torch.ones(2, 1, 1, 4),) * 2,
    }
    options = {"weighted_activation": {"weights": torch.ones(2), "squared": True, "gated": False}}
    getattr(pointwise, name)(x, *more.get(name, ()), **options.get(name, {}))
    assert called == [function]


def test_rows_wider_than_a_program_are_said_to_have_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(pointwise.triton, "takes", lambda x: True)
    monkeypatch.setattr(pointwise.triton, "say_no_triton", lambda what, reason: said.append(reason))
    widest = pointwise.triton.WIDEST
    assert pointwise.triton.takes_rows(torch.empty(1, widest)) and not said
    assert not pointwise.triton.takes_rows(torch.empty(1, widest + 1)) and str(widest + 1) in said[0]

"""RWKV-7's fused arithmetic where there is no GPU: its Triton kernels interpreted, and compiled for two generations."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from megaforge.kernels import native, rwkv7_fused
from megaforge.kernels.rwkv7_fused import mix_tokens
from megaforge.kernels.rwkv7_fused.triton import load_triton
from tests.nn.support import assert_close, random

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[2]
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
    run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "rwkv7_fused_cases.py"), TRITON_INTERPRET="1")


@with_triton
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    script = str(HERE / "compile_rwkv7_triton.py")
    run_python(script, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


def test_without_triton_plain_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 2, 8)
    assert not rwkv7_fused.fused(x)  # not on a GPU
    load_triton.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "megaforge.kernels.rwkv7_fused.triton_kernels", raising=False)
    assert load_triton()[0] is None and "pip install 'megaforge[gpu]'" in load_triton()[1]
    load_triton.cache_clear()


def test_a_gpu_without_the_kernels_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(native, "print_rank_0", said.append)
    monkeypatch.setenv("MEGAFORGE_NATIVE", "0")
    for cached in (load_triton, native.say_fallback):
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
        for cached in (load_triton, native.say_fallback):
            cached.cache_clear()


@pytest.mark.parametrize("at_once", [1, 20, 10**6])
def test_mixes_and_their_gradients(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of tokens the backward pass takes at once."""
    monkeypatch.setattr("megaforge.kernels.rwkv7_fused.mixes.CPU_ELEMENTS_AT_ONCE", at_once)
    leaves = [random(7, 2, 5), random(7, 2, 5, seed=1), random(5, seed=2), random(5, seed=3)]
    ours = [leaf.clone().requires_grad_() for leaf in leaves]
    theirs = [leaf.clone().requires_grad_() for leaf in leaves]
    got = mix_tokens(ours[0], ours[1], ours[2:])
    expected = [theirs[0] + (theirs[1] - theirs[0]) * c for c in theirs[2:]]
    for number, (out, reference) in enumerate(zip(got, expected, strict=True)):
        assert_close(out, reference, 1e-14, f"mix {number}")
    sum((out * random(7, 2, 5, seed=9 + i)).sum() for i, out in enumerate(got)).backward()
    sum((out * random(7, 2, 5, seed=9 + i)).sum() for i, out in enumerate(expected)).backward()
    for name, a, b in zip(("x", "previous", "c0", "c1"), ours, theirs, strict=True):
        assert_close(a.grad, b.grad, 1e-14, name)


def test_bf16_mixes_sum_their_gradients_in_fp32() -> None:
    x, previous = random(3000, 1, 4).bfloat16(), random(3000, 1, 4, seed=1).bfloat16()
    coefficient = torch.rand(4, requires_grad=True)
    (out,) = mix_tokens(x, previous, [coefficient])
    assert out.dtype == torch.bfloat16
    out.backward(torch.ones_like(out))
    assert coefficient.grad is not None and coefficient.grad.dtype == torch.float32
    assert_close(coefficient.grad, (previous.double() - x.double()).sum((0, 1)), 1e-5, "coefficient")

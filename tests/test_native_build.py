"""What is built on machines that this one is not: nvcc without a GPU, another nvcc, a toolkit that is not on PATH."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import native_build
from native_build import ANY_GPU, CudaPlan, architectures, compile_jobs, cuda_plan, nvcc_release

GIB = 1 << 30


def toolkit(folder: Path, release: str) -> str:
    """A CUDA toolkit whose nvcc can only say what it is."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    return str(folder)


@pytest.fixture
def cuda_torch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The installed torch, taken for a build for CUDA 13.0 that sees no GPU and finds no toolkit."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    # torch.utils.cpp_extension holds it against compilers that are too new for 13.0; the machine's own is not the point
    monkeypatch.setattr(cpp_extension, "_check_cuda_version", lambda name, version: None)
    for name in ("TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MAX_JOBS", "1")
    return monkeypatch


def built() -> set[str]:
    return {extension.name for extension in native_build.prepare()[0]}


CPU_OPS = {"megaforge.data._data_helpers", "megaforge.data._corpus_text", "megaforge.kernels._wkv7_cpu"}
CUDA_OPS = {f"megaforge.kernels._{op}_cuda" for op in ("wkv7", "moe_routing", "newton_schulz", "bitgemm")}


def test_nvcc_without_a_gpu_builds_for_any(cuda_torch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda_torch.setattr(cpp_extension, "CUDA_HOME", toolkit(tmp_path, "13.0"))
    with pytest.raises(IndexError):  # what torch does by itself there
        cpp_extension._get_cuda_arch_flags()
    cuda_torch.setenv("TORCH_CUDA_ARCH_LIST", "native")  # means the same, and so that it is put back after the test
    assert built() >= CPU_OPS | CUDA_OPS
    assert cpp_extension._get_cuda_arch_flags() == [
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]


def test_nvcc_of_another_cuda_leaves_the_cpu_ops(
    cuda_torch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda_torch.setattr(cpp_extension, "CUDA_HOME", toolkit(tmp_path, "12.8"))
    names = built()
    assert names >= CPU_OPS and not names & CUDA_OPS
    assert capsys.readouterr().out == (
        f"CUDA operators: not built, {tmp_path}/bin/nvcc is of CUDA 12.8 and torch of CUDA 13.0; "
        "set CUDA_HOME to a toolkit of CUDA 13\n"
    )


def test_a_toolkit_found_through_cuda_home_alone(cuda_torch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda_torch.setenv("PATH", "/nowhere")
    cuda_torch.setenv("CUDA_HOME", toolkit(tmp_path, "13.1"))
    cuda_torch.setattr(cpp_extension, "CUDA_HOME", cpp_extension._find_cuda_home())
    plan = native_build.plan_here()
    assert plan.build and f"{tmp_path}/bin/nvcc 13.1" in plan.why


def test_a_compiler_that_nvcc_refuses_leaves_the_cpu_ops(cuda_torch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(name: str, version: object) -> None:
        raise RuntimeError(f"The current installed version of {name} is greater\n than the maximum required")

    cuda_torch.setattr(cpp_extension, "CUDA_HOME", toolkit(tmp_path, "13.0"))
    cuda_torch.setattr(cpp_extension, "_check_cuda_version", refuse)
    plan = native_build.plan_here()
    assert not plan.build and "is greater than the maximum required" in plan.why


def test_a_gpu_that_cannot_be_asked_counts_as_none(cuda_torch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def busy(index: int) -> None:
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")

    cuda_torch.setattr(cpp_extension, "CUDA_HOME", toolkit(tmp_path, "13.0"))
    cuda_torch.setattr(torch.cuda, "device_count", lambda: 1)
    cuda_torch.setattr(torch.cuda, "get_device_capability", busy)
    assert native_build.plan_here().architectures == ANY_GPU


def test_what_stands_against_it_is_said(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "cuda", "13.0")
    assert cuda_plan(None, home, [], None) == CudaPlan(False, "torch is not a CUDA build")
    assert "CUDA_HOME" in cuda_plan("13.0", None, [], None).why
    empty = cuda_plan("13.0", str(tmp_path), [], None)  # a folder called CUDA_HOME without an nvcc
    assert not empty.build and "does not run" in empty.why
    old = cuda_plan("13.0", home, [(7, 5)], None)
    assert not old.build and "8.0 or later" in old.why


def test_nvcc_that_says_nothing_has_no_release(tmp_path: Path) -> None:
    home = toolkit(tmp_path, "13.0")
    assert nvcc_release(Path(home) / "bin" / "nvcc") == "13.0"
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    assert nvcc_release(Path(home) / "bin" / "nvcc") is None


@pytest.mark.parametrize(
    ("asked", "visible", "needed"),
    [
        (None, [], ANY_GPU),
        ("native", [], ANY_GPU),
        (None, [(8, 0)], None),  # torch finds it
        (None, [(9, 0)], "9.0a"),
        (None, [(9, 0), (7, 0), (8, 0), (9, 0)], "8.0;9.0a"),
        (None, [(7, 0)], ""),
        ("9.0", [], "9.0a"),
        ("8.0;9.0+PTX", [], "9.0a;8.0+PTX"),
        ("9.0a", [], None),
        ("9.0a 12.0+PTX", [(7, 0)], None),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", [], "8.0;8.6;9.0a;10.0;12.0+PTX"),  # as images carry it
        ("7.0;7.5", [(9, 0)], ""),
        ("Hopper", [], None),
    ],
)
def test_architectures(asked: str | None, visible: list[tuple[int, int]], needed: str | None) -> None:
    assert architectures(asked, visible) == needed


def test_jobs_follow_cores_and_memory() -> None:
    assert compile_jobs(2, 16 * GIB) == 2
    assert compile_jobs(64, 512 * GIB) == 16
    assert compile_jobs(16, 9 * GIB) == 4
    assert compile_jobs(8, GIB) == 1


def test_code_for_x86_is_left_out_elsewhere() -> None:
    for op in ("gemv", "moe_routing"):
        folder = native_build.ROOT / "csrc" / op
        every = set(native_build.cpu_sources(folder, "x86_64"))
        few = set(native_build.cpu_sources(folder, "aarch64"))
        assert (
            every
            == set(native_build.cpu_sources(folder, "AMD64"))
            == {f"csrc/{op}/cpu/{p.name}" for p in (folder / "cpu").glob("*.cpp")}
        )
        assert {Path(file).name.partition(".")[0] for file in every - few} >= {"avx2", "avx512"}
        assert {"scalar.cpp", "run.cpp"} <= {Path(file).name for file in few}

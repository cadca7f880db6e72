"""What of ``csrc`` is built here, and how: setup.py asks, and ``python native_build.py`` says it in one line.

Every folder of ``csrc`` is one op. ``csrc/OP/cpu/*.cpp`` becomes the extension that :data:`PYTHON_MODULES` names, or
``megaforge.kernels._OP_cpu``, which is built against torch; ``csrc/common`` holds what ops share. ``csrc/OP/cuda/*.cu``
with its binding becomes ``megaforge.kernels._OP_cuda`` where torch is a CUDA build and finds an nvcc that suits it
(``CUDA_HOME``, PATH or /usr/local/cuda). Where it does not, the CPU ops are built all the same, and one line says why.

``TORCH_CUDA_ARCH_LIST`` and ``MAX_JOBS`` count where they are set.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
# Helpers without tensors: they need pybind11 and NumPy, not torch.
PYTHON_MODULES = {"corpus_text": "megaforge.data._corpus_text", "data_helpers": "megaforge.data._data_helpers"}
# One build runs everywhere: code for an instruction set says so in its own file; csrc/common/isa.h chooses.
CPU_FLAGS = [
    "-O3", "-std=c++20", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-g0", "-Wall",
    "-Wno-unknown-pragmas",
]  # fmt: skip
CUDA_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo"]
OLDEST_GPU = (8, 0)  # cp.async and the matrix products of bf16 and TF32
ANY_GPU = "8.0+PTX;9.0a"  # machine code for A100 and H100; the PTX serves what comes after them
HOPPER = (9, 0)  # built as 9.0a, which alone has wgmma and which every GPU of 9.0 runs
MEMORY_PER_JOB = 2 << 30  # bytes; a file that includes torch's headers takes this much to compile
MOST_JOBS = 16


@dataclass(frozen=True)
class CudaPlan:
    """Whether the CUDA ops are built.

    Attributes:
        build: whether.
        why: in words: with what and for which GPUs, or the reason against it.
        architectures: what ``TORCH_CUDA_ARCH_LIST`` must be; None: torch asks the GPUs that it sees.
    """

    build: bool
    why: str
    architectures: str | None = None

    def __str__(self) -> str:
        return f"CUDA operators: {'built' if self.build else 'not built'}, {self.why}"


def nvcc_release(nvcc: Path) -> str | None:
    """The release that ``nvcc --version`` gives, such as ``13.0``; None when it does not run or says nothing."""
    try:
        said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\d+\.\d+)", said)
    return found.group(1) if found else None


def served(architectures: str) -> list[str]:
    """Of a ``TORCH_CUDA_ARCH_LIST``, what the kernels can be compiled for; names (``Hopper``) are left to torch."""
    listed = [entry for entry in re.split(r"[;\s]+", architectures) if entry]
    number = re.compile(r"(\d+)\.(\d+)[a-z]?(\+PTX)?")
    return [
        entry
        for entry in listed
        if not (found := number.fullmatch(entry)) or (int(found[1]), int(found[2])) >= OLDEST_GPU
    ]


def with_wgmma(entries: Sequence[str]) -> list[str]:
    """The same list with the code for 9.0 that has wgmma. Its PTX serves no other GPU: that of 8.0 stands for it."""
    changed: list[str] = []
    for entry in entries:
        changed += {"9.0": ["9.0a"], "9.0+PTX": ["9.0a", "8.0+PTX"]}.get(entry, [entry])
    if "8.0+PTX" in changed:
        changed = [entry for entry in changed if entry != "8.0"]
    return list(dict.fromkeys(changed))


def architectures(asked: str | None, visible: Sequence[tuple[int, int]]) -> str | None:
    """What ``TORCH_CUDA_ARCH_LIST`` must be.

    Args:
        asked: its value now.
        visible: compute capability of each GPU that torch sees.

    Returns:
        None: leave it as it is, torch finds what is right. Empty: none of these GPUs runs the kernels.
    """
    if asked and asked != "native":
        kept = with_wgmma(served(asked))
        return None if kept == [entry for entry in re.split(r"[;\s]+", asked) if entry] else ";".join(kept)
    if not visible:  # a login node, an image being built; torch's own detection fails here
        return ANY_GPU
    new_enough = sorted({capability for capability in visible if capability >= OLDEST_GPU})
    if len(new_enough) == len(set(visible)) and HOPPER not in new_enough:
        return None
    return ";".join(with_wgmma([f"{major}.{minor}" for major, minor in new_enough]))


def cuda_plan(
    torch_cuda: str | None,
    cuda_home: str | None,
    visible: Sequence[tuple[int, int]],
    asked: str | None,
    compiler_fault: str | None = None,
) -> CudaPlan:
    """Whether the CUDA ops can be built.

    Args:
        torch_cuda: the CUDA release that torch was built with, None for a CPU build.
        cuda_home: where torch found the CUDA toolkit.
        visible: compute capability of each GPU that torch sees.
        asked: ``TORCH_CUDA_ARCH_LIST``.
        compiler_fault: what torch has against the C++ compiler together with this nvcc.
    """
    if torch_cuda is None:
        return CudaPlan(False, "torch is not a CUDA build")
    if cuda_home is None:
        return CudaPlan(False, f"no nvcc: put that of CUDA {torch_cuda} on PATH, or set CUDA_HOME to its toolkit")
    nvcc = Path(cuda_home) / "bin" / "nvcc"
    release = nvcc_release(nvcc)
    if release is None:
        return CudaPlan(False, f"{nvcc} does not run; set CUDA_HOME to the toolkit of CUDA {torch_cuda}")
    if release.split(".")[0] != torch_cuda.split(".")[0]:
        return CudaPlan(
            False,
            f"{nvcc} is of CUDA {release} and torch of CUDA {torch_cuda}; "
            f"set CUDA_HOME to a toolkit of CUDA {torch_cuda.split('.')[0]}",
        )
    if compiler_fault is not None:
        return CudaPlan(False, compiler_fault)
    needed = architectures(asked, visible)
    if needed == "":
        return CudaPlan(False, f"they need GPUs of compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]} or later")
    return CudaPlan(True, f"with {nvcc} {release} for {needed or asked or 'the visible GPUs'}", needed)


def compile_jobs(cores: int, memory: int) -> int:
    """How many files are compiled at once on ``cores`` with ``memory`` bytes."""
    return max(1, min(cores, memory // MEMORY_PER_JOB, MOST_JOBS))


def plan_here() -> CudaPlan:
    """:func:`cuda_plan` for the installed torch and this machine."""
    import torch
    from torch.utils import cpp_extension

    home, cuda = cpp_extension.CUDA_HOME, torch.version.cuda
    try:
        visible = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    except RuntimeError:  # a GPU that another process has to itself, or a driver that does not start
        visible = []
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    plan = cuda_plan(cuda, home, visible, asked)
    if plan.build:
        plan = cuda_plan(cuda, home, visible, asked, _compiler_fault(cpp_extension))
    return plan


def _compiler_fault(cpp_extension: Any) -> str | None:
    """What torch would stop the whole build for: a C++ compiler that this nvcc does not work with."""
    check = getattr(cpp_extension, "_check_cuda_version", None)
    if check is None:
        return None
    try:
        compiler = cpp_extension.get_cxx_compiler()
        check(compiler, cpp_extension.get_compiler_abi_compatibility_and_version(compiler)[1])
    except RuntimeError as error:
        return " ".join(str(error).split())
    return None


def _sources(folder: Path, *patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in folder.glob(pattern))


def cpu_sources(op: Path, machine: str) -> list[str]:
    """The C++ of an op for a CPU of this architecture, as ``platform.machine()`` has it: avx*.cpp are for x86 alone."""
    x86 = machine.lower() in ("x86_64", "amd64")
    return [file for file in _sources(op / "cpu", "*.cpp") if x86 or not Path(file).name.startswith("avx")]


def helper_extensions() -> list[Any]:
    """The helpers of :data:`PYTHON_MODULES`."""
    from pybind11.setup_helpers import Pybind11Extension

    return [
        Pybind11Extension(module, _sources(ROOT / "csrc" / op / "cpu", "*.cpp"), cxx_std=20, extra_compile_args=["-O3"])
        for op, module in PYTHON_MODULES.items()
    ]


def used_ops(op: Path) -> list[Path]:
    """The folders of the ops that ``csrc/OP/uses`` names: their code, but for its binding, is built into OP too."""
    names = (op / "uses").read_text(encoding="utf-8").split() if (op / "uses").is_file() else []
    return [op.parent / name for name in names]


def torch_extensions(plan: CudaPlan) -> list[Any]:
    """The ops on tensors."""
    from torch.utils import cpp_extension

    extensions: list[Any] = []
    for op in sorted(path for path in (ROOT / "csrc").iterdir() if path.is_dir() and path.name not in PYTHON_MODULES):
        include = [str(op), str(ROOT / "csrc")]
        cpu = cpu_sources(op, platform.machine())
        for other in used_ops(op):
            files = cpu_sources(other, platform.machine())
            cpu += [file for file in files if not Path(file).name.startswith("binding")]
        if cpu:
            extensions.append(
                cpp_extension.CppExtension(
                    f"megaforge.kernels._{op.name}_cpu",
                    cpu,
                    include_dirs=include,
                    extra_compile_args={"cxx": CPU_FLAGS},
                    extra_link_args=["-fopenmp"],
                )
            )
        cuda = _sources(op / "cuda", "*.cu", "*.cpp")
        if cuda and plan.build:
            extensions.append(
                cpp_extension.CUDAExtension(
                    f"megaforge.kernels._{op.name}_cuda",
                    cuda,
                    include_dirs=include,
                    extra_compile_args={"cxx": ["-O3", "-std=c++20"], "nvcc": CUDA_FLAGS},
                )
            )
    return extensions


def prepare() -> tuple[list[Any], dict[str, Any]]:
    """The extensions and the build command; sets in the environment what torch's build reads there.

    Raises:
        SystemExit: torch is not installed.
    """
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        raise SystemExit(
            "building MegaForge needs torch in the environment: pip install -c constraints.txt torch, "
            "then pip install --no-build-isolation -e ."
        ) from error
    plan = plan_here()
    print(plan)
    if plan.architectures is not None:
        os.environ["TORCH_CUDA_ARCH_LIST"] = plan.architectures
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    os.environ.setdefault("MAX_JOBS", str(compile_jobs(len(os.sched_getaffinity(0)), memory)))
    extensions = [*helper_extensions(), *torch_extensions(plan)]
    return extensions, {"build_ext": BuildExtension.with_options(use_ninja=True)}


if __name__ == "__main__":
    print(plan_here())

"""Builds the native code ahead of time; everything else is in pyproject.toml.

Every folder of ``csrc`` is one op. ``csrc/OP/cpu/*.cpp`` becomes the extension that :data:`PYTHON_MODULES` names, or
``megaforge.kernels._OP_cpu``, which is built against torch; ``csrc/common`` holds what ops share. ``csrc/OP/cuda/*.cu``
with its binding becomes
``megaforge.kernels._OP_cuda`` where ``nvcc`` and a CUDA build of torch are present.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

ROOT = Path(__file__).parent
# Helpers without tensors: they need pybind11 and NumPy, not torch.
PYTHON_MODULES = {"data_helpers": "megaforge.data._data_helpers"}
# One build runs everywhere: code for an instruction set says so in its own file; csrc/common/isa.h chooses.
CPU_FLAGS = [
    "-O3", "-std=c++20", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-g0", "-Wall",
    "-Wno-unknown-pragmas",
]  # fmt: skip
CUDA_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo"]


def _sources(folder: Path, *patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in folder.glob(pattern))


def helper_extensions() -> list[Pybind11Extension]:
    """The helpers of :data:`PYTHON_MODULES`."""
    return [
        Pybind11Extension(module, _sources(ROOT / "csrc" / op / "cpu", "*.cpp"), cxx_std=20, extra_compile_args=["-O3"])
        for op, module in PYTHON_MODULES.items()
    ]


def torch_extensions() -> tuple[list[object], dict[str, object]]:
    """The ops on tensors and the build command they need; nothing when there is none."""
    ops = sorted(path for path in (ROOT / "csrc").iterdir() if path.is_dir() and path.name not in PYTHON_MODULES)
    if not any(_sources(op / "cpu", "*.cpp") for op in ops):
        return [], {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            "building MegaForge needs torch in the environment: pip install -c constraints.txt torch, "
            "then pip install --no-build-isolation -e ."
        ) from error
    extensions: list[object] = []
    with_cuda = torch.version.cuda is not None and shutil.which("nvcc") is not None
    for op in ops:
        include = [str(op), str(ROOT / "csrc")]
        cpu = _sources(op / "cpu", "*.cpp")
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
        if cuda and with_cuda:
            extensions.append(
                cpp_extension.CUDAExtension(
                    f"megaforge.kernels._{op.name}_cuda",
                    cuda,
                    include_dirs=include,
                    extra_compile_args={"cxx": ["-O3", "-std=c++20"], "nvcc": CUDA_FLAGS},
                )
            )
    os.environ.setdefault("MAX_JOBS", "2")
    return extensions, {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)}


on_tensors, commands = torch_extensions()
setup(ext_modules=[*helper_extensions(), *on_tensors], cmdclass=commands)

"""Builds the native ops ahead of time.

Every folder of ``csrc`` is one op: ``csrc/OP/cpu/*.cpp`` becomes the extension ``megaforge.kernels._OP_cpu`` (or, for a
helper without tensors, whatever its folder's name says), and ``csrc/OP/cuda/*.cu`` with its binding becomes
``megaforge.kernels._OP_cuda`` where ``nvcc`` and a CUDA build of torch are present. Everything else is in
pyproject.toml.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CPU_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
CUDA_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo"]


def _sources(folder: Path, *patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in folder.glob(pattern))


def native_extensions() -> dict[str, object]:
    """Arguments of setup() for the ops under csrc; empty when there is none to build."""
    ops = sorted(path for path in (ROOT / "csrc").iterdir() if path.is_dir())
    if not any(_sources(op / "cpu", "*.cpp") for op in ops):
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            "building MegaForge needs torch in the environment: pip install -c constraints.txt torch, "
            "then pip install --no-build-isolation -e ."
        ) from error
    extensions = []
    with_cuda = torch.version.cuda is not None and shutil.which("nvcc") is not None
    for op in ops:
        include = [str(op)]
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
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
    }


setup(**native_extensions())

"""ggml's product of a quantized matrix and fp32 tokens, from the libraries of llama-cpp-python or a folder."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

TYPES = {"TQ1_0": 34, "TQ2_0": 35}
BLOCK = 256  # columns that a row must be a multiple of
_F32 = 0


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def folder_of_wheel() -> Path | None:
    """Where an installed llama-cpp-python has its libraries."""
    found = importlib.util.find_spec("llama_cpp")
    folder = None if found is None or found.origin is None else Path(found.origin).parent / "lib"
    return folder if folder is not None and (folder / "libggml-base.so").exists() else None


class Ggml:
    """The libraries of ``folder``.

    Raises:
        OSError: they are not there.
    """

    def __init__(self, folder: Path) -> None:
        self._base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self._cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        for library, name, result, arguments in (
            (self._base, "ggml_init", pointer, [_InitParams]),
            (self._base, "ggml_free", None, [pointer]),
            (self._base, "ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, number, number]),
            (self._base, "ggml_get_data", pointer, [pointer]),
            (self._base, "ggml_quantize_chunk", ctypes.c_size_t,
             [ctypes.c_int, pointer, pointer, number, number, number, pointer]),
            (self._base, "ggml_mul_mat", pointer, [pointer, pointer, pointer]),
            (self._base, "ggml_new_graph", pointer, [pointer]),
            (self._base, "ggml_build_forward_expand", None, [pointer, pointer]),
            (self._cpu, "ggml_graph_compute_with_ctx", ctypes.c_int, [pointer, pointer, ctypes.c_int]),
        ):  # fmt: skip
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments

    def product(
        self, weight: Tensor, x: Tensor, kind: str, copies: int, calls: int
    ) -> tuple[Callable[[], None], Tensor]:
        """x [M, K] times ``copies`` of weight [N, K], both fp32, one after the other, at most ``calls`` times.

        Returns:
            What computes all of them, and where the last result [M, N] stands.
        """
        (rows, columns), tokens = weight.shape, x.shape[0]
        each = rows * columns // 2 + 4 * tokens * (rows + columns)
        size = copies * each + (calls + 1) * copies * (3 * tokens * columns + (1 << 16)) + (1 << 24)
        context = self._base.ggml_init(_InitParams(size, None, False))
        b = self._base.ggml_new_tensor_2d(context, _F32, columns, tokens)
        ctypes.memmove(self._base.ggml_get_data(b), x.contiguous().data_ptr(), 4 * x.numel())
        graphs, result, source = [], None, weight.contiguous()
        for _ in range(copies):
            a = self._base.ggml_new_tensor_2d(context, TYPES[kind], columns, rows)
            self._base.ggml_quantize_chunk(
                TYPES[kind], source.data_ptr(), self._base.ggml_get_data(a), 0, rows, columns, None
            )
            result = self._base.ggml_mul_mat(context, a, b)
            graphs.append(self._base.ggml_new_graph(context))
            self._base.ggml_build_forward_expand(graphs[-1], result)
        numbers = (ctypes.c_float * (tokens * rows)).from_address(self._base.ggml_get_data(result))

        def compute() -> None:
            for graph in graphs:
                self._cpu.ggml_graph_compute_with_ctx(context, graph, 1)

        return compute, torch.frombuffer(numbers, dtype=torch.float32).view(tokens, rows)

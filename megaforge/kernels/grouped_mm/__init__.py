"""The experts' matrix products: every expert's own matrix on its own rows, which lie one expert after the other.
:mod:`.reference` has the definition.

torch's ``grouped_mm`` does them in one call. Where it is taken is a rule, :func:`takes_grouped_mm`:

- never where it cannot: it wants fp32 or bf16 on a CPU, bf16 on a GPU (sm_80 on), no bias, and rows of a multiple of
  16 bytes that start at one (up to torch 2.12 it fails on others);
- on a GPU always else: one launch for all experts, and no host that walks through them;
- on a CPU for few rows an expert. There it is the same loop over the same GEMM, in C++: the same bits, and a few
  microseconds less for each expert. Measured on two Zen 5 cores with torch 2.13, time over that of the loop, forward:
  64 experts of 64 rows 0.83 (fp32) and 0.68 (bf16); 128 of 4 rows 0.92 and 0.74; 8 of 256 rows, 512 x 1152, 1.05
  and 0.99; 8 of 1,024 rows 1.02 and 0.96. So it is taken up to :data:`FEW_ROWS` rows an expert;
- on a CPU whose products are oneDNN's (:func:`compiles_shapes`) up to :data:`FEWEST_ROWS` only. oneDNN compiles a
  kernel for each shape that it has not seen, in 0.3 to 0.9 ms, and experts have other numbers of rows in every step. So
  beyond that the loop here takes a few rows more than an expert has, a number that comes again: see :func:`_padded`.
  Measured on one Zen 4 core, bf16, time over that of exact rows, forward and the weights' gradient: 4 experts of about
  256 rows, 192 x 384, 0.44 and 0.54; of about 1,024 rows 0.86 and 0.84; 8 of about 512, 768 x 2048, 0.97 and 0.98.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from megaforge.device import IS_HIP, upload
from megaforge.kernels.native import say_fallback

FEW_ROWS, FEWEST_ROWS = 128, 16  # an expert, on average
_FINE = 5  # a padded number of rows has at most so many significant bits
_ALIGNMENT = 16  # bytes
_GROUPED: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def takes_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether rows ``x`` [N, in] go through torch's ``grouped_mm`` for ``weight`` [E, out, in]; see above."""
    if _GROUPED is None or x.dtype != weight.dtype or not len(x):
        return False
    if any(width * x.element_size() % _ALIGNMENT for width in weight.shape[1:]):
        return False
    if _starts_between(x) or _starts_between(weight):
        return False
    if x.device.type == "cpu":
        most = FEWEST_ROWS if compiles_shapes(x) else FEW_ROWS
        return x.dtype in (torch.float32, torch.bfloat16) and len(x) <= most * len(weight)
    return x.device.type == "cuda" and x.dtype == torch.bfloat16 and not IS_HIP


def compiles_shapes(x: Tensor) -> bool:
    """Whether a product with ``x`` is oneDNN's, which compiles a kernel for each new shape: on CPUs in bf16 and fp16,
    and in fp32 where its products may be less exact (``--float32-matmul-precision``)."""
    if x.device.type != "cpu":
        return False
    less_exact = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
    return x.dtype in (torch.bfloat16, torch.float16) or less_exact


def _starts_between(x: Tensor) -> bool:
    """Whether the first element lies between two multiples of the alignment."""
    return x.device.type != "meta" and x.data_ptr() % _ALIGNMENT != 0


def say_loop(x: Tensor, weight: Tensor) -> None:
    """Says that a GPU walks through the experts. On CPUs the loop is as good."""
    if x.device.type == "cuda":
        wants = "it wants bf16 and widths that are multiples of 8 elements"
        takes_not = f"does not take these tensors (rows in {x.dtype}, matrices in {weight.dtype}); {wants}"
        say_fallback(
            "experts",
            f"grouped_mm {'is not tried on ROCm' if IS_HIP else takes_not}",
            "one product an expert, several times slower",
        )


@dataclass(frozen=True)
class Runs:
    """Whose rows are whose: each expert has a run of them, one after the other.

    Attributes:
        known: rows of each expert, as far as the host knows them: else int64 [E] on the device of the rows.
        ends: int32 [E], the row at which each run ends, on the device of the rows.
    """

    known: tuple[int, ...] | Tensor
    ends: Tensor

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Rows of each expert, for who walks through them; waits for the device where the host does not know them."""
        return tuple(self.known.tolist()) if isinstance(self.known, Tensor) else self.known

    def parts(self) -> Iterator[slice]:
        """The rows of each expert, for who walks through them."""
        start = 0
        for count in self.counts:
            yield slice(start, start + count)
            start += count

    def experts(self, rows: int) -> Tensor:
        """int64 [rows], whose each of the ``rows`` is."""
        row = torch.arange(rows, device=self.ends.device, dtype=torch.int32)
        # Rows beyond the last run belong to nobody, and no product reads them.
        return torch.searchsorted(self.ends, row, right=True).clamp_max_(len(self.ends) - 1)


def make_runs(counts: tuple[int, ...] | Tensor, device: torch.device) -> Runs:
    """The runs of ``counts``, for all products that share them; nobody waits for ``device``."""
    if isinstance(counts, Tensor):
        return Runs(counts, counts.cumsum(0, dtype=torch.int32))
    return Runs(counts, upload(torch.tensor(list(accumulate(counts)), dtype=torch.int32), device))


def grouped_linear(x: Tensor, weight: Tensor, runs: Runs) -> Tensor:
    """Each expert's own linear map on its own rows: ``y_n = x_n W_e^T``. Not differentiable: its gradients are
    :func:`grouped_input_gradient` and :func:`grouped_weight_gradient`.

    Args:
        x: [N, in], rows sorted by expert.
        weight: [E, out, in].

    Returns:
        [N, out].
    """
    if takes_grouped_mm(x, weight):
        return _grouped(x, weight.transpose(1, 2), runs)
    if len(x):
        say_loop(x, weight)
    return _walk(x, weight.transpose(1, 2), runs)


def grouped_input_gradient(grad: Tensor, weight: Tensor, runs: Runs) -> Tensor:
    """The gradient [N, in] of :func:`grouped_linear`'s rows, from that of its result, [N, out]."""
    grad = _aligned(grad)
    if takes_grouped_mm(grad, weight):
        return _grouped(grad, weight, runs)
    return _walk(grad, weight, runs)


def grouped_weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, runs: Runs) -> Tensor:
    """The gradient of :func:`grouped_linear`'s ``weight``, written expert by expert into one tensor; that of an expert
    without rows is zero."""
    grad = _aligned(grad)
    if takes_grouped_mm(x, weight):
        return _grouped(grad.t(), x, runs)
    out, pads = torch.empty_like(weight), compiles_shapes(x)
    for result, grad_rows, rows in zip(out, grad.split(runs.counts), x.split(runs.counts), strict=True):
        if pads:
            grad_rows, rows = _with_empty_rows(grad_rows), _with_empty_rows(rows)
        torch.mm(grad_rows.t(), rows, out=result)
    return out


def _padded(rows: int) -> int:
    """``rows`` or the next number that comes again and again: of each octave there are 16, so that less than 1/16 is
    added, and kernels for all that a layer meets stay in oneDNN's cache of 1,024."""
    unit = 1 << max(rows.bit_length() - _FINE, 0)
    return -(-rows // unit) * unit


def _with_empty_rows(x: Tensor) -> Tensor:
    """``x`` [n, width] and rows of zeros up to the padded number."""
    more = _padded(len(x)) - len(x)
    return F.pad(x, (0, 0, 0, more)) if more else x


def _walk(x: Tensor, matrices: Tensor, runs: Runs) -> Tensor:
    """Each expert's rows of ``x`` [N, k] times its own of ``matrices`` [E, k, m]: [N, m]."""
    out, pads = x.new_empty(len(x), matrices.shape[2]), compiles_shapes(x)
    for matrix, rows in zip(matrices, runs.parts(), strict=True):
        count = rows.stop - rows.start
        more = _padded(count) if pads else count
        if rows.start + more <= len(x):  # what is too much belongs to the next experts, who write it again
            wider = slice(rows.start, rows.start + more)
            torch.mm(x[wider], matrix, out=out[wider])
        elif more <= rows.stop:
            out[rows] = torch.mm(x[rows.stop - more : rows.stop], matrix)[more - count :]
        else:
            torch.mm(x[rows], matrix, out=out[rows])
    return out


def _aligned(grad: Tensor) -> Tensor:
    grad = grad.contiguous()
    return grad.clone() if _starts_between(grad) else grad


def _grouped(a: Tensor, b: Tensor, runs: Runs) -> Tensor:
    assert _GROUPED is not None
    return _GROUPED(a, b, offs=runs.ends)

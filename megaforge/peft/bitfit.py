"""``--peft bitfit``: the biases alone are trained (Ben Zaken et al., arXiv 2106.10199)."""

from __future__ import annotations

from torch import nn

from megaforge.errors import UserError
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layers import is_whole
from megaforge.parallel.param_spec import spec_of
from megaforge.peft.freeze import freeze, thaw


def bitfit(model: nn.Module, ctx: ParallelContext) -> None:
    """The converter. Biases are what is added to a channel: of projections, norms, convolutions, and RWKV-7's w0, a0
    and v0.

    Raises:
        UserError: a whole model has none.
    """
    found = 0
    for path, parameter in model.named_parameters():
        freeze(parameter)
        name = path.rpartition(".")[2]
        if (name.endswith("bias") or name in ("w0", "a0", "v0")) and spec_of(parameter).role == "vector":
            thaw(parameter)
            found += 1
    if not found and is_whole(model):
        raise UserError("--peft bitfit: this model has no biases (--add-bias-linear and --add-qkv-bias make some)")

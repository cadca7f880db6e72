"""A checkpoint of ``--peft qlora`` as one of weights: what products see of the matrices that it keeps in 4 bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megaforge.checkpoint.sources import TensorInfo, TensorSource
from megaforge.config.model_config import ModelConfig
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.param_spec import Box
from megaforge.peft.qlora import FourBitMatrix, four_bit_matrices


class WideSource(TensorSource):
    """``source`` with fp32 weights in the place of codes."""

    def __init__(self, source: TensorSource, cfg: ModelConfig) -> None:
        model = HybridModel(make_layer_context(cfg, ParallelContext.single("meta")))
        self._coded = {one.coding.spec.name: one for one in four_bit_matrices(model)}
        self._source = source
        self.path, self.step, self.metric, self.encrypted = source.path, source.step, source.metric, source.encrypted
        self.meta = source.meta
        wide = {name: TensorInfo(torch.float32, one.coding.spec.shape) for name, one in self._coded.items()}
        self.tensors: Mapping[str, TensorInfo] = {**source.tensors, **wide}

    def read(self, key: str, box: Box | None = None) -> Tensor:
        if key not in self._coded:
            return self._source.read(key, box)
        matrix = FourBitMatrix(self._coded[key].coding, ParallelContext.single(), torch.device("cpu"))
        prefix = key.removesuffix("weight") + "four_bits."
        for name in matrix.names:
            matrix.part(name).copy_(self._source.read(prefix + name))
        whole = matrix.values(torch.float32)
        return whole if box is None else whole[tuple(slice(a, b) for a, b in box)]


def widened(source: TensorSource, cfg: ModelConfig) -> TensorSource:
    """``source``, with weights where a method of ``--peft`` has codes in their place."""
    return WideSource(source, cfg) if cfg.replaces_weights else source

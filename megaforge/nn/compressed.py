"""Activations in 8 bits between the forward and the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

BLOCK = 64  # neighbouring numbers of a token that share a scale
_MOST = 127


class _Codes:
    """A tensor in 8 bits: ``codes`` int8 [..., n / 64, 64], ``scales`` [..., n / 64, 1] in fp32 (fp64 for fp64)."""

    __slots__ = ("codes", "scales", "shape", "dtype", "__weakref__")

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        blocks = tensor.detach().unflatten(-1, (-1, BLOCK))
        precise = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        largest = torch.linalg.vector_norm(blocks, torch.inf, -1, keepdim=True).to(precise)
        self.scales = largest / _MOST
        # Rows of zeros have no scale, and those that are smaller than a scale can say become zeros.
        inverse = torch.where(self.scales > 0, 1 / self.scales, 0).nan_to_num_(posinf=0.0)
        self.codes = (blocks * inverse).round_().clamp_(-_MOST, _MOST).to(torch.int8)

    def restored(self) -> Tensor:
        return (self.codes * self.scales).to(self.dtype).reshape(self.shape)


class CompressedActivations(saved_tensors_hooks):
    """While active, what autograd keeps for the backward pass is kept in 8 bits a number: a sign and 127 steps up to
    the largest of 64 neighbouring numbers of one token, so that no token depends on another, or on how many there are.

    Where infinity or no number is among 64, all of them come back as no number: an overflow stays one.

    Left as they are: weights, whole numbers and truth values, and tensors whose last dimension is not a multiple of 64
    (statistics of tokens). A tensor that several operations keep is kept once. Parts that are computed again
    (``--recompute``) keep only their inputs so.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        own = {weight.untyped_storage()._cdata for weight in weights}
        known: dict[object, tuple[StorageWeakRef, weakref.ref[_Codes]]] = {}

        def pack(tensor: Tensor) -> Tensor | _Codes:
            storage = tensor.untyped_storage()
            if storage._cdata in own or not _is_coded(tensor):
                return tensor
            place = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
            key = (storage._cdata, *place)
            if key in known:  # the reference keeps the address from being another storage's
                codes = known[key][1]()
                if codes is not None and not known[key][0].expired():
                    return codes
            codes = _Codes(tensor)
            known[key] = StorageWeakRef(storage), weakref.ref(codes)
            return codes

        def unpack(packed: Tensor | _Codes) -> Tensor:
            return packed.restored() if isinstance(packed, _Codes) else packed

        super().__init__(pack, unpack)


def _is_coded(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() > 1 and tensor.numel() > 0 and tensor.shape[-1] % BLOCK == 0

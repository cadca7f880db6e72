"""``--peft state``: the state that each RWKV-7 layer begins a document with is trained, and nothing else (the state
tuning of RWKV-LM). It adds no work to generation: a prompt begins with other numbers than zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megaforge.errors import UserError
from megaforge.kernels.wkv7.backend import WKV7
from megaforge.nn.rwkv7 import RWKV7TimeMix
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init_rules import Constant
from megaforge.parallel.layers import is_whole
from megaforge.parallel.param_spec import ParamSpec, make_parameter, spec_of
from megaforge.peft.freeze import freeze_all


class InitialState(nn.Module):
    """What a layer begins with, as a child of it: ``state`` [H/tp, N (value), N (key)], zero at first."""

    state: nn.Parameter

    def __init__(self, mixer: RWKV7TimeMix, ctx: ParallelContext) -> None:
        super().__init__()
        heads, size = spec_of(mixer.r_k).shape
        spec = ParamSpec(
            "", (heads, size, size), Constant(0.0), shard_dim=0, weight_decay=False, keep_fp32=True, kind="adapter"
        )
        place = mixer.r_k.device if mixer.r_k.is_meta else None
        self.state = make_parameter(spec, ctx, mixer.r_k.dtype, place)


class TunedWKV7:
    """An implementation of WKV-7 (arguments and results as :func:`megaforge.kernels.wkv7.wkv7`) whose documents begin
    with a trained state."""

    def __init__(self, function: WKV7, initial: InitialState) -> None:
        self.function, self.initial = function, initial

    def __call__(
        self,
        r: Tensor,
        log_w: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        memory: Tensor | None,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        begin = self.initial.state
        if starts is None:  # nothing begins where the sequences have begun
            first = begin.expand(r.shape[1], *begin.shape).contiguous() if memory is None else memory
            return self.function(r, log_w, k, v, a, b, first, None)
        documents = SideBySide(starts)
        states = begin.expand(documents.count, *begin.shape)
        if memory is not None:  # a span of the sequences: the documents of its beginning may go on
            goes_on = ~starts[0][:, None, None, None]
            states = states.index_copy(0, documents.first, torch.where(goes_on, memory.to(begin.dtype), begin))
        inputs = (documents.apart(x) for x in (r, log_w, k, v, a, b))
        y, final = self.function(*inputs, states.contiguous(), None)
        return documents.together(y), final[documents.last]


class SideBySide:
    """The documents of packed sequences as sequences of their own, each behind the other's end filled with zeros: a
    zero leaves WKV's state as it is.

    Attributes:
        count: documents, or ends of those that began before.
        first: int64 [b], the first one of each sequence.
        last: int64 [b], the last one of each sequence.
    """

    def __init__(self, starts_SB: Tensor) -> None:
        """``starts_SB``: bool [s, b], true where a document begins; at position 0 something does in any case."""
        self.shape = starts_SB.shape
        cut = starts_SB.t().clone()
        cut[:, 0] = True
        flat = cut.reshape(-1)
        firsts = flat.nonzero().view(-1)
        lengths = torch.diff(firsts, append=firsts.new_tensor([len(flat)]))
        self.count = len(firsts)
        places = torch.arange(int(lengths.max()), device=flat.device)[:, None]
        self._used = places < lengths
        self._taken = torch.where(self._used, firsts + places, 0)
        self._document = flat.long().cumsum(0) - 1
        self._place = torch.arange(len(flat), device=flat.device) - firsts[self._document]
        by_sequence = self._document.view(self.shape[1], self.shape[0])
        self.first, self.last = by_sequence[:, 0], by_sequence[:, -1]

    def apart(self, x: Tensor) -> Tensor:
        """[s, b, ...] -> [longest, documents, ...]."""
        rows = x.transpose(0, 1).flatten(0, 1)[self._taken]
        return rows * self._used.view(*self._used.shape, *(1,) * (x.dim() - 2))

    def together(self, x: Tensor) -> Tensor:
        """The way back."""
        length, batch = self.shape
        return x[self._place, self._document].view(batch, length, *x.shape[2:]).transpose(0, 1)


def state_tuning(model: nn.Module, ctx: ParallelContext) -> None:
    """The converter.

    Raises:
        UserError: a whole model has no RWKV-7 layer.
    """
    freeze_all(model)
    mixers = [module for module in model.modules() if isinstance(module, RWKV7TimeMix)]
    if not mixers and is_whole(model):
        raise UserError("--peft state: this model has no RWKV-7 layer, whose state it trains; use --peft lora")
    for mixer in mixers:
        initial = InitialState(mixer, ctx)
        mixer.add_module("initial", initial)
        mixer.wkv7 = TunedWKV7(mixer.wkv7, initial)

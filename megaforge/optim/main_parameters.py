"""The weights that training updates and checkpoints keep: fp32 masters of 16-bit parameters, and shards under ZeRO."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megaforge.parallel.flat_shard import Entry, FlatShard, flat_boxes, optimizer_shard
from megaforge.parallel.linear_op import Quantized, quantizer_of
from megaforge.parallel.param_spec import ParamSpec, main_grad_of, named_specs
from megaforge.parallel.zero import ShardedParameters


class MainParameter:
    """One trained parameter as an update rule sees it.

    Attributes:
        spec: its declaration.
        parameter: what the model computes with.
        master: what is updated, in fp32 (fp64 for fp64 models): the parameter itself where it is that wide. In the
            parameter's local shape; under ZeRO 1-d, the range of the flattened parameter that this rank holds.
        state: what the rule keeps of it, each like ``master``, by name.
    """

    def __init__(self, spec: ParamSpec, parameter: nn.Parameter, shards: ShardedParameters | None) -> None:
        self.spec, self.parameter = spec, parameter
        self._held = parameter.detach() if shards is None else shards.own(parameter)
        if self._held.dtype in (torch.bfloat16, torch.float16):
            self.master = nn.Parameter(self._held.float())
        else:
            self.master = parameter if shards is None else nn.Parameter(self._held)
        self.state: dict[str, Tensor] = {}

    @property
    def grad(self) -> Tensor:
        """The reduced gradient of ``master``, in its shape and type."""
        return main_grad_of(self.parameter)

    def in_shape(self, tensor: Tensor) -> Tensor:
        """``master``, ``grad`` or a state of a parameter that this rank holds whole, in the local shape (a view)."""
        return tensor.view(self.parameter.shape)

    def scale_rows(self, factors: Tensor) -> None:
        """Multiplies row i of the local parameter by ``factors[i]``, in the master, as far as this rank holds it."""
        share, flat = optimizer_shard(self.parameter), self.master.detach().view(-1)
        start = share.start if isinstance(share, FlatShard) else 0
        factors = factors.to(flat.device, flat.dtype)
        for at, box in flat_boxes((len(factors), self.parameter.numel() // len(factors)), start, start + len(flat)):
            (first, last), (left, right) = box
            piece = flat[at - start : at - start + (last - first) * (right - left)].view(last - first, right - left)
            piece.mul_(factors[first:last, None])

    def quantized(self) -> Quantized:
        """Of a matrix that is declared quantized: what products see of ``master``, and the largest magnitudes there;
        each like ``master``, or 0-d."""
        seen: Quantized = quantizer_of(self.parameter)(self.parameter.detach())
        return Quantized(*(self._part(tensor) for tensor in seen))

    def _part(self, tensor: Tensor) -> Tensor:
        """What ``master`` has of something that broadcasts to the parameter."""
        if tensor.numel() == 1:
            return tensor.view(())
        share = optimizer_shard(self.parameter)
        tensor = tensor.expand(self.parameter.shape)
        return tensor.reshape(-1)[share.start : share.stop] if isinstance(share, FlatShard) else tensor

    def written_back(self) -> tuple[Tensor, Tensor] | None:
        """What the model computes with, or this rank's share of it, and the master to round into it; None where they
        are one, or where there is nothing of it here."""
        if self.master.dtype == self._held.dtype or self._held.numel() == 0:
            return None
        return self._held, self.master.detach()


class MainParameters:
    """Every parameter of a model's local part; what loads weights needs this, and no optimizer.

    Attributes:
        trained: those that are updated; a frozen one is its own master.
        shards: how parameters are sharded (ZeRO), or None.
    """

    def __init__(self, model: nn.Module, shards: ShardedParameters | None = None) -> None:
        self.shards = shards
        self._parameters = list(named_specs(model))
        self.trained = [MainParameter(spec, p, shards) for spec, p in self._parameters if p.requires_grad]

    def entries(self) -> list[Entry]:
        """(global name, declaration, local master) of every parameter, to be saved, or loaded into in place."""
        masters = {id(main.parameter): main.master for main in self.trained}
        return [
            (spec.name, optimizer_shard(parameter), masters.get(id(parameter), parameter).detach())
            for spec, parameter in self._parameters
        ]

    @torch.no_grad()
    def write_back(self, some: Iterable[MainParameter] | None = None) -> None:
        """Rounds the masters of ``some``, or of all, into the model, where quantizers renew their scales. Under ZeRO a
        rank writes what it holds: the shards are gathered afterwards."""
        written = self.trained if some is None else tuple(some)
        for main in written:
            if main.spec.quantized:
                quantizer_of(main.parameter).forget()
        pairs = [main.written_back() for main in written]
        if moved := [pair for pair in pairs if pair is not None]:
            # One launch on a GPU for many parameters.
            torch._foreach_copy_([model for model, _ in moved], [master for _, master in moved])

    def after_load(self) -> None:
        """Brings freshly loaded masters into the model, on all ranks. Collective under ZeRO."""
        self.write_back()
        if self.shards is not None:
            self.shards.all_gather_parameters()

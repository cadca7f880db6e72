"""Contexts as the model sees them, by the engine's own forward pass, at any layout; told to every rank that plays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.data.loader import Batch
from megaforge.models.hybrid import HybridModel, ModelOutput
from megaforge.models.pipeline_shape import PipelinePlan
from megaforge.models.stages import ModelChunks
from megaforge.parallel.agree import reduced, tell_stages
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.mappings import reduce_from_tensor_parallel
from megaforge.reasoning.agent.episode import Context, Seen, pack_contexts
from megaforge.reasoning.agent.heads import AgentHeads, heads_of
from megaforge.reasoning.memory.agent_memory import as_bytes
from megaforge.reasoning.packing import as_batch, rounded


class Observer(Protocol):
    """What runs the model forward: the engine of training, or a model that was restored."""

    @property
    def ctx(self) -> ParallelContext: ...

    @property
    def model(self) -> HybridModel | ModelChunks: ...

    @property
    def plan(self) -> PipelinePlan: ...

    def observe(self, batches: Sequence[Batch], look: Callable[[ModelOutput, Batch], Any]) -> list[Any]:
        """What ``look`` says of each micro-batch, in order, where the last stage is; elsewhere nothing."""


class Reader:
    """
    Attributes:
        heads: copies of the model's in host memory, on every rank; :meth:`share_heads` brings them up to date.
    """

    def __init__(self, engine: Observer, cfg: ModelConfig, length: int, rows: int) -> None:
        """
        Args:
            length: tokens of a row of contexts.
            rows: of a micro-batch, at most.
        """
        self.engine, self.ctx = engine, engine.ctx
        self.own = heads_of(engine.model)
        self.heads = AgentHeads(cfg, ParallelContext.single(), engine.model.chunks[0].dtype).requires_grad_(False)
        self._length, self._rows = length, rows
        self._stride, self._hidden = cfg.memory_stride, cfg.hidden_size
        schedule = engine.plan.schedule
        self.last_rank = schedule.rank_of(schedule.num_stages - 1)

    def share_heads(self) -> None:
        """Collective over pp and tp."""
        source = None if self.own is None else list(self.own.parameters())
        for number, copy in enumerate(self.heads.parameters()):
            value = copy.to(self.ctx.device, copy=True) if source is None else source[number].detach().clone()
            tell_stages(self.ctx, value, self.last_rank)
            copy.copy_(value)

    def digest(self) -> str:
        """SHA-256 of what makes summaries and keys, as :meth:`share_heads` has found it."""
        found = hashlib.sha256()
        for name, parameter in self.heads.summariser.named_parameters():
            found.update(as_bytes(name, parameter))
        return found.hexdigest()

    def read(self, contexts: Sequence[Context]) -> dict[Context, Seen] | None:
        """What the model makes of contexts; None: no rank has any. Collective.

        Raises:
            UserError: one is longer than a row.
        """
        told = self._told(contexts, self._look, self._hidden + 1)
        if told is None:
            return None
        found, slots = told
        right = found[..., -1].round().long()
        hidden = found[..., :-1].contiguous()
        vectors = self.heads.summariser.down(hidden)
        seen = {}
        for context, (row, first) in slots.items():
            begin, end = context.chunk
            after = first + 1 + -(-(end - begin) // self._stride)
            answer = len(context.tokens) - 1 - context.last
            summaries = vectors[row, first + 1 : after]
            seen[context] = Seen(hidden[row, first], vectors[row, first], summaries, int(right[row, first]) == answer)
        return seen

    def following(self, contexts: Sequence[Context]) -> dict[Context, int] | None:
        """The most likely token behind each context; None: no rank has any. Collective.

        Raises:
            UserError: one is longer than a row.
        """
        told = self._told(contexts, self._likeliest, 1)
        if told is None:
            return None
        found, slots = told
        return {context: int(found[row, first, 0]) for context, (row, first) in slots.items()}

    def _told(
        self, contexts: Sequence[Context], look: Callable[[ModelOutput, Batch], Tensor], width: int
    ) -> tuple[Tensor, dict[Context, tuple[int, int]]] | None:
        """What ``look`` says, ``width`` numbers a slot; and of each context its row and its first slot."""
        packed = pack_contexts(contexts, self._length)
        # Experts' ranks are those of several replicas.
        wanted = reduced(self.ctx, packed.rows if contexts else 0, dist.ReduceOp.MAX)
        if not wanted:
            return None
        rows = min(rounded(wanted), self._rows)
        count = self.engine.plan.at_least(-(-wanted // rows))
        batch, slots = self._marked(as_batch(packed, rows * count, self._length), packed.places)
        return self._observed(batch, rows, look, width), slots

    def _marked(
        self, batch: Batch, places: dict[Context, tuple[int, int]]
    ) -> tuple[Batch, dict[Context, tuple[int, int]]]:
        """``batch`` with the slot that each token's hidden vector goes to, and its weight there; and of each context
        its row and its first slot, behind which are those of its chunk's strides. Slot 0 takes what nobody wants."""
        shape = batch.tokens.shape
        slot, right = np.zeros((2, *shape), np.int64)
        weight, used = np.zeros(shape), [1] * shape[0]
        slots: dict[Context, tuple[int, int]] = {}
        for context, (row, start) in places.items():
            first = used[row]
            slots[context] = row, first
            right[row, start + context.last : start + len(context.tokens) - 1] = first
            begin, end = context.chunk
            for number, place in enumerate(range(begin, end, self._stride), first + 1):
                size = min(self._stride, end - place)
                slot[row, start + place : start + place + size] = number
                weight[row, start + place : start + place + size] = 1 / size
            slot[row, start + context.last], weight[row, start + context.last] = first, 1.0
            used[row] = first + 1 + -(-(end - begin) // self._stride)
        extras = {"slot": torch.from_numpy(slot), "right": torch.from_numpy(right), "weight": torch.from_numpy(weight)}
        extras["slots"] = torch.zeros(shape[0], max(used))
        return replace(batch, extras=extras), slots

    def _observed(self, batch: Batch, rows: int, look: Callable[[ModelOutput, Batch], Tensor], width: int) -> Tensor:
        """[rows of all micro-batches, slots, width], on every rank."""
        names = ("tokens", "labels", "loss_mask", "document_start", "used")
        pieces = [
            replace(
                batch,
                **{name: getattr(batch, name)[row : row + rows] for name in names},
                extras={name: x[row : row + rows] for name, x in batch.extras.items()},
            )
            for row in range(0, len(batch.tokens), rows)
        ]
        told = self.engine.observe(pieces, look)
        shape = (len(batch.tokens), batch.extras["slots"].shape[1], width)
        wide = self.heads.policy.weight.dtype
        found = torch.cat(told).to(wide) if told else torch.empty(shape, dtype=wide, device=self.ctx.device)
        tell_stages(self.ctx, found, self.last_rank)
        return found.cpu()

    def _likeliest(self, output: ModelOutput, batch: Batch) -> Tensor:
        """The token that scores highest behind what is in a slot."""
        assert output.head_input is not None
        hidden = self._look(output, batch)[..., :-1].to(output.head_input[1].dtype)
        return output.head_input[0].likeliest(hidden)[..., None].double()  # exact for every vocabulary

    def _look(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Hidden vectors, and how many labels scored highest."""
        assert output.head_input is not None and output.info is not None
        head, x = output.head_input
        hidden = head.region.gather(x)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        rows, slots = batch.extras["slots"].shape
        first = torch.arange(rows)[:, None] * slots

        def local(name: str, offset: Tensor | None = None) -> Tensor:
            whole = batch.extras[name] if offset is None else batch.extras[name] + offset
            return output.info.local(whole).t().to(x.device)  # type: ignore[union-attr]

        sums = hidden.new_zeros(rows * slots, hidden.shape[-1] + 1)
        weighted = hidden * local("weight").to(hidden.dtype)[..., None]
        sums[:, :-1].index_add_(0, local("slot", first).flatten(), weighted.flatten(0, 1))
        sums[:, -1].index_add_(0, local("right", first).flatten(), output.correct_SB.to(sums.dtype).flatten())
        return reduce_from_tensor_parallel(sums, self.ctx.cp).view(rows, slots, -1)

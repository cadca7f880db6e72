"""What the heads say of decisions that were made: in the step that learns from them, and in the pass before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megaforge.data.loader import Batch
from megaforge.models.hybrid import ModelOutput
from megaforge.parallel.agree import tell_stages
from megaforge.parallel.mappings import reduce_from_tensor_parallel, scale_gradient
from megaforge.reasoning.agent.heads import AgentHeads, Opinion
from megaforge.reasoning.agent.reader import Reader
from megaforge.reasoning.reference import has_adapters, without_adapters


class Scores(NamedTuple):
    """Of an episode's decisions: the log-probability of what was done, the reference's, and the value."""

    old: tuple[float, ...]
    reference: tuple[float, ...]
    value: tuple[float, ...]


def decisions(heads: AgentHeads, output: ModelOutput, batch: Batch) -> tuple[Opinion, Tensor, Tensor]:
    """What the heads say of a micro-batch's decisions [rows, n], the actions, and which of them this rank has the token
    of. Each rank of tp computes all of it; the stream's gradient is summed over them."""
    assert output.head_input is not None and output.info is not None
    head, x = output.head_input
    hidden = scale_gradient(head.region.enter(x), 1 / head.ctx.tp.size)
    extras = {name: batch.extras[name].to(hidden.device) for name in ("place", "action", "flags", "memory")}
    places = output.info.positions_S
    local = places.new_full((batch.tokens.shape[1] + 1,), -1)  # the first is of what is no decision
    local[1 + places] = torch.arange(len(places), device=places.device)
    own = local[extras["place"]]
    rows = torch.arange(len(own), device=own.device)[:, None]
    taken = hidden[own.clamp(min=0), rows]
    return heads.opinion(taken, extras["flags"], extras["memory"]), extras["action"], own >= 0


def scored(reader: Reader, batches: Sequence[Batch]) -> list[Scores]:
    """Of each episode of micro-batches, in order, by the forward pass that is trained, without gradients; the
    reference's by that of the model without adapters. Collective."""
    model, heads, ctx = reader.engine.model, reader.own, reader.ctx

    def chosen(output: ModelOutput, batch: Batch) -> Tensor:
        """[3, rows, n], on every rank of cp."""
        assert heads is not None
        opinion, action, here = decisions(heads, output, batch)
        two = [x.gather(-1, action[..., None]).squeeze(-1) for x in (opinion.log_probs, opinion.reference)]
        return reduce_from_tensor_parallel(torch.stack([*two, opinion.value]).masked_fill(~here, 0), ctx.cp)

    told = reader.engine.observe(batches, chosen)
    if has_adapters(model, ctx):
        with without_adapters(model):
            plain = reader.engine.observe(batches, chosen)
        told = [torch.stack([with_[0], without[1], with_[2]]) for with_, without in zip(told, plain, strict=True)]
    shape = (len(batches), 3, *batches[0].extras["place"].shape)
    wide = reader.heads.policy.weight.dtype
    found = torch.stack(told) if told else torch.empty(shape, dtype=wide, device=ctx.device)
    tell_stages(ctx, found, reader.last_rank)
    return [one for each in zip(found.cpu(), batches, strict=True) for one in _by_episode(*each)]


def _by_episode(found: Tensor, batch: Batch) -> Iterator[Scores]:
    """[3, rows, n] of decisions as they were dealt to rows, back to their episodes."""
    there = batch.extras["place"] > 0
    episode, number = batch.extras["episode"][there], batch.extras["number"][there]
    order = torch.argsort(episode * (int(number.max()) + 1) + number)
    numbers = found[:, there][:, order]
    for own in numbers.split(episode.bincount().tolist(), 1):
        yield Scores(*(tuple(row) for row in own.tolist()))

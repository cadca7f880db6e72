"""Terms that a run may add to its loss: smoothed labels, and the contrast of sequences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from megaforge.config.config import Config
from megaforge.models.hybrid import ModelOutput
from megaforge.nn.head import OutputHead
from megaforge.nn.losses import LossTerm
from megaforge.parallel.mappings import reduce_from_tensor_parallel

Term = Callable[[ModelOutput], LossTerm]


def label_smoothing(config: Config) -> Term:
    """``--label-smoothing E`` (Szegedy et al., arXiv 1512.00567, as torch's ``cross_entropy`` has it): the target is
    1 - E of the label and E of the uniform distribution. The term is E times what the latter's cross-entropy has beyond
    the label's; a mean over labels."""
    weight = config.regularization.label_smoothing

    def term(output: ModelOutput) -> LossTerm:
        head, x = _head_input(output)
        assert output.labels_BS is not None
        beyond = head.uniform_beyond_label(x, output.labels_BS)
        return LossTerm((beyond * output.mask_SB).sum(), "labels", weight)

    return term


def contrastive(config: Config) -> Term:
    """``--contrastive-weight``: InfoNCE (van den Oord et al., arXiv 1807.03748) of a micro-batch's sequences, a mean
    over sequences and both directions.

    The states that the head is given are averaged over the tokens that count of each half of a sequence; the first
    half's mean should be nearest, by cosine, to its own second half's. Sequences with an empty half are left out.
    """
    flags = config.regularization

    def term(output: ModelOutput) -> LossTerm:
        head, x = _head_input(output)
        sums, counts = _half_sums(output, head, x)
        loss = info_nce(sums, counts, flags.contrastive_temperature)
        ctx = head.ctx
        # Every rank of tp computes the whole of it, and entering the region adds up their gradients.
        loss = reduce_from_tensor_parallel(loss / ctx.tp.size, ctx.tp)
        # Every rank of cp does too, each with gradients of its own tokens; their values are added up.
        return LossTerm(loss + (loss / ctx.cp.size - loss).detach(), "sequences", flags.contrastive_weight)

    return term


def info_nce(sums_2BH: Tensor, counts_2B: Tensor, temperature: float) -> Tensor:
    """The sum over sequences of their InfoNCE losses.

    Args:
        sums_2BH: of the states of both halves of each sequence.
        counts_2B: how many states these were.
    """
    means = sums_2BH / counts_2B.clamp(min=1e-6).unsqueeze(-1)
    near = F.normalize(means[0], dim=-1) @ F.normalize(means[1], dim=-1).t() / temperature
    there = (counts_2B > 0).all(0)
    near = near.masked_fill(~(there[:, None] & there[None, :]), -1e9)
    own = torch.arange(len(near), device=near.device)
    both = [F.cross_entropy(side, own, reduction="none") for side in (near, near.t())]
    return (torch.stack(both).mean(0) * there).sum()


def _half_sums(output: ModelOutput, head: OutputHead, x: Tensor) -> tuple[Tensor, Tensor]:
    """[2, b, h] and [2, b]: sums over all tokens that count of each half, and how many they are."""
    assert output.info is not None
    hidden, mask = head.region.enter(x), output.mask_SB
    wide = torch.promote_types(hidden.dtype, torch.float32)
    whole = output.info.all_document_ids_BS.shape[1]
    second_BS = (torch.arange(whole, device=mask.device) >= whole // 2).expand(mask.shape[1], whole)
    second = output.info.local(second_BS).t().to(mask.dtype)
    weights = torch.stack([mask * (1 - second), mask * second]).to(wide)
    sums = torch.einsum("xsb,sbh->xbh", weights, hidden.to(wide))
    cp = head.ctx.cp
    return reduce_from_tensor_parallel(sums, cp), reduce_from_tensor_parallel(weights.sum(1), cp)


def _head_input(output: ModelOutput) -> tuple[OutputHead, Tensor]:
    if output.head_input is None:
        raise ValueError("this pipeline stage has no head")
    return output.head_input

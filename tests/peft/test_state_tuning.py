"""State tuning: each document begins with the trained state, packed or alone, at every layout; nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megaforge.errors import UserError
from megaforge.kernels.wkv7 import wkv7, wkv7_recurrent
from megaforge.parallel.context import ParallelContext
from megaforge.peft.state_tuning import SideBySide
from tests.nn.support import perturb
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, trainer_of
from tests.peft.test_lora import MODEL, SIZES, small_model, train
from tests.training.tiny import VOCAB, arguments, write_dataset

RUN = ("--train-iters", "2", "--fp64", "--lr", "1e-2", "--micro-batch-size", "1", "--global-batch-size", "4")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


def flags(prefix: str, *more: str) -> list[str]:
    return arguments(prefix, *MODEL, *SIZES, *RUN, "--peft", "state", *more)


def test_the_layout_changes_nothing(ranks: RankPool, prefix: str) -> None:
    one = train(flags(prefix))
    assert set(one["gradients"]) == {"layers.0.mixer.initial.state"}
    for layout in (("--tp", "2", "--sp", "--recompute", "selective"), ("--pp", "2"), ("--ep", "2", "--zero", "2")):
        compare(ranks.run(2, train, flags(prefix, *layout)), one, 1e-10)


def tuned(prefix: str) -> Any:
    model = small_model(prefix, "--peft", "state")
    perturb(model, ParallelContext.single(), 0.3)
    return model


def test_packed_documents_are_those_apart_gradients_included(prefix: str) -> None:
    model = tuned(prefix)
    state = model.layers["0"].mixer.initial.state
    tokens = torch.arange(24).view(1, 24) % VOCAB
    starts = torch.zeros(1, 24, dtype=torch.bool)
    ends = (0, 1, 9, 24)  # the first has one token
    starts[0, list(ends[:-1])] = True
    model(tokens, tokens.roll(1), torch.ones(1, 24), starts).loss_sum.backward()
    packed, state.grad = state.grad.clone(), None
    losses = []
    for first, last in zip(ends, ends[1:], strict=False):
        part = slice(first, last)
        out = model(tokens[:, part], tokens.roll(1)[:, part], torch.ones(1, last - first))
        out.loss_sum.backward()
        losses.append(out.loss_sum)
    together = model(tokens, tokens.roll(1), torch.ones(1, 24), starts).loss_sum
    torch.testing.assert_close(together, torch.stack(losses).sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(packed, state.grad, rtol=1e-10, atol=1e-13)
    assert float(packed.norm()) > 1e-3


def test_spans_of_a_sequence_change_nothing(prefix: str) -> None:
    """``--sequence-checkpoint``: documents go on from one span to the next, and begin in, at and behind each."""
    tokens = torch.arange(80).view(2, 40) % VOCAB
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[0, [0, 5, 20, 32]] = starts[1, [0, 16, 17]] = True
    found = []
    for span in (None, 16):
        model = tuned(prefix)
        model.layers["0"].mixer.span = span
        loss = model(tokens, tokens.roll(1), torch.ones(2, 40), starts).loss_sum
        loss.backward()
        found.append((loss.detach(), model.layers["0"].mixer.initial.state.grad))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-13)


def test_documents_side_by_side_are_the_recurrence() -> None:
    torch.manual_seed(1)
    sizes = (7, 2, 2, 4)
    inputs = [0.5 * torch.randn(sizes, dtype=torch.float64) for _ in range(6)]
    inputs[1] = -inputs[1].abs()
    state = torch.randn(2, 4, 4, dtype=torch.float64)
    starts = torch.zeros(7, 2, dtype=torch.bool)
    starts[0], starts[3, 0], starts[4, 0], starts[6, 1] = True, True, True, True
    documents = SideBySide(starts)
    assert documents.count == 5
    begin = state.expand(5, 2, 4, 4).contiguous()
    y, final = wkv7(*(documents.apart(x) for x in inputs), begin, None)
    y, final = documents.together(y), final[documents.last]
    for row, ends in enumerate(((0, 3, 4, 7), (0, 6, 7))):
        for first, last in zip(ends, ends[1:], strict=False):
            own: list[Tensor] = [x[first:last, row : row + 1] for x in inputs]
            expected, left = wkv7_recurrent(*own, state.unsqueeze(0), None)
            torch.testing.assert_close(y[first:last, row : row + 1], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(final[row : row + 1], left, rtol=1e-10, atol=1e-12)


def test_generation_begins_with_it(prefix: str) -> None:
    """A prompt taken in at once, and token by token; and not as without."""
    model = tuned(prefix).eval()
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        whole = model.logits(tokens)
        state = model.new_state()
        steps = torch.cat([model.logits(tokens[:, place : place + 1], state=state) for place in range(8)], 1)
        torch.testing.assert_close(steps, whole, rtol=1e-9, atol=1e-11)
        model.layers["0"].mixer.initial.state.zero_()
        assert (model.logits(tokens) - whole).abs().max() > 1e-3


def test_nothing_else_changes(prefix: str) -> None:
    trainer = trainer_of(flags(prefix))
    perturb(trainer.model, trainer.ctx, 0.05)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"layers.0.mixer.initial.state"}


def test_a_model_without_such_layers_is_refused(prefix: str) -> None:
    with pytest.raises(UserError, match="--peft state: this model has no RWKV-7 layer"):
        small_model(prefix, "--hybrid-layer-pattern", "*-*-", "--peft", "state")

"""Texts beside episodes: which they are, what stands in their rows, and that their cross-entropy is that of the texts
alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megaforge.config.combined_config import CombinedLossConfig
from megaforge.data.loader import Batch
from megaforge.data.task_source import TaskWindows
from megaforge.errors import UserError
from megaforge.reasoning.texts_beside import TextsBeside
from megaforge.training.batch_sums import BatchSums
from tests.nn.support import perturb
from tests.reasoning.test_agent_parity import agent_arguments
from tests.training.tiny import make_config, make_trainer, write_dataset

ADAPTED = ("--peft", "lora", "--lora-dropout", "0", "--rl-ce-weight", "0.5")


def played(rows: int = 2) -> Batch:
    tokens = torch.ones(rows, 64, dtype=torch.long)
    extras = {"place": tokens[:, :3], "told": torch.ones(rows, 3, 2, dtype=torch.float64)}
    return Batch(tokens, tokens, torch.zeros(rows, 64), tokens > 2, extras=extras)


def opened(words: Path, *more: str) -> tuple[TextsBeside, TaskWindows]:
    config = make_config(agent_arguments(words, *ADAPTED, *more))
    beside = TextsBeside(config)
    beside.open()
    source = beside._source
    assert isinstance(source, TaskWindows) and type(source) is TaskWindows, "windows, not the numbers of episodes"
    return beside, source


@pytest.mark.parametrize("size", [2, 3, 8])
def test_texts_are_of_the_samples_wherever_they_are(words: Path, size: int) -> None:
    """Two of each group of four, of micro-batches that cut groups, too."""
    beside, source = opened(words, "--rl-ce-samples", "2", "--global-batch-size", "24")
    samples = [list(range(first, first + size)) for first in range(24, 48, size)]
    found = list[torch.Tensor]()
    for batch in beside.beside([played() for _ in samples], samples):
        assert len(batch.tokens) == {2: 4, 3: 4, 8: 6}[size], "as many rows in all"
        own = batch.used is not None and batch.used[2:].all(1)
        found += list(batch.tokens[2:][own])
        assert bool(batch.used[:2].all()) and not batch.loss_mask[2:][~own].any()
        assert not any(bool(x[2:].any()) for x in batch.extras.values()), "nothing was played there"
        assert batch.extras["told"].dtype == torch.float64 and bool(batch.extras["place"][:2].all())
        assert bool(batch.loss_mask[2:][own].any(1).all()) and not batch.loss_mask[:2].any()
    expected = []
    for text in range(12, 24):  # two of each of the groups 6 to 11
        tokens, marks = np.zeros(65, np.int64), np.zeros(65, np.bool_)
        source.fill(text, tokens, marks)
        expected.append(torch.from_numpy(tokens[:-1]))
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_the_cross_entropy_is_that_of_the_texts(words: Path) -> None:
    trainer = make_trainer(agent_arguments(words, *ADAPTED, "--rl-ce-samples", "3"))
    perturb(trainer.model, trainer.ctx, 0.05)
    batch = next(iter(trainer._loader(trainer.data, trainer.batches)))
    made = trainer.objective.experience(trainer, batch)
    sums = BatchSums(trainer.ctx, trainer.objective, trainer.engine._global_counts(made, trainer.objective))
    trainer.engine.forward(made, sums)
    trainer.engine.reduce(sums)
    sums.read()
    total = count = 0.0
    for one in made:
        texts = one.loss_mask.any(1)
        names = ("tokens", "labels", "loss_mask", "document_start")
        output = trainer.model(*(getattr(one, name)[texts] for name in names))
        total, count = total + float(output.loss_sum.detach()), count + float(one.loss_mask.sum())
    assert count > 20 and sums.means()["cross_entropy"] == pytest.approx(total / count, rel=1e-12)
    assert sums.means()["policy_ratio"] == 1, "beside texts, too"


def test_texts_are_of_data_of_their_own_or_the_error_names_them(words: Path, tmp_path: Path) -> None:
    config = make_config(agent_arguments(words, *ADAPTED))
    assert CombinedLossConfig() == CombinedLossConfig(0.0, 1, ()), "none by default"
    prefix = write_dataset(tmp_path / "text_document")
    for data, said in ((str(tmp_path / "no"), "--rl-ce-data .*no: "), ("tasks://no", "--rl-ce-data tasks://no: ")):
        with pytest.raises(UserError, match=said):
            TextsBeside(replace(config, rl=replace(config.rl, rl_ce_data=(data,)))).open()
    beside = TextsBeside(replace(config, rl=replace(config.rl, rl_ce_data=(prefix,))))
    beside.open()
    (batch,) = beside.beside([played()], [list(range(8))])
    assert bool(batch.loss_mask[2:].all()) and len(batch.tokens) == 4, "every token of a text is learnt"

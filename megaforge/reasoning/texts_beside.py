"""Texts that are learnt beside what was played (``--rl-ce-weight``): further rows of the same micro-batches, whose
labels count. Which they are follows from the numbers of the samples alone, so that no layout changes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megaforge.config.config import Config
from megaforge.data.data_source import SampleView, source_kind
from megaforge.data.loader import Batch
from megaforge.data.run_tokenizer import with_run_tokenizer
from megaforge.errors import UserError
from megaforge.models.hybrid import ModelOutput
from megaforge.nn.losses import LossTerm


class TextsBeside:
    """Of every ``--rl-group-size`` samples the first ``--rl-ce-samples`` come with a text."""

    def __init__(self, config: Config) -> None:
        flags, self._config = config.rl, config
        self._weight, self._each, self._group = flags.rl_ce_weight, flags.rl_ce_samples, flags.rl_group_size
        self._source: SampleView | None = None

    def open(self) -> None:
        """Before the first step.

        Raises:
            UserError: there are no such texts.
        """
        if not self._weight:
            return
        config, asked = self._config, self._config.rl.rl_ce_data
        data = replace(config.data, data_path=asked or config.data.data_path, data_schedule=None)
        config = replace(config, data=data, training=replace(config.training, objective="next_token"))
        try:
            self._source = source_kind(data).open(config, with_run_tokenizer(config)[1])
        except UserError as error:
            raise UserError(f"--rl-ce-data {' '.join(asked)}: {error}" if asked else str(error)) from error

    def beside(self, batches: Sequence[Batch], samples: Sequence[Sequence[int]]) -> list[Batch]:
        """Micro-batches with the texts of their ``samples``, in rows behind the others. In these rows nothing was
        played: all that the batches have in ``extras`` is zero there."""
        if self._source is None:
            return list(batches)
        rows = most_texts(len(samples[0]), self._group, self._each)
        return [self._with(batch, own, rows) for batch, own in zip(batches, samples, strict=True)]

    def counts(self, batch: Batch) -> dict[str, float]:
        """Labels of texts, where there are any."""
        return {"labels": float(batch.loss_mask.sum(dtype=torch.float64))} if self._weight else {}

    def terms(self, output: ModelOutput) -> dict[str, LossTerm]:
        """``cross_entropy``, a mean over the labels of texts, where there are any."""
        return {"cross_entropy": LossTerm(output.loss_sum, "labels", self._weight)} if self._weight else {}

    def _with(self, batch: Batch, samples: Sequence[int], rows: int) -> Batch:
        source, length = self._source, batch.tokens.shape[1]
        assert source is not None
        texts = [k // self._group * self._each + k % self._group for k in samples if k % self._group < self._each]
        tokens, marks = np.zeros((rows, length + 1), np.int64), np.zeros((rows, length + 1), np.bool_)
        counts, used = np.zeros((rows, length), np.float32), np.zeros((rows, length), np.bool_)
        for row, text in enumerate(texts):
            counts[row, : source.fill(text, tokens[row], marks[row])], used[row] = 1.0, True
            source.weigh(text, counts[row])
            if source.eod_mask_loss:
                counts[row, marks[row, 1:]] = 0.0
        marks[:, 0] = True
        more = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": counts, "document_start": marks[:, :-1]}
        joined: dict[str, Any] = {
            name: torch.cat([getattr(batch, name), torch.from_numpy(x)]) for name, x in more.items()
        }
        there = torch.ones_like(batch.document_start) if batch.used is None else batch.used
        extras = {name: torch.cat([x, x.new_zeros(rows, *x.shape[1:])]) for name, x in batch.extras.items()}
        return replace(batch, **joined, used=torch.cat([there, torch.from_numpy(used)]), extras=extras)


def most_texts(samples: int, group: int, each: int) -> int:
    """That so many samples behind each other have, wherever they begin: a group's texts are its first samples'.

    Args:
        group: samples of one.
        each: texts of one.
    """
    return samples // group * each + min(samples % group, each)

"""A tiny model of bytes and what else asking it takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megaforge.data.tokenizer import Tokenizer
from megaforge.inference.restore import TrainedModel, load_trained_model
from tests.training.tiny import dense_arguments, make_trainer, write_dataset


class Bytes(Tokenizer):
    """UTF-8 bytes; 256 ends a document."""

    type, model_path, vocab_size, eod, fingerprint = "NullTokenizer", "257", 257, 256, "bytes"

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Tokenizer`."""
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def saved_model(folder: Path, *flags: str, pattern: str = "R-*-") -> str:
    """A run's directory."""
    save, prefix = str(folder / "run"), write_dataset(folder / "d", vocab=257)
    more = ("--tokenizer-model", "256", "--fp64", "--save", save, "--train-iters", "2", "--lr", "1e-2", *flags)
    make_trainer(dense_arguments(prefix, pattern, *more)).train()
    return save


def restored(save: str, **how: Any) -> TrainedModel:
    """On the ranks that there are; those of a pool have met already."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
    with mock.patch.dict(os.environ, launched), mock.patch("megaforge.inference.restore.initialize"):
        return load_trained_model(save, device="cpu", **how)

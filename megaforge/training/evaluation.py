"""How well a trained model predicts a text or a dataset: every token once, in windows of the training length."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megaforge.config.config import Config
from megaforge.data.blend import dataset_prefix, parse_data_path, parse_split, split_ranges
from megaforge.data.indexed_dataset import IndexedDataset
from megaforge.data.manifest import read_sidecar
from megaforge.data.text.formats import TEXT_SUFFIXES, plain_suffix
from megaforge.data.text.readers import read_texts
from megaforge.data.tokenizer import Tokenizer
from megaforge.device import upload
from megaforge.errors import UserError
from megaforge.training.metrics import EvaluationMetrics
from megaforge.training.restore import TrainedModel

PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Stream:
    """Documents one after the other.

    Attributes:
        tokens: integer [n].
        document_starts: int64, ascending: where each document begins.
        text_bytes: UTF-8 bytes that the tokens stand for; None if unknown.
        documents: how many there are.
    """

    tokens: npt.NDArray[np.integer]
    document_starts: npt.NDArray[np.int64]
    text_bytes: float | None

    @property
    def documents(self) -> int:
        return len(self.document_starts)


def is_text(path: str) -> bool:
    """Whether ``--input`` names a text file rather than a dataset's prefix."""
    if os.path.exists(f"{path}.idx") or path.endswith((".bin", ".idx")):
        return False
    return os.path.exists(path) or plain_suffix(path) in TEXT_SUFFIXES


def read_text(path: str, tokenizer: Tokenizer, key: str = "text") -> Stream:
    """The tokens of a text file's documents, each followed by the tokenizer's end-of-document token where it has one.

    Raises:
        UserError: the file is missing or bad, or gives fewer than two tokens.
    """
    texts = list(read_texts(path, key))
    end = [] if tokenizer.eod is None else [tokenizer.eod]
    documents = [np.array([*ids, *end], np.int64) for ids in tokenizer.encode_batch(texts) if ids]
    if not documents:
        raise UserError(f"--input {path}: there is no text in it")
    lengths = [len(document) for document in documents]
    if sum(lengths) < 2:
        raise UserError(f"--input {path}: a text of one token holds nothing to predict; give a longer one")
    text_bytes = sum(len(text.encode()) for text in texts)
    return Stream(np.concatenate(documents), np.cumsum([0, *lengths[:-1]]), float(text_bytes))


def read_dataset(prefix: str, config: Config, part: str | None = None) -> Stream:
    """The documents of a dataset, in file order.

    Args:
        prefix: as in ``--data-path``.
        config: that of the run whose model is evaluated.
        part: train, valid or test as the run's ``--split`` cuts it, or all. None: of a dataset that the run trained
            on, its validation part; of any other, all.

    Raises:
        UserError: bad files, or a part without two tokens.
    """
    prefix = dataset_prefix(prefix)
    dataset, sidecar = IndexedDataset(prefix), read_sidecar(prefix)
    part = part or ("valid" if trained_on(prefix, config) else "all")
    starts, lengths = dataset.document_extents()
    first, stop = 0, len(starts)
    if part != "all":
        first, stop = split_ranges(parse_split(config.data.split), len(starts))[PARTS.index(part)]
    starts, lengths = starts[first:stop], lengths[first:stop]
    if int(lengths.sum()) < 2:
        raise UserError(f"the '{part}' part of {prefix} (--split {config.data.split}) holds no two tokens to evaluate")
    begin, end = int(starts[0]), int(starts[-1] + lengths[-1])
    tokens = dataset.tokens[begin:end]
    highest = int(tokens.max())
    if config.model.vocab_size is not None and highest >= config.model.vocab_size:
        raise UserError(f"{prefix} holds token id {highest}, but the model's vocabulary has {config.model.vocab_size}")
    ratio = None if sidecar is None else sidecar.bytes_per_token
    return Stream(tokens, starts[lengths > 0] - begin, None if ratio is None else ratio * len(tokens))


def trained_on(prefix: str, config: Config) -> bool:
    """Whether the run's ``--data-path`` names the dataset ``prefix``."""
    return Path(prefix).resolve() in {Path(name).resolve() for _, name in parse_data_path(config.data.data_path)}


def check_fingerprint(prefix: str, trained: TrainedModel) -> None:
    """Refuses a dataset of another tokenizer than the model's.

    Raises:
        UserError: its sidecar records another one.
    """
    sidecar, tokenizer = read_sidecar(dataset_prefix(prefix)), trained.meta.get("tokenizer")
    if sidecar is not None and tokenizer is not None and sidecar.fingerprint not in (None, tokenizer["fingerprint"]):
        raise UserError(f"{prefix} was tokenized with another tokenizer than {trained.path} was trained with")


@torch.no_grad()
def evaluate_stream(trained: TrainedModel, stream: Stream, *, seq_length: int, batch_size: int) -> EvaluationMetrics:
    """Predicts every token but the first from those before it in its window. Collective; dp ranks share the windows."""
    ctx, targets = trained.ctx, len(stream.tokens) - 1
    sums = torch.zeros(2, dtype=torch.float64, device=ctx.device)
    windows = range(0, targets, seq_length)
    batches = -(-len(windows) // batch_size)
    for number in range(ctx.dp.rank, batches, ctx.dp.size):
        chosen = windows[number * batch_size : (number + 1) * batch_size]
        *fields, document_start = _window_batch(stream, chosen, seq_length)
        output = trained.model(*(upload(field, ctx.device) for field in fields), document_start)
        sums += torch.stack([output.loss_sum.double(), output.correct.double()])
    if ctx.dp.group is not None:
        dist.all_reduce(sums, group=ctx.dp.group)
    nats, correct = sums.tolist()
    return EvaluationMetrics(int(trained.meta.get("iteration", 0)), nats, targets, round(correct), stream.text_bytes)


def _window_batch(stream: Stream, starts: range, length: int) -> tuple[torch.Tensor, ...]:
    """(tokens, labels, loss mask, document starts) [b, s] of the windows that begin at ``starts``."""
    tokens = np.zeros((len(starts), length + 1), np.int64)
    mask = np.zeros((len(starts), length), np.float32)
    marks = np.zeros((len(starts), length), np.bool_)
    for row, start in enumerate(starts):
        window = stream.tokens[start : start + length + 1]
        tokens[row, : len(window)] = window
        mask[row, : len(window) - 1] = 1.0
        low, high = np.searchsorted(stream.document_starts, [start, start + length])
        marks[row, stream.document_starts[low:high] - start] = True
    whole = torch.from_numpy(tokens)
    return (
        whole[:, :-1].contiguous(),
        whole[:, 1:].contiguous(),
        torch.from_numpy(mask),
        torch.from_numpy(marks),
    )

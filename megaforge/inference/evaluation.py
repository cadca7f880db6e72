"""How well a trained model predicts a text or a dataset: every token once, in windows of the training length."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megaforge.data.blend import parse_data_path, parse_split
from megaforge.data.indexed_dataset import IndexedDataset
from megaforge.data.loader import Batch
from megaforge.data.padding import pad_batch
from megaforge.data.run_dataset import check_ids
from megaforge.data.sample_order import JoinedTokens
from megaforge.data.sidecar import content_digest, digest_of, read_sidecar
from megaforge.data.split import split_documents
from megaforge.data.text.expand import expand_inputs
from megaforge.data.text.formats import TEXT_SUFFIXES, plain_suffix
from megaforge.data.text.readers import read_texts
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from megaforge.inference.restore import TrainedModel
from megaforge.training.metrics import EvaluationMetrics

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Stream:
    """Documents one after the other.

    Attributes:
        tokens: integer [n], or what slices into such an array.
        document_starts: int64, ascending: where each document begins.
        text_bytes: UTF-8 bytes that the tokens stand for; None if unknown.
        documents: how many there are.
    """

    tokens: npt.NDArray[np.integer] | JoinedTokens
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


def read_text(path: str, tokenizer: Tokenizer, key: str = "text", append_eod: bool = True) -> Stream:
    """The tokens of a text file's documents, each followed by the tokenizer's end-of-document token where it has one
    and ``append_eod``.

    Raises:
        UserError: the file is missing or bad, or gives fewer than two tokens.
    """
    texts = [text for file in expand_inputs([path]) for text in read_texts(file, key)]
    end = [] if tokenizer.eod is None or not append_eod else [tokenizer.eod]
    documents = [np.array([*ids, *end], np.int64) for ids in tokenizer.encode_batch(texts) if ids]
    if not documents:
        raise UserError(f"--input {path}: there is no text in it")
    lengths = [len(document) for document in documents]
    if sum(lengths) < 2:
        raise UserError(f"--input {path}: a text of one token holds nothing to predict; give a longer one")
    text_bytes = sum(len(text.encode()) for text in texts)
    return Stream(np.concatenate(documents), np.cumsum([0, *lengths[:-1]]), float(text_bytes))


def read_dataset(prefix: str, trained: TrainedModel, part: str | None = None) -> Stream:
    """The documents of a dataset, in the order in which the run reads those of this part.

    Args:
        prefix: as in ``--data-path``.
        trained: the model that is evaluated.
        part: train, valid or test as the run's ``--split`` and ``--split-order`` cut it, or all. None: of a dataset
            that the run trained on, its validation part; of any other, all.

    Raises:
        UserError: bad files, or a part without two tokens.
    """
    dataset, sidecar = IndexedDataset(prefix), read_sidecar(prefix)
    digest = content_digest(dataset, sidecar)
    part = part or ("valid" if trained_on(digest, trained) else "all")
    starts, lengths = dataset.document_extents()
    tokens: JoinedTokens | npt.NDArray[np.integer] = dataset.tokens
    document_starts = starts[lengths > 0]
    if part != "all":
        shares, order = run_split(trained)
        chosen = split_documents(shares, order, digest, len(starts))[part]
        tokens = JoinedTokens(dataset.tokens, starts[chosen], lengths[chosen])
        document_starts = tokens.document_starts
    if len(tokens) < 2:
        raise UserError(
            f"the '{part}' part of {prefix} (--split {trained.config.data.split}) holds no two tokens to evaluate"
        )
    vocab_size = trained.config.model.vocab_size
    for start in range(0, len(tokens) if vocab_size is not None else 0, _CHUNK):
        check_ids(dataset, tokens[start : start + _CHUNK], int(vocab_size or 0))
    ratio = None if sidecar is None else sidecar.bytes_per_token
    return Stream(tokens, document_starts, None if ratio is None else ratio * len(tokens))


def run_split(trained: TrainedModel) -> tuple[list[float], str]:
    """The run's shares of train, valid and test, and how it drew them."""
    data = trained.data
    order = data.get("split_order") or trained.meta["config"]["data"].get("split_order", "sequential")
    return list(data.get("split") or parse_split(trained.config.data.split)), order


def trained_on(digest: str, trained: TrainedModel) -> bool:
    """Whether a dataset of this content (:func:`megaforge.data.sidecar.content_digest`) is one of the run's.

    Raises:
        UserError: the checkpoint is of a version that kept only the digest of several datasets together.
    """
    data = trained.data
    if not data:
        return False
    if "sources" in data:
        return digest in {source["digest"] for source in data["sources"]}
    if digest_of([digest]) == data.get("manifest_digest"):
        return True
    if len(parse_data_path(trained.config.data.data_path)) > 1:
        raise UserError(
            f"{trained.path} does not say which datasets it was trained on, one by one, so which documents it has not "
            "seen is unknown; say --part valid if this is one of them, else --part all"
        )
    return False


def check_choices(prefix: str, trained: TrainedModel) -> None:
    """Refuses a dataset of another tokenizer than the model's, or one whose documents end otherwise.

    Raises:
        UserError: its sidecar records other choices than the checkpoint.
    """
    sidecar, tokenizer = read_sidecar(prefix), trained.meta.get("tokenizer") or {}
    if sidecar is None:
        return
    if sidecar.fingerprint is not None and tokenizer.get("fingerprint") not in (None, sidecar.fingerprint):
        raise UserError(f"{prefix} was tokenized with another tokenizer than {trained.path} was trained with")
    known = {"eod": tokenizer.get("eod")} | {
        name: value for name, value in trained.choices.items() if value is not None
    }
    for name, meaning in (("eod", "the end-of-document id"), ("append_eod", "--append-eod")):
        here, there = getattr(sidecar, name), known.get(name)
        if None not in (here, there) and here != there:
            raise UserError(
                f"{prefix} was prepared otherwise than what {trained.path} was trained on: {meaning} is {here} in "
                f"{sidecar.path} and was {there}; preprocess the text again as it was then"
            )


@torch.no_grad()
def evaluate_stream(trained: TrainedModel, stream: Stream, *, seq_length: int, batch_size: int) -> EvaluationMetrics:
    """Predicts every token but the first from those before it in its window. Collective; dp ranks share the windows."""
    ctx, targets = trained.ctx, len(stream.tokens) - 1
    sums = torch.zeros(2, dtype=torch.float64, device=ctx.device)
    windows = range(0, targets, seq_length)
    batches = [windows[start : start + batch_size] for start in range(0, len(windows), batch_size)]
    for _, group in groupby(batches[ctx.dp.rank :: ctx.dp.size], len):  # the last of all may be shorter than the others
        alike = list(group)
        for start in range(0, len(alike), ctx.pp.size):  # as many at once as there are stages to work on them
            chosen = alike[start : start + ctx.pp.size]
            sums += trained.model.sums([window_batch(stream, starts, seq_length) for starts in chosen])
    for axis in (ctx.dp, ctx.pp):
        if axis.group is not None:
            dist.all_reduce(sums, group=axis.group)
    nats, correct = sums.tolist()
    return EvaluationMetrics(int(trained.meta.get("iteration", 0)), nats, targets, round(correct), stream.text_bytes)


def window_batch(stream: Stream, starts: Sequence[int], length: int) -> Batch:
    """The windows that begin at ``starts``."""
    tokens, own = pad_batch([stream.tokens[start : start + length + 1] for start in starts], length=length + 1)
    marks = np.zeros((len(starts), length), np.bool_)
    for row, start in enumerate(starts):
        low, high = np.searchsorted(stream.document_starts, [start, start + length])
        marks[row, stream.document_starts[low:high] - start] = True
    whole = torch.from_numpy(tokens)
    return Batch(
        whole[:, :-1].contiguous(),
        whole[:, 1:].contiguous(),
        torch.from_numpy(own[:, 1:].astype(np.float32)),
        torch.from_numpy(marks),
    )

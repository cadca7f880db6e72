"""One dataset of a run, opened and checked: its files, its description, its documents in their parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megaforge.data.cache import Cache, cached_dataset
from megaforge.data.indexed_dataset import IndexedDataset
from megaforge.data.sidecar import Sidecar, content_digest, read_sidecar
from megaforge.data.split import Documents, split_documents
from megaforge.errors import UserError

_SCAN_BYTES = 1 << 30  # token files up to here are scanned for foreign ids at the start; larger ones as they are read
_SCAN_CHUNK = 1 << 25


@dataclass(frozen=True)
class DataChecks:
    """What the datasets of a run must fit.

    Attributes:
        vocab_size: ids the model knows; larger ones in the data are an error. None checks nothing.
        fingerprint, eod: of the run's tokenizer, compared with what is recorded beside each dataset; None: no
            tokenizer, nothing to compare.
        cache: where datasets are copied to and read; None: they are read where they are.
        verify: whether whole files are compared with the recorded SHA-256, whatever their size.
    """

    vocab_size: int | None = None
    fingerprint: str | None = None
    eod: int | None = None
    verify: bool = False
    cache: Cache | None = None


@dataclass(frozen=True)
class RunDataset:
    """One dataset.

    Attributes:
        digest: SHA-256 of its content.
        starts, lengths: int64 [documents], where each document lies in ``dataset.tokens``.
        parts: the documents of train, valid and test.
        reads_below: ids that samples must stay below as they are read; None where the whole file has been looked at.
    """

    dataset: IndexedDataset
    sidecar: Sidecar | None
    digest: str
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    parts: Mapping[str, Documents]
    reads_below: int | None

    def numbers(self, part: str) -> npt.NDArray[np.int64]:
        """The numbers of the part's documents in the file."""
        return np.arange(self.dataset.num_documents)[self.parts[part]]

    def extents(self, part: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(starts, lengths) of the part's documents."""
        return self.starts[self.parts[part]], self.lengths[self.parts[part]]

    def check_read(self, tokens: np.ndarray) -> None:
        """Refuses ids beyond the vocabulary in a sample of a file that was not scanned.

        Raises:
            UserError: naming the file and the id.
        """
        if self.reads_below is not None:
            check_ids(self.dataset, tokens, self.reads_below)


def open_dataset(prefix: str, shares: Sequence[float], order: str, checks: DataChecks) -> RunDataset:
    """The dataset ``prefix``, cut by ``--split`` and ``--split-order``.

    Raises:
        UserError: a missing, damaged or empty file, another tokenizer, or ids beyond the vocabulary.
    """
    prefix = cached_dataset(prefix, checks.cache)
    dataset, sidecar = IndexedDataset(prefix), read_sidecar(prefix)
    if dataset.num_tokens == 0:
        raise UserError(f"{dataset.bin_path} is empty: its {dataset.num_documents} documents hold no tokens")
    if sidecar is not None:
        _check_tokenizer(prefix, sidecar, checks)
    digest = content_digest(dataset, sidecar, verify=checks.verify)
    starts, lengths = dataset.document_extents()
    parts = split_documents(shares, order, digest, dataset.num_documents)
    return RunDataset(dataset, sidecar, digest, starts, lengths, parts, _scan(dataset, sidecar, checks.vocab_size))


def _check_tokenizer(prefix: str, sidecar: Sidecar, checks: DataChecks) -> None:
    if checks.fingerprint is None:
        return
    if sidecar.fingerprint not in (None, checks.fingerprint):
        raise UserError(
            f"{prefix} was tokenized with another tokenizer (SHA-256 {sidecar.fingerprint}, recorded in "
            f"{sidecar.path}) than --tokenizer-model names (SHA-256 {checks.fingerprint}): use that tokenizer, or "
            "preprocess the text again with this one"
        )
    if sidecar.eod is not None and sidecar.eod != checks.eod:
        raise UserError(
            f"{prefix} ends its documents with token {sidecar.eod} (recorded in {sidecar.path}), and the tokenizer "
            f"here with {checks.eod}: preprocess the text again, or use the tokenizer's files as they were then"
        )


def _scan(dataset: IndexedDataset, sidecar: Sidecar | None, vocab_size: int | None) -> int | None:
    """Looks for ids beyond the vocabulary as early as is cheap; returns ``vocab_size`` if only reading can tell."""
    info = np.iinfo(dataset.dtype)
    if vocab_size is None:
        return None
    if sidecar is not None and sidecar.vocab_size is not None and sidecar.vocab_size > vocab_size:
        raise UserError(
            f"{dataset.bin_path} holds ids of a tokenizer of {sidecar.vocab_size:,} (recorded in {sidecar.path}), but "
            f"the model's vocabulary has {vocab_size:,}; raise --vocab-size or use the dataset's tokenizer"
        )
    if info.max < vocab_size and info.min == 0:
        return None
    if dataset.tokens.nbytes > _SCAN_BYTES:
        return vocab_size
    for start in range(0, dataset.num_tokens, _SCAN_CHUNK):
        check_ids(dataset, dataset.tokens[start : start + _SCAN_CHUNK], vocab_size)
    return None


def check_ids(dataset: IndexedDataset, tokens: np.ndarray, vocab_size: int) -> None:
    """Refuses ``tokens`` (integer [n], n >= 1) of ``dataset`` that are not in [0, vocab_size).

    Raises:
        UserError: naming the file and one such id.
    """
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"{dataset.bin_path} holds token id {low if low < 0 else high}, but the model's vocabulary has ids "
            f"0..{vocab_size - 1}; raise --vocab-size or use the dataset's tokenizer"
        )

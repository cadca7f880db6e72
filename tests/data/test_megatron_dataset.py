"""Datasets go from Megatron-LM and to it: megatron-core's own builder and reader."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from megaforge.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter

if find_spec("megatron") is None or find_spec("megatron.core") is None:
    pytest.skip("needs megatron-core, of the extra 'test'", allow_module_level=True)

DOCUMENTS = ([1, 2, 3], [60000], list(range(500)), [7, 7])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_the_same_bytes_and_documents(tmp_path: Path, dtype: type) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset as theirs
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype)
    with IndexedDatasetWriter(tmp_path / "b", dtype) as writer:
        for document in DOCUMENTS:
            builder.add_document(torch.tensor(document), [len(document)])
            writer.add_document(np.array(document))
    builder.finalize(str(tmp_path / "a.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    read = theirs.IndexedDataset(str(tmp_path / "b"))
    assert [read[number].tolist() for number in range(len(read))] == list(DOCUMENTS)
    ours = IndexedDataset(str(tmp_path / "a"))
    extents = zip(*ours.document_extents(), strict=True)
    assert [ours.tokens[start : start + length].tolist() for start, length in extents] == list(DOCUMENTS)

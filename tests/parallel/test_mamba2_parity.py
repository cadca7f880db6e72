"""Mamba-2 layers at layouts of every kind against one rank, as :mod:`tests.parallel.test_layout_matrix` compares them:
loss, every gradient, the gradient norm and the updated weights over five steps of packed documents."""

from __future__ import annotations

import pytest
import torch

from megaforge.verification.parity import Comparison, combined, compare, parity_config, write_documents
from megaforge.verification.parity_layouts import choose_layouts
from tests.parallel.pool import RankPool

FLAGS = (
    *("--hybrid-layer-pattern", "M-ME*-M", "--mamba-head-dim", "8", "--mamba-state-dim", "6"),
    *("--mamba-num-groups", "4", "--mamba-num-heads", "8"),
)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_documents(str(tmp_path_factory.mktemp("parity") / "train_text_document"), 61)


def compare_here(documents: str, name: str, dtype: str) -> Comparison:
    [layout] = choose_layouts([name])
    reference = parity_config(documents, dtype, None, FLAGS)
    return compare(parity_config(documents, dtype, layout, FLAGS), reference, torch.device("cpu"))


@pytest.mark.parametrize(
    "name,dtype",
    [
        ("tp4-sp", "fp64"),
        ("cp4", "fp64"),
        ("pp2-cp2-zb-v", "fp64"),
        ("tp2-sp-dp2-zero2", "fp64"),
        ("tp2-sp-pp2-cp2-vpp2", "fp64"),
        ("tp2-cp2-ep2", "fp32"),
    ],
)
def test_layout_changes_nothing(ranks: RankPool, documents: str, name: str, dtype: str) -> None:
    [layout] = choose_layouts([name])
    records = ranks.run(layout.ranks, compare_here, documents, name, dtype)
    found = combined(records, parity_config(documents, dtype, layout, FLAGS))
    assert found.agrees(dtype), f"{name}, {dtype}: {found.worst}"

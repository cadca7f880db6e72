"""Multi-token prediction at layouts of every kind against one rank, as :mod:`tests.parallel.test_layout_matrix`
compares them: loss, every gradient, the gradient norm and the updated weights over five steps of packed documents."""

from __future__ import annotations

import pytest
import torch

from megaforge.verification.parity import Comparison, combined, compare, parity_config, write_documents
from megaforge.verification.parity_layouts import choose_layouts
from tests.parallel.pool import RankPool

SEQUENTIAL = ("--hybrid-layer-pattern", "R-*E*-R-/*E/*E", "--mtp-loss-scaling-factor", "0.8")
UNTIED = (*SEQUENTIAL, "--untie-embeddings-and-output-weights")
PARALLEL = ("--hybrid-layer-pattern", "R-*ER-", "--mtp-mode", "parallel", "--mtp-num-layers", "3")
FLAGS = {"sequential": SEQUENTIAL, "untied": UNTIED, "parallel": PARALLEL}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_documents(str(tmp_path_factory.mktemp("parity") / "train_text_document"), 61)


def compare_here(documents: str, name: str, flags: str, dtype: str) -> Comparison:
    [layout] = choose_layouts([name])
    reference = parity_config(documents, dtype, None, FLAGS[flags])
    return compare(parity_config(documents, dtype, layout, FLAGS[flags]), reference, torch.device("cpu"))


@pytest.mark.parametrize(
    "name,flags,dtype",
    [
        ("tp2-sp-pp2-cp2-vpp2", "untied", "fp64"),
        ("pp2-cp2-zb-v", "untied", "fp64"),
        ("tp2-cp2-ep2", "sequential", "fp32"),
        ("pp2-ep2-zero2-zb-h1", "parallel", "fp64"),
    ],
)
def test_layout_changes_nothing(ranks: RankPool, documents: str, name: str, flags: str, dtype: str) -> None:
    [layout] = choose_layouts([name])
    records = ranks.run(layout.ranks, compare_here, documents, name, flags, dtype)
    found = combined(records, parity_config(documents, dtype, layout, FLAGS[flags]))
    assert found.agrees(dtype), f"{name}, {dtype}: {found.worst}"

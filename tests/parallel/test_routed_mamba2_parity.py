"""Routing Mamba layers at layouts of every kind against one rank, as :mod:`tests.parallel.test_layout_matrix` compares
them: loss, every gradient, the gradient norm, routers' statistics and the updated weights over five steps of packed
documents. Their experts are more than the FFNs', and some choices are dropped."""

from __future__ import annotations

import pytest
import torch

from megaforge.verification.parity import Comparison, combined, compare, parity_config, write_documents
from megaforge.verification.parity_layouts import choose_layouts
from tests.parallel.pool import RankPool

FLAGS = (
    *("--hybrid-layer-pattern", "OE*-O", "--mamba-head-dim", "4", "--mamba-state-dim", "6"),
    *("--mamba-num-groups", "4", "--mamba-num-heads", "8", "--rom-num-experts", "8", "--rom-router-topk", "3"),
)
CAPACITY = ("--moe-expert-capacity-factor", "0.8", "--moe-router-load-balancing-type", "global_aux_loss")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_documents(str(tmp_path_factory.mktemp("parity") / "train_text_document"), 61)


def compare_here(documents: str, name: str, dtype: str, flags: tuple[str, ...]) -> Comparison:
    [layout] = choose_layouts([name])
    reference = parity_config(documents, dtype, None, flags)
    return compare(parity_config(documents, dtype, layout, flags), reference, torch.device("cpu"))


@pytest.mark.parametrize(
    "name,dtype,more",
    [
        ("tp4-sp", "fp64", CAPACITY),
        ("tp2-etp1", "fp64", CAPACITY),
        ("tp2-cp2-ep2", "fp64", CAPACITY),
        ("pp2-ep2-zero2-zb-h1", "fp64", ()),
        ("tp2-sp-cp2-dp2-ep4-zero2", "fp64", ()),
        ("tp4-sp-dp2-ep4-etp2", "fp32", ()),
    ],
)
def test_layout_changes_nothing(ranks: RankPool, documents: str, name: str, dtype: str, more: tuple[str, ...]) -> None:
    [layout] = choose_layouts([name])
    flags = FLAGS + more
    records = ranks.run(layout.ranks, compare_here, documents, name, dtype, flags)
    found = combined(records, parity_config(documents, dtype, layout, flags))
    assert found.agrees(dtype), f"{name}, {dtype}: {found.worst}"

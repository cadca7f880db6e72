"""The layout changes nothing but speed: the matrix that ``tools/parity.py`` prints, for a hybrid model of RWKV-7,
attention, dense and mixture-of-experts layers on packed documents.

Compared with one rank over five steps: loss, every gradient, the gradient norm, the routers' statistics and the updated
weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megaforge.training.parity import Comparison, compare, one_rank, parity_config, together, write_documents
from megaforge.training.parity_layouts import LAYOUTS, ParityLayout, choose_layouts
from tests.parallel.pool import RankPool

CPU = torch.device("cpu")
# Sums in fp32 differ by their order alone, so a layout of each kind is enough.
IN_FP32 = ("tp4-sp", "cp4-ring", "pp4-vpp2", "dp2-zero2", "tp2-cp2-ep2", "tp2-pp2-dp2")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_documents(str(tmp_path_factory.mktemp("parity") / "train_text_document"), 61)


def compare_here(documents: str, layout: ParityLayout, dtype: str) -> Comparison:
    reference = parity_config(documents, dtype, None)
    return compare(parity_config(documents, dtype, layout), reference, CPU)


def assert_same(ranks: RankPool, documents: str, layout: ParityLayout, dtype: str) -> None:
    found = together(
        ranks.run(layout.ranks, compare_here, documents, layout, dtype), parity_config(documents, dtype, layout)
    )
    assert found.agrees(dtype), f"{layout.name} ({' '.join(layout.flags)}), {dtype}: {found.worst}"


def test_the_reference_shows_what_is_compared(documents: str) -> None:
    """No gradient is trivially zero, every expert works, clipping acts, and the loss moves."""
    record = one_rank(parity_config(documents, "fp64", None), CPU)
    for step in record.gradients:
        assert not [name for name, gradient in step.items() if not bool(gradient.any())]
    for loss, norm, balance, z_loss, *experts in record.numbers:
        assert norm > 0.5 and balance > 1 and z_loss > 0 and min(experts) > 0
        assert loss < record.numbers[0][0] or loss == record.numbers[0][0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_changes_nothing(ranks: RankPool, documents: str, layout: ParityLayout) -> None:
    assert_same(ranks, documents, layout, "fp64")


@pytest.mark.parametrize("name", IN_FP32)
def test_layout_changes_nothing_in_fp32(ranks: RankPool, documents: str, name: str) -> None:
    assert_same(ranks, documents, choose_layouts([name])[0], "fp32")

"""The parts of the 5B family at once at layouts against one rank, as
:mod:`tests.parallel.test_layout_matrix` compares them: Routing Mamba inside Mixture of Depths and inside further
predictions, over stages of a pipeline that are cut again and over tp, with recurrences in spans and with ternary
weights; and compressed activations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megaforge.verification.parity import Comparison, combined, compare, parity_config, write_documents
from megaforge.verification.parity_layouts import ParityLayout
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare as compare_runs
from tests.peft.test_lora import SHORT, SIZES, train
from tests.training.tiny import arguments, write_dataset

LORA = ("--peft", "lora", "--lora-rank", "4", "--lora-alpha", "8")

FAMILY = (
    *("--hybrid-layer-pattern", "OE*EOE*-OE*E/OE", "--mamba-head-dim", "4", "--mamba-state-dim", "6"),
    *("--mamba-num-groups", "4", "--mamba-num-heads", "8", "--rom-num-experts", "8", "--rom-router-topk", "3"),
    *("--mod-capacity-factor", "0.75"),
)
TERNARY = (
    *FAMILY,
    "--hybrid-layer-pattern",
    "OE*EO-*-/OE",
    "--quantize-weights",
    "ternary",
    "--quantize-activations",
    "int4",
)
COMPRESSED = (
    "--hybrid-layer-pattern",
    "R-M-",
    "--hidden-size",
    "64",
    "--mamba-num-groups",
    "4",
    "--mamba-head-dim",
    "16",
)
COMPRESSED += ("--recompute", "selective", "--compress-activations")
ROWS = {
    "stages cut again": (2, "--pp 2 --vpp 2 --micro-batch-size 2", (*FAMILY, "--sequence-checkpoint", "16")),
    "stages over tp": (4, "--tp 2 --pp 2 --micro-batch-size 2", FAMILY),
    "compressed": (2, "--pp 2 --micro-batch-size 2", COMPRESSED),
    "compressed over tp": (2, "--tp 2 --sp", (*COMPRESSED, "--hidden-size", "128")),  # each rank: whole groups of 64
    "ternary over tp": (2, "--tp 2 --sp", TERNARY),
    "ternary over stages": (4, "--pp 2 --ep 2 --zero 1 --micro-batch-size 2", TERNARY),
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_documents(str(tmp_path_factory.mktemp("parity") / "train_text_document"), 61)


def compare_here(documents: str, row: str) -> Comparison:
    ranks, layout, flags = ROWS[row]
    reference = parity_config(documents, "fp64", None, flags)
    ours = parity_config(documents, "fp64", ParityLayout(row, ranks, tuple(layout.split())), flags)
    return compare(ours, reference, torch.device("cpu"))


@pytest.mark.parametrize("row", ROWS)
def test_layout_changes_nothing(ranks: RankPool, documents: str, row: str) -> None:
    world, layout, flags = ROWS[row]
    records = ranks.run(world, compare_here, documents, row)
    config = parity_config(documents, "fp64", ParityLayout(row, world, tuple(layout.split())), flags)
    found = combined(records, config)
    assert found.agrees("fp64"), f"{row}: {found.worst}"


def test_lora_of_routing_mamba(ranks: RankPool, tmp_path: Path) -> None:
    """Pairs beside the experts of its projections, inside Mixture of Depths too."""
    prefix = write_dataset(tmp_path / "train_text_document")
    more = ("--rom-num-experts", "4", "--mod-capacity-factor", "0.75", "--hybrid-layer-pattern", "OE*-OE")
    flags = arguments(prefix, *SIZES, *LORA, *SHORT, *more)
    one = train(flags)
    assert any(".mixer.expert_input" in name for name in one["gradients"])
    for layout in (("--tp", "2", "--sp"), ("--ep", "2", "--zero", "1")):
        compare_runs(ranks.run(2, train, [*flags, *layout]), one, 1e-10)

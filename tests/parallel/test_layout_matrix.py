"""The layout changes nothing but speed: the matrix that ``tools/parity.py`` prints, for a hybrid model of RWKV-7,
attention, dense and mixture-of-experts layers on packed documents, random ones and runs of one token.

Compared with one rank over five steps: loss, every gradient, the gradient norm, the routers' statistics and the updated
weights.
"""

from __future__ import annotations

import dataclasses
import math
from unittest import mock

import pytest
import torch

from megaforge.models.hybrid import HybridModel
from megaforge.parallel.param_spec import named_specs
from megaforge.training.metrics import StepMetrics
from megaforge.training.trainer import Trainer
from megaforge.verification.parity import (
    KINDS,
    STEPS,
    TOLERANCE,
    Comparison,
    Recorder,
    combined,
    compare,
    one_rank,
    parity_config,
    write_documents,
)
from megaforge.verification.parity_layouts import LAYOUTS, ParityLayout, choose_layouts
from tests.parallel.pool import RankPool

CPU = torch.device("cpu")
# Sums in fp32 differ by their order alone, so a layout of each kind is enough.
IN_FP32 = ("tp4-sp", "cp4-ring", "pp4-vpp2", "dp2-zero2", "tp2-cp2-ep2", "tp2-pp2-dp2")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_documents(str(tmp_path_factory.mktemp("parity") / "train_text_document"), 61, runs=True)


@pytest.fixture(scope="module")
def random_documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_documents(str(tmp_path_factory.mktemp("random") / "train_text_document"), 61)


def compare_here(documents: str, layout: ParityLayout, dtype: str) -> Comparison:
    reference = parity_config(documents, dtype, None)
    return compare(parity_config(documents, dtype, layout), reference, CPU)


def assert_same(ranks: RankPool, documents: str, layout: ParityLayout, dtype: str) -> None:
    found = combined(
        ranks.run(layout.ranks, compare_here, documents, layout, dtype), parity_config(documents, dtype, layout)
    )
    assert found.agrees(dtype), f"{layout.name} ({' '.join(layout.flags)}), {dtype}: {found.worst}"


def test_the_reference_shows_what_is_compared(documents: str) -> None:
    """No gradient is trivially zero, every expert works, and clipping acts."""
    record = one_rank(parity_config(documents, "fp64", None), CPU)
    for step in record.gradients:
        assert not [name for name, gradient in step.items() if not bool(gradient.any())]
    for _, norm, balance, z_loss, *experts in record.numbers:
        assert norm > 0.5 and balance > 1 and z_loss > 0 and min(experts) > 0
    assert len({loss for loss, *_ in record.numbers}) == STEPS


def test_the_table_has_every_axis_and_schedule() -> None:
    flags = " ".join(" ".join(layout.flags) for layout in LAYOUTS)
    for word in (
        *("--tp 2", "--tp 4", "--sp", "--cp 2", "--cp 4", "p2p", "--ep 2", "--ep 4", "--etp 1", "--etp 2", "--vpp 2"),
        *("--pp 2", "--pp 4", "--pp 8", "gpipe", "1f1b", "zb-h1", "zb-v", "--zero 1", "--zero 2", "--recompute"),
    ):
        assert word in flags, word
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS) >= 24


def _nudge(model: HybridModel, field: str) -> None:
    """Changes one value by what fp64 can tell from rounding and nobody would notice in a loss curve."""
    [parameter] = [p for spec, p in named_specs(model) if spec.name == "layers.1.ffn.up.weight"]
    with torch.no_grad():
        getattr(parameter, field)[3, 0] *= 1 + 1e-8


def _broken(kind: str, documents: str) -> Comparison:
    """One rank against itself, with one thing of ``kind`` made wrong in front of the last step's end."""
    config = parity_config(documents, "fp64", choose_layouts(["micro1"])[0])
    reference = parity_config(documents, "fp64", None)
    one_rank(reference, CPU)
    on_step_end = Recorder.on_step_end

    def after_step(recorder: Recorder, trainer: Trainer, metrics: StepMetrics) -> None:
        if metrics.iteration == STEPS and kind == "gradient":
            _nudge(trainer.model, "main_grad")
        if metrics.iteration == STEPS and kind == "weights":
            _nudge(trainer.model, "data")
        if metrics.iteration == STEPS and kind == "router":
            trainer.tokens_per_expert[0][0] += 1
        if metrics.iteration == STEPS and kind in ("loss", "norm"):
            name = {"loss": "loss", "norm": "grad_norm"}[kind]
            metrics = dataclasses.replace(metrics, **{name: getattr(metrics, name) * (1 + 1e-9)})
        on_step_end(recorder, trainer, metrics)

    with mock.patch.object(Recorder, "on_step_end", after_step):
        return compare(config, reference, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_what_differs_is_found_and_named(documents: str, kind: str) -> None:
    found = _broken(kind, documents)
    assert [name for name, (error, _) in found.worst.items() if error > TOLERANCE["fp64"]] == [kind]
    assert not found.agrees("fp64")
    where = {"gradient": "layers.1.ffn.up.weight, step 5", "weights": "layers.1.ffn.up.weight"}
    assert found.worst[kind][1] == where.get(kind, found.worst[kind][1])


def test_what_no_rank_holds_is_found(documents: str) -> None:
    config = parity_config(documents, "fp64", None)
    whole = compare(config, config, CPU)
    lost = dataclasses.replace(whole, held=whole.held - {"final_norm.weight"})
    assert combined([whole, lost], config).agrees("fp64")
    assert combined([lost, lost], config).worst["weights"] == (math.inf, "final_norm.weight is on no rank")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_changes_nothing(ranks: RankPool, documents: str, layout: ParityLayout) -> None:
    assert_same(ranks, documents, layout, "fp64")


@pytest.mark.parametrize("name", IN_FP32)
def test_layout_changes_nothing_in_fp32(ranks: RankPool, random_documents: str, name: str) -> None:
    assert_same(ranks, random_documents, choose_layouts([name])[0], "fp32")

"""The arithmetic of a step against torch's own count of the operations it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megaforge.models.flops import active_matmul_parameters, model_flops_per_token
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.param_spec import named_specs
from megaforge.training import peak_flops
from megaforge.training.peak_flops import measure_matmul_peak
from tests.training.tiny import arguments, dense_arguments, make_trainer, write_dataset


def build(tmp_path: Path, *more: str):  # type: ignore[no-untyped-def]
    prefix = write_dataset(tmp_path / "d_text_document", documents=10)
    return make_trainer(arguments(prefix, *more)).model


@pytest.mark.parametrize("tied", [(), ("--untie-embeddings-and-output-weights",)])
def test_dense_attention_model_equals_torchs_count(tmp_path: Path, tied: tuple[str, ...]) -> None:
    prefix = write_dataset(tmp_path / "d_text_document", documents=10)
    # The counter knows matrix products, and no fused attention: fp64 has torch's.
    model = make_trainer(dense_arguments(prefix, "*-*-", "--seq-length", "64", "--fp64", *tied)).model
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(torch.randint(0, 61, (2, 64)))
    forward = model_flops_per_token(model, 64) / 3 * 2 * 64
    # Torch counts attention to later tokens too: in each of 2 layers as much again as ours.
    later = 2 * (2 * 64 * 32) * 2 * 64
    assert counter.get_total_flops() == pytest.approx(forward + later, rel=1e-9)


def test_experts_count_as_far_as_they_are_chosen(tmp_path: Path) -> None:
    model = build(tmp_path)
    specs = [spec for spec, _ in named_specs(model)]
    experts = sum(spec.numel for spec in specs if spec.kind == "moe")
    rest = sum(spec.numel for spec in specs if spec.kind != "moe" and len(spec.shape) > 1 and "r_k" not in spec.name)
    assert experts > 0
    assert active_matmul_parameters(model) == experts / 2 + rest
    attention, wkv = 2 * 24 * 32, 9 * 32 * 8
    assert model_flops_per_token(model, 24) == 3 * (2 * (experts / 2 + rest) + attention + wkv)


def test_the_peak_is_a_rate_and_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_flops, "_measured", {})
    ctx = ParallelContext.single()
    rate = measure_matmul_peak(ctx, torch.float32)
    assert rate > 1e8
    monkeypatch.setattr(peak_flops, "_burst", lambda *_: (1.0, 1.0))
    assert measure_matmul_peak(ctx, torch.float32) == rate
    assert measure_matmul_peak(ctx, torch.float64) == 1.0, "of another type it is another"

"""Which implementation of WKV-7 is called, and how fla-core's kernels are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megaforge.config.model_config import ModelConfig
from megaforge.config.run_config import TrainingConfig
from megaforge.errors import UserError
from megaforge.kernels.native import say_fallback
from megaforge.kernels.wkv7 import backend, fla, native, wkv7_recurrent
from megaforge.kernels.wkv7.backend import wkv7_backend, wkv7_torch
from megaforge.models.hybrid import HybridModel
from megaforge.nn.rwkv7 import RWKV7TimeMix
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import make_layer_context
from tests.kernels.wkv7_cases import assert_close, make_inputs, run
from tests.training.tiny import arguments, make_trainer, write_dataset

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def chunk_rwkv7(
    r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None, lower_bound=None
):
    """fla-core's function by its documentation: [B, T, H, N], states [sequences, H, key, value], ``cu_seqlens`` the
    bounds of sequences in one row."""
    assert output_final_state and w.detach().min() >= lower_bound
    assert cu_seqlens is None or r.shape[0] == 1
    batch, t = r.shape[:2]
    bounds = range(0, batch * t + 1, t) if cu_seqlens is None else cu_seqlens.tolist()
    rows = [x.reshape(batch * t, 1, *x.shape[2:]) for x in (r * scale, w, k, v, a, b)]
    outputs, finals = [], []
    for number, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        state = None if initial_state is None else initial_state[number : number + 1].transpose(-1, -2)
        y, final = wkv7_recurrent(*(x[start:stop] for x in rows), state)
        outputs.append(y.squeeze(1))
        finals.append(final.squeeze(0).transpose(-1, -2))
    return torch.cat(outputs).view(batch, t, *v.shape[2:]), torch.stack(finals)


@pytest.mark.parametrize("starts", [None, [], [0], [1, 5, 6, 19]])
def test_fla_is_called_by_its_conventions(starts: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla, "fla_kernels", lambda: SimpleNamespace(chunk_rwkv7=chunk_rwkv7))
    inputs = make_inputs(20, batch=3, heads=2, n=4)
    document_start = None
    if starts is not None:
        document_start = torch.zeros(20, 3, dtype=torch.bool)
        document_start[starts, 1] = True
        document_start[[0, 12], 2] = True
    expected = run(wkv7_recurrent, inputs, document_start, torch.float64)
    assert_close(run(fla.wkv7_fla, inputs, document_start, torch.float64), expected, 1e-13)
    without_state = fla.wkv7_fla(*inputs[:6], None, document_start)
    for ours, theirs in zip(without_state, wkv7_recurrent(*inputs[:6], None, document_start), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_what_cannot_run_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--wkv-backend fla.*GPUs"):
        wkv7_backend("fla", CPU, torch.float32, 64)
    monkeypatch.setattr(fla, "require", lambda *_, **__: (_ for _ in ()).throw(UserError("megaforge[gpu]")))
    with pytest.raises(UserError, match="gpu"):
        wkv7_backend("fla", GPU, torch.bfloat16, 64)
    for module in (backend, native):
        monkeypatch.setattr(module, "COMPILED", ())
    with pytest.raises(UserError, match="--wkv-backend native.*build it"):
        wkv7_backend("native", CPU, torch.float32, 64)
    for module in (backend, native):
        monkeypatch.setattr(module, "COMPILED", ("cpu", "cuda"))
    assert wkv7_backend("native", GPU, torch.bfloat16, 64) is backend.wkv7_native
    assert wkv7_backend("native", CPU, torch.float64, 5) is backend.wkv7_native
    assert wkv7_backend("native16", GPU, torch.bfloat16, 64) is backend.wkv7_native16
    with pytest.raises(UserError, match="--wkv-backend native16.*--wkv-backend native"):
        wkv7_backend("native16", CPU, torch.float32, 64)
    for dtype, channels in ((torch.float64, 64), (torch.bfloat16, 128)):
        with pytest.raises(UserError, match="--wkv-backend native.*--rwkv-head-size 64"):
            wkv7_backend("native", GPU, dtype, channels)


def test_plans_take_fla_for_auto_and_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    say_fallback.cache_clear()
    assert wkv7_backend("fla", torch.device("meta"), torch.bfloat16, 64) is backend.wkv7
    assert "--wkv-backend fla computes nothing in plans and dry runs" in capsys.readouterr().err


@pytest.mark.parametrize("other", [{"device": "cpu"}, {"fp64": True}])
def test_what_is_of_gpus_is_refused_with_the_configuration(other: dict[str, object]) -> None:
    for name in ("fla", "native16"):
        TrainingConfig(wkv_backend=name).validate()
        with pytest.raises(UserError, match=f"--wkv-backend {name} with --"):
            TrainingConfig(wkv_backend=name, **other).validate()


@pytest.mark.parametrize("s", [2, 40])
def test_plain_torch_is_the_recurrence(s: int) -> None:
    inputs = make_inputs(s)
    expected = run(wkv7_recurrent, inputs, None, torch.float64)
    assert_close(run(wkv7_torch, inputs, None, torch.float64), expected, 1e-13)


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_the_layers_of_a_model_call_the_one_that_it_was_given(name: str) -> None:
    cfg = ModelConfig(hidden_size=32, rwkv_head_size=16, hybrid_layer_pattern="R-*-R-", vocab_size=64)
    model = HybridModel(make_layer_context(cfg, ParallelContext.single("meta"), backends={"wkv": name}))
    mixers = [layer.mixer for layer in model.layers.values() if isinstance(layer.mixer, RWKV7TimeMix)]
    assert len(mixers) == 2
    for mixer in mixers:
        assert mixer.wkv7 is wkv7_backend(name, CPU, torch.float32, 16)


def test_the_flag_reaches_the_layers(tmp_path: Path) -> None:
    trainer = make_trainer(arguments(write_dataset(tmp_path / "train_text_document"), "--wkv-backend", "torch"))
    mixers = [module for module in trainer.model.modules() if isinstance(module, RWKV7TimeMix)]
    assert mixers and all(mixer.wkv7 is wkv7_torch for mixer in mixers)

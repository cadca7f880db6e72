"""Which implementation of Mamba-2's recurrence is called, and how mamba-ssm's kernels are."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.config.run_config import TrainingConfig
from megaforge.errors import UserError
from megaforge.kernels.native import say_fallback
from megaforge.kernels.ssd import ssd_chunked, ssd_recurrent
from megaforge.kernels.ssd.backend import ssd_backend
from megaforge.kernels.ssd.mamba_ssm import KernelPiece, ssd_mamba_ssm
from megaforge.kernels.ssd.piece import Piece
from megaforge.models.hybrid import HybridModel
from megaforge.nn.mamba2 import Mamba2Core
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.context_parallel.ssd import context_parallel_ssd
from megaforge.parallel.layer_context import make_layer_context
from tests.kernels.test_ssd import arguments, starts_at
from tests.nn.support import random
from tests.training.tiny import make_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    """mamba-ssm's function as its kernels have it: [batch, s, ...]; a state is seen by tokens of its document alone,
    and the first state is of document 0."""
    assert return_final_states and not return_varlen_states and z is None and dt_bias is None and not dt_softplus
    assert (dt > 0).all() and (A <= 0).all() and A.shape == D.shape == dt.shape[2:] and chunk_size >= 16
    batch, length, heads, width = x.shape
    if seq_idx is not None:
        assert seq_idx.shape == (batch, length) and seq_idx.dtype == torch.int32 and seq_idx.is_contiguous()
    state = x.new_zeros(batch, heads, width, B.shape[-1], dtype=A.dtype) if initial_states is None else initial_states
    before, y = torch.zeros(batch, dtype=torch.int32), []
    for t in range(length):
        if seq_idx is not None:
            state = state.masked_fill((seq_idx[:, t] != before)[:, None, None, None], 0)
            before = seq_idx[:, t]
        b, c = (each[:, t].repeat_interleave(heads // each.shape[2], 1).to(A.dtype) for each in (B, C))
        added = (dt[:, t, :, None] * x[:, t].to(A.dtype))[..., None] * b[..., None, :]
        state = (A * dt[:, t]).exp()[..., None, None] * state + added
        y.append(torch.einsum("bhpn,bhn->bhp", state, c) + D[:, None] * x[:, t])
    return torch.stack(y, 1).to(x.dtype), state


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    monkeypatch.setitem(sys.modules, "mamba_ssm.utils.determinism", SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", module)  # type: ignore[arg-type]


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("mamba_ssm.utils.determinism", "mamba_ssm.ops.triton.ssd_combined"):
        monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    say_fallback.cache_clear()


def gradients(piece: Piece | None, given: list[Tensor], starts: Tensor | None) -> list[Tensor]:
    """y, final state and the gradients of ``given``: of ``piece``, or of the definition."""
    *_, state = given
    y, final = ssd_recurrent(*given, starts) if piece is None else piece.output(state)
    loss = (y * random(*y.shape, seed=50)).sum() + (final * random(*final.shape, seed=51)).sum()
    return [y, final, *torch.autograd.grad(loss, given)]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("early", [False, True], ids=["state first", "state later"])
@pytest.mark.parametrize("places", [None, [], [(0, 0), (0, 1)], [(5, 0), (6, 0), (7, 1)], [(21, 1)]])
def test_the_kernels_are_called_by_their_conventions(places: list[tuple[int, int]] | None, early: bool) -> None:
    starts = None if places is None else starts_at(22, *places)
    given = [each.requires_grad_() for each in arguments(22)]
    made = ssd_mamba_ssm(torch.float64)(*given[:6], starts)
    if early:
        kept, added = made.summary()
        expected = ssd_chunked(*given[:6], starts).summary()
        for ours, theirs in zip((kept, added), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    for ours, theirs in zip(gradients(made, given, starts), gradients(None, given, starts), strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("installed")
def test_the_kernels_get_the_models_type_and_the_layer_its_own_back() -> None:
    given = [each.float() for each in arguments(20)]
    seen = {}

    def noted(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *others: object, **options: object) -> object:
        seen.update(x=x.dtype, dt=dt.dtype, a=a.dtype, b=b.dtype, c=c.dtype)
        return mamba_chunk_scan_combined(x, dt, a, b, c, *others, **options)

    sys.modules["mamba_ssm.ops.triton.ssd_combined"].mamba_chunk_scan_combined = noted  # type: ignore[attr-defined]
    y, final = ssd_mamba_ssm(torch.bfloat16)(*given[:6], None).output(None)
    assert y.dtype is final.dtype is torch.float32
    half = torch.bfloat16
    assert seen == {"x": half, "b": half, "c": half, "dt": torch.float32, "a": torch.float32}
    torch.testing.assert_close(y, ssd_recurrent(*given[:6])[0], rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("documents", [False, True])
def test_ranks_of_cp_hand_its_states_on(documents: bool) -> None:
    """Four chunks of two ranks, here all in one: what :func:`gather` brings is what they made themselves."""
    given = [each.requires_grad_() for each in arguments(16)[:6]]
    starts = starts_at(16, (3, 0), (9, 0), (12, 1)) if documents else None
    shards = SimpleNamespace(axis=SimpleNamespace(size=2), chunks=(0, 1, 2, 3), gather=lambda own: own)
    y = context_parallel_ssd(*given, starts, shards, ssd_mamba_ssm(torch.float64))  # type: ignore[arg-type]
    whole = ssd_recurrent(*given, None, starts)[0]
    weights = random(*whole.shape, seed=7)
    torch.testing.assert_close(y, whole, rtol=1e-11, atol=1e-12)
    pairs = (torch.autograd.grad((each * weights).sum(), given) for each in (y, whole))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("installed")
def test_which_one_is_chosen() -> None:
    given = (*arguments(2)[:6], None)
    for dtype in (torch.bfloat16, torch.float16):
        assert isinstance(ssd_backend("auto", GPU, dtype)(*given), KernelPiece)
        assert ssd_backend("torch", GPU, dtype) is ssd_backend("auto", CPU, dtype) is ssd_chunked
    assert ssd_backend("auto", GPU, torch.float32) is ssd_backend("auto", GPU, torch.float64) is ssd_chunked
    assert isinstance(ssd_backend("mamba-ssm", GPU, torch.float32)(*given), KernelPiece)


def test_what_cannot_run_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="--mamba-backend mamba-ssm.*GPUs, not on cpu.*--mamba-backend auto"):
        ssd_backend("mamba-ssm", CPU, torch.float32)
    with pytest.raises(UserError, match="--mamba-backend mamba-ssm.*fp32 at most"):
        ssd_backend("mamba-ssm", GPU, torch.float64)
    TrainingConfig(mamba_backend="mamba-ssm").validate()
    for other in ({"device": "cpu"}, {"fp64": True}):
        with pytest.raises(UserError, match="--mamba-backend mamba-ssm with --.*--mamba-backend auto"):
            TrainingConfig(mamba_backend="mamba-ssm", **other).validate()  # type: ignore[arg-type]


@pytest.mark.usefixtures("absent")
def test_without_the_package_auto_is_torch_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"--mamba-backend mamba-ssm needs .*megaforge\[mamba\]"):
        ssd_backend("mamba-ssm", GPU, torch.bfloat16)
    for _ in range(2):
        assert ssd_backend("auto", GPU, torch.bfloat16) is ssd_chunked
    said = capsys.readouterr().err
    assert said.count("megaforge[mamba]") == 1 and said.endswith("using plain torch\n")


@pytest.mark.usefixtures("absent")
def test_plans_take_torch_for_it_and_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert ssd_backend("mamba-ssm", torch.device("meta"), torch.bfloat16) is ssd_chunked
    assert "mamba-ssm computes nothing in plans and dry runs" in capsys.readouterr().err


@pytest.mark.usefixtures("installed")
def test_the_layers_of_a_model_call_the_one_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given = make_config(["--config", "cdrmix-test", "--mamba-backend", "torch"]).training.backends
    assert given == {"wkv": "auto", "ssd": "torch"}
    asked = []
    monkeypatch.setattr("megaforge.nn.mamba2.ssd_backend", lambda *facts: asked.append(facts) or ssd_chunked)
    cfg = ModelConfig(
        hidden_size=16, mamba_head_dim=8, mamba_num_groups=2, hybrid_layer_pattern="MO-", vocab_size=64, num_experts=2
    )
    ctx = ParallelContext.single("meta")
    model = HybridModel(make_layer_context(cfg, ctx, dtype=torch.bfloat16, backends=given))
    assert asked == [("torch", ctx.device, torch.bfloat16)] * 2
    mixers = [module for module in model.modules() if isinstance(module, Mamba2Core)]
    assert len(mixers) == 2 and all(mixer.ssd is ssd_chunked for mixer in mixers)

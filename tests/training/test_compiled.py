"""``--compile``: the same run, through torch.compile."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megaforge.errors import UserError
from megaforge.training import compiled, setup
from megaforge.training.trainer import Trainer
from tests.training.tiny import arguments, make_trainer, record, weights, write_dataset


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "d_text_document", documents=20)


def trained(prefix: str, *flags: str) -> tuple[Trainer, list[dict]]:
    trainer = make_trainer(
        arguments(prefix, "--train-iters", "2", "--eval-iters", "1", "--activation", "swiglu", *flags)
    )
    recorder = record(trainer)
    trainer.train()
    return trainer, recorder.records


def test_the_compiled_run_learns_the_same(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """RWKV-7, attention and experts over packed documents, and an evaluation; whole and computed again, in spans too.
    Graphs are traced and differentiated as by default, and run without being made C++, which takes minutes."""
    monkeypatch.setattr(setup, "compile_blocks", partial(compiled.compile_blocks, backend="aot_eager"))
    plain, expected = trained(prefix)
    for flags in ((), ("--recompute", "full", "--sequence-checkpoint", "16")):
        torch._dynamo.utils.counters.clear()
        trainer, found = trained(prefix, "--compile", *flags)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 10 or flags, "nothing was compiled"
        for mine, other in zip(found, expected, strict=True):
            for name in ("loss", "grad_norm"):
                if name in other:
                    assert mine[name] == pytest.approx(other[name], rel=1e-5)
        for name, value in weights(plain).items():
            torch.testing.assert_close(weights(trainer)[name], value, rtol=1e-4, atol=1e-5)


def test_a_kernel_is_made_of_what_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own default backend: the norm and the rotation are their definitions while they are traced."""
    from megaforge.kernels.pointwise import native, rms_norm, triton

    x, weight = torch.randn(3, 2, 8), torch.rand(8)
    expected = rms_norm(x, weight, 1e-6)
    for module, door in ((triton, "takes_rows"), (native, "takes")):
        monkeypatch.setattr(module, door, None)  # not asked
    torch.testing.assert_close(torch.compile(rms_norm)(x, weight, 1e-6), expected)


def test_without_a_compiler_the_run_is_refused(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="--compile: torch.compile needs a C\\+\\+ compiler"):
        make_trainer(arguments(prefix, "--compile"))

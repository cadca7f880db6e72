"""The cross-entropy's part of rows of logits as compiled for CPUs, on every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch

from megaforge.kernels.cross_entropy import native
from megaforge.kernels.cross_entropy.fused import FusedScores
from megaforge.kernels.native import why_missing
from tests.kernels import cross_entropy_cases
from tests.kernels.cross_entropy_cases import *  # noqa: F403

pytestmark = pytest.mark.skipif(not native.COMPILED, reason=f"not built: {why_missing('pointwise', 'cpu')}")


@pytest.fixture(params=["avx512", "avx2", "scalar"], autouse=True)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAFORGE_CPU_ISA", request.param)
    monkeypatch.setattr(cross_entropy_cases, "FORM", native.CompiledScores)
    monkeypatch.setattr(cross_entropy_cases, "DEVICE", torch.device("cpu"))
    try:
        native.CompiledScores(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), 1).peak  # noqa: B018
    except RuntimeError as error:
        pytest.skip(str(error))


def test_the_number_of_threads_changes_nothing() -> None:
    logits, target = torch.randn(70, 1000), torch.randint(0, 900, (70,))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            scores = native.CompiledScores(logits.clone(), target, 900)
            total = scores.sums(scores.peak)
            found.append((total, scores.gradients_of_sum(total, torch.ones(70))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))
    assert not found[0][1][:, 900:].any()


def test_operators_have_shapes_without_values() -> None:
    logits, target, numbers = torch.randn(3, 8), torch.tensor([0, 7, 2]), torch.ones(3)
    for op, arguments in (
        (torch.ops.megaforge.label_scores, (logits, target, 6)),
        (torch.ops.megaforge.label_gradients_, (logits, target, numbers, numbers, numbers, 6)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_form_that_walks_over_logits_says_how() -> None:
    with pytest.raises(TypeError, match="abstract"):
        FusedScores(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), 1)  # type: ignore[abstract]
    assert issubclass(native.CompiledScores, FusedScores)

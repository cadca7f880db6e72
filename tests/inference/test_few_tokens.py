"""A model that generates multiplies few tokens by kernels of its own: the same scores as in training's forward pass."""

from __future__ import annotations

import pytest
import torch

from megaforge.inference import few_tokens
from megaforge.inference.generation import Continuations, Sampling
from megaforge.inference.restore import load_trained_model
from megaforge.kernels.gemv import is_compiled
from megaforge.parallel.layers import linears
from megaforge.parallel.linear_op import PLAIN
from tests.training.tiny import arguments, make_trainer, write_dataset

pytestmark = pytest.mark.skipif(not is_compiled("cpu"), reason="no compiled code: torch's products are what there is")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A trained model with every kind of layer: RWKV-7, attention, experts, dense FFN."""
    folder = tmp_path_factory.mktemp("few")
    prefix, save = write_dataset(folder / "data_text_document", documents=12), str(folder / "run")
    flags = ("--hybrid-layer-pattern", "RE*-", "--train-iters", "2", "--save", save, "--save-interval", "2")
    make_trainer(arguments(prefix, *flags)).train()
    return save


def scores(run: str, tokens: int, dtype: str | None = None) -> torch.Tensor:
    """Logits of the last of ``tokens`` that came one by one."""
    model = load_trained_model(run, device="cpu", dtype=dtype).model
    state = model.new_state()
    for token in range(tokens):
        logits = model.logits(torch.tensor([[token], [token + 1]]), state)
    assert logits is not None
    return logits


def test_every_full_precision_layer_has_it(run: str) -> None:
    model = load_trained_model(run, device="cpu").model._chunk
    ops = [layer.op for _, layer in linears(model)]
    assert len(ops) > 10 and all(isinstance(op, few_tokens.FewTokenLinear) for op in ops)


@pytest.mark.parametrize(("dtype", "within"), [(None, 2e-6), ("bf16", 2e-2)])
def test_scores_are_those_of_torch(run: str, dtype: str | None, within: float, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = scores(run, 6, dtype)
    monkeypatch.setattr(few_tokens, "is_compiled", lambda device_type: False)
    plain = scores(run, 6)
    assert fast.dtype == (torch.bfloat16 if dtype else torch.float32)
    assert float((fast.double() - plain.double()).norm() / plain.double().norm()) <= within


def test_tokens_are_those_of_torch(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def continued() -> list[dict[int, int]]:
        model = load_trained_model(run, device="cpu").model
        texts = Continuations(model, [[1, 2, 3], [4]], Sampling(temperature=0))
        return [texts.draw() for _ in range(8)]

    fast = continued()
    monkeypatch.setattr(few_tokens, "is_compiled", lambda device_type: False)
    assert fast == continued()


def test_with_gradients_it_is_the_plain_product() -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(2, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    op = few_tokens.FewTokenLinear()
    assert torch.equal(op.apply(x, weight), PLAIN.apply(x, weight))
    op.apply(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is not None

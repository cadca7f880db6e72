"""The whole RWKV-7 model, from imported weights, against BlinkDL's own inference package (rwkv on PyPI)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.param_spec import named_specs
from tests.checkpoint.rwkv7_weights import published_weights
from tests.checkpoint.test_import_rwkv7 import convert_rwkv7


def load(cfg: ModelConfig, tensors: dict[str, Tensor]) -> HybridModel:
    model = HybridModel(make_layer_context(cfg, ParallelContext.single()))
    with torch.no_grad():
        for spec, parameter in named_specs(model):
            parameter.copy_(tensors[spec.name])
    return model.eval()


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return published_weights()


@pytest.fixture(scope="module")
def expected(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[int], Tensor]:
    """Token ids and the package's logits after each of them."""
    if importlib.util.find_spec("rwkv") is None:
        pytest.skip("rwkv is not installed (pip install --no-deps rwkv==0.8.32)")
    with pytest.MonkeyPatch.context() as patch:  # the package reads these when it is imported
        for name, value in (("RWKV_V7_ON", "1"), ("RWKV_JIT_ON", "0"), ("RWKV_CUDA_ON", "0")):
            patch.setenv(name, value)
        from rwkv.model import RWKV

    path: Path = tmp_path_factory.mktemp("rwkv") / "model"
    torch.save(weights, f"{path}.pth")
    ids = torch.randint(0, 96, (45,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        logits, _ = RWKV(str(path), "cpu fp32").forward(ids, None, full_output=True)
    return ids, logits.float()


def test_logits_of_imported_weights_agree(weights: dict[str, Tensor], expected: tuple[list[int], Tensor]) -> None:
    ids, reference = expected
    model = load(*convert_rwkv7(weights))
    with torch.no_grad():
        logits = model.logits(torch.tensor([ids]))[0]
    assert logits.shape == reference.shape
    assert ((logits - reference).norm() / reference.norm()).item() <= 2e-5


def test_generation_agrees(weights: dict[str, Tensor], expected: tuple[list[int], Tensor]) -> None:
    """A prompt at once and then token by token, as generation does."""
    ids, reference = expected
    model = load(*convert_rwkv7(weights))
    state = model.new_state()
    with torch.no_grad():
        out = [model.logits(torch.tensor([ids[:20]]), state=state)[0]]
        out += [model.logits(torch.tensor([[token]]), state=state)[0] for token in ids[20:]]
    assert ((torch.cat(out) - reference).norm() / reference.norm()).item() <= 2e-5

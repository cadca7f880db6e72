"""The whole RWKV-7 model, from imported weights, against BlinkDL's own inference package (rwkv on PyPI)."""

from __future__ import annotations

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
from tests.oracles.rwkv_package import package_logits


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
    file = tmp_path_factory.mktemp("rwkv") / "model.pth"
    torch.save(weights, file)
    ids = torch.randint(0, 96, (45,), generator=torch.Generator().manual_seed(1)).tolist()
    return ids, package_logits(file, ids)


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

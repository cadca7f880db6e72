"""Llama 3.1's rotary frequencies against transformers' and a written-out form."""

from __future__ import annotations

import math

import pytest
import torch

from megaforge.config.model_config import ModelConfig
from megaforge.nn.rope import Rotary
from tests.nn.support import assert_close

CPU = torch.device("cpu")


def rotary(**changes: object) -> Rotary:
    cfg = ModelConfig(hidden_size=128, num_attention_heads=1, rotary_base=500000.0, **changes)  # type: ignore[arg-type]
    found = Rotary.of(cfg)
    assert found is not None
    return found


def one_by_one(factor: float) -> list[float]:
    """As the paper's code: by wavelengths."""
    out = []
    for i in range(64):
        frequency = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength > 8192 / 1:
            frequency /= factor
        elif wavelength >= 8192 / 4:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        out.append(frequency)
    return out


@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
def test_bands(factor: float) -> None:
    found = rotary(use_rope_scaling=True, rope_scaling_factor=factor).frequencies(CPU)
    assert_close(found, torch.tensor(one_by_one(factor), dtype=torch.float64), 1e-14, "frequencies")
    plain = rotary().frequencies(CPU)
    assert torch.equal(found[:16], plain[:16])  # fast ones stay
    assert_close(found[-8:], plain[-8:] / factor, 1e-14, "slow ones")


def test_as_transformers() -> None:
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    llama = pytest.importorskip("transformers.models.llama.configuration_llama")
    theirs = llama.LlamaConfig(
        hidden_size=128,
        num_attention_heads=1,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    expected, scale = rope.ROPE_INIT_FUNCTIONS["llama3"](theirs, CPU)
    assert scale == 1
    assert_close(rotary(use_rope_scaling=True).frequencies(CPU), expected.double(), 1e-6, "frequencies")


def test_none_where_no_channel_rotates() -> None:
    assert Rotary.of(ModelConfig(hidden_size=24, num_attention_heads=4, rotary_percent=0.2)) is None

"""Packed rows: as transformers packs them."""

from __future__ import annotations

import pytest
import torch

from megaforge.quant.formats.hf_bitnet import pack_rows, unpack_rows


def test_packs_and_unpacks() -> None:
    codes = torch.randint(-1, 2, (12, 5), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = pack_rows(codes)
    expected = [[sum((int(codes[r + 3 * i, k]) + 1) << 2 * i for i in range(4)) for k in range(5)] for r in range(3)]
    assert packed.dtype == torch.uint8 and packed.tolist() == expected
    assert torch.equal(unpack_rows(packed), codes)


def test_agrees_with_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    integration = pytest.importorskip("transformers.integrations.bitnet")
    codes = torch.randint(-1, 2, (16, 7), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    assert torch.equal(integration.pack_weights(codes.clone()), pack_rows(codes))


def test_refuses_what_has_no_place() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        pack_rows(torch.zeros(6, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="-1, 0 or 1"):
        pack_rows(torch.full((4, 4), 2, dtype=torch.int8))

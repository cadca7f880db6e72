"""The step of a token as a CUDA graph: the same tokens as without."""

from __future__ import annotations

import pytest
import torch

from tests.inference.test_recorded_steps import MODELS, assert_alike, build, texts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("pattern", ["R-*-R-", "*-*-", "RE*E"])
def test_graphs_give_the_same_tokens(pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = MODELS["hybrid"] | {"hybrid_layer_pattern": pattern}
    model = build("cuda", torch.bfloat16 if "E" in pattern else torch.float32, **settings)
    tokens, scores = texts(model)
    capsys.readouterr()
    model.record_steps()
    for room in (0, 32):
        played, found = texts(model, max_new_tokens=room)
        assert "cannot be recorded" not in capsys.readouterr().err
        if "E" in pattern:
            assert played[0][:4] == tokens[0][:4]
        else:
            assert played == tokens
            assert_alike(found, scores)

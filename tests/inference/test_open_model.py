"""Tools open a trained model by the same flags."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from megaforge.inference import open_model as module
from megaforge.inference import restore
from tools import evaluate, generate

SHARED = ("load", "tokenizer_model", "tp", "pp", "ema", "use_custom_kernels", "device", "dtype")
GIVEN = ["--load", "runs/x", "--tp", "2", "--ema", "--use-custom-kernels", "--device", "cpu", "--dtype", "bf16"]


def test_both_tools_read_the_same_flags() -> None:
    one = evaluate.parse_arguments([*GIVEN, "--input", "x"])
    other = generate.parse_arguments([*GIVEN, "--prompt", "x"])
    assert [getattr(one, name) for name in SHARED] == [getattr(other, name) for name in SHARED]
    assert [getattr(one, name) for name in SHARED] == ["runs/x", None, 2, 1, True, True, "cpu", "bf16"]


def test_each_flag_reaches_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(restore, "load_trained_model", lambda load, **more: asked.update(more, load=load))
    parser = argparse.ArgumentParser()
    module.add_model_flags(parser)
    module.open_model(parser.parse_args([*GIVEN, "--pp", "3"]))
    assert asked.pop("adapter") is None
    assert asked == {"load": "runs/x", "tp": 2, "pp": 3, "device": "cpu", "ema": True, "kernels": True, "dtype": "bf16"}

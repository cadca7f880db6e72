"""The BitNet example in small: its arms, what it says of them, and that every option of quantization does something."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megaforge.config.qat_config import QATConfig
from megaforge.config.quant_config import QuantConfig
from megaforge.errors import UserError
from tests.end_to_end.launch import REPO


@pytest.fixture(scope="module")
def arms() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("bitnet_arms", REPO / "examples" / "bitnet" / "arms.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path, precision = list(sys.path), torch.get_float32_matmul_precision()
    sys.modules["bitnet_arms"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    torch.set_float32_matmul_precision(precision)
    for name in ("bitnet_arms", "options"):
        sys.modules.pop(name, None)


def flags(corpus: Path, output: Path, *more: str) -> list[str]:
    data = ("--data", str(corpus / "text_text_document"), "--tokenizer", str(corpus / "tok.json"))
    return ["arms.py", *data, "--output", str(output), "--small", *more]


def test_every_option_of_quantization_does_something(
    arms: ModuleType, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the process: three steps of a tiny model for each."""
    monkeypatch.setattr(sys, "argv", flags(corpus, tmp_path, "--only", "options", "--check"))
    assert arms.main() == 0
    out = capsys.readouterr().out
    assert "CHANGES NOTHING" not in out and "records quant_error" in out
    rows = out[out.index("option (what it is added to)") :].splitlines()[1:]
    assert len(rows) == len(arms.OPTIONS)


def test_no_flag_of_quantization_lacks_a_row(arms: ModuleType) -> None:
    named = {flag for option in arms.OPTIONS for flag in (*option.base, *option.flags)}
    for section in (QuantConfig, QATConfig):
        for field in fields(section):
            assert f"--{field.name.replace('_', '-')}" in named, "give it a row in examples/bitnet/options.py"


def test_arms_are_trained_once_and_measured(
    arms: ModuleType, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {name: arms.ARMS[name] for name in (arms.FULL, arms.TERNARY)}
    monkeypatch.setattr(arms, "ARMS", kept)
    monkeypatch.setattr(sys, "argv", flags(corpus, tmp_path, "--only", "arms"))
    assert arms.main() == 0
    first = capsys.readouterr().out
    assert "--quant-lambda linear" in first and (tmp_path / "curves.png").stat().st_size > 1000
    [full] = [line.split() for line in first.splitlines() if line.startswith("full precision ")]
    [ternary] = [line.split() for line in first.splitlines() if line.startswith("ternary ")]
    assert full[5] == "1.00" and float(ternary[4]) > 1.5 and int(ternary[5].replace(",", "")) > 0
    assert arms.main() == 0
    assert "pretrain_cdrmix.py" not in capsys.readouterr().out
    monkeypatch.setattr(arms, "SMALL", replace(arms.SMALL, arm=5))
    with pytest.raises(UserError, match="full precision was trained there by another command"):
        arms.main()


def test_what_the_numbers_must_show(arms: ModuleType) -> None:
    def run(bits: float) -> object:
        return arms.Trained([1.0], ["loss"], {10: bits}, {})

    bits = {arms.FULL: 2.0, arms.TERNARY: 2.2}
    assert arms.faults_of_arms(bits, {arms.AT_ONCE: run(2.5), arms.BY_AND_BY: run(2.4)}) == []
    far, late = arms.faults_of_arms({**bits, arms.TERNARY: 2.21}, {arms.AT_ONCE: run(2.5), arms.BY_AND_BY: run(2.5)})
    assert far.startswith("ternary has 2.2100") and late.startswith("by and by has 2.5000")
    option = arms.Option(("--quant-noise", "0.5"))
    same = arms.Trained([1.0], ["loss"], {1: 2.0}, {"a": torch.tensor([1, 0], dtype=torch.int8)})
    assert not arms.changes(option, same, same) and "CHANGES NOTHING" in arms.row_of_option(option, same, same)
    assert arms.changes(option, same, replace(same, codes={"a": torch.tensor([1, 1], dtype=torch.int8)}))
    assert arms.changes(option, same, replace(same, losses=[1.5]))
    assert not arms.changes(replace(option, records="quant_error"), same, replace(same, losses=[1.5]))
    with pytest.raises(UserError, match="--small tells no arms apart"):
        arms.parse_arguments(["--data", "d", "--tokenizer", "t", "--output", "o", "--small", "--check"])

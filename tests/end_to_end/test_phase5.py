"""The ten steps of the 1-bit phase: by the script's own command for training, and refused where the report says no."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megaforge.compliance import report
from megaforge.compliance.measure import Finding
from megaforge.errors import UserError
from tests.end_to_end.launch import REPO


@pytest.fixture
def phase5() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("bitnet_phase5", REPO / "examples" / "bitnet" / "phase5.py")
    assert spec is not None and spec.loader is not None
    module, path = importlib.util.module_from_spec(spec), list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


def test_the_ten_steps(
    phase5: ModuleType,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = report.Report(rules=(), gates=(("no eval", ()),), waivers=())
    monkeypatch.setattr(report, "of_own_code", lambda: code)  # which other tests measure
    monkeypatch.setenv("MEGAFORGE_KEY_FILE", "it is taken away again when the test has ended")
    monkeypatch.delenv("MEGAFORGE_KEY_FILE")
    out = tmp_path / "out"
    data = ("--data", str(corpus / "text_text_document"), "--tokenizer", str(corpus / "tok.json"))
    more = ("--ranks", "1", "--epochs", "0.05", "--min-compliance-score", "0.8", "--output", str(out))
    monkeypatch.setattr(sys, "argv", ["phase5.py", *data, *more])
    assert phase5.main() == 0
    said = capsys.readouterr().out
    assert [line.split("/10")[0].strip() for line in said.splitlines() if "/10 " in line] == [*map(str, range(1, 11))]
    assert "compressed by bitnet to 1 bit" in said and "binary weights" in said and ", encrypted" in said
    trained = torch.load(out / "phase6" / "trained_model.pt", weights_only=True)
    assert trained["nasa_compliant"] and trained["bitnet_optimized"] and trained["phase5_complete"]
    content = json.loads((out / "run" / report.JSON_FILE).read_text())
    assert {one["name"]: one["share"] for one in content["controls"]}["audit"] == 1
    with pytest.raises(UserError, match="it is not empty"):
        phase5.main()

    theirs = phase5.TrainingConfig.from_file(out / "phase5.yaml")
    broken = replace(code, gates=(("no eval", (Finding("a.py:1", "x"),)),))
    monkeypatch.setattr(report, "of_own_code", lambda: broken)
    with pytest.raises(UserError, match="--enforce-compliance: .*no eval: 1"):
        phase5.hand_on(theirs, out)

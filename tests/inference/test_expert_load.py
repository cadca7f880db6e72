"""How experts are used on a text: against counts by hand, at every layout, and as the tool prints it."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megaforge.errors import UserError
from megaforge.inference.evaluation import read_dataset
from megaforge.inference.expert_load import ExpertUse, expert_use
from megaforge.inference.restore import load_trained_model
from tests.parallel.pool import RankPool
from tests.training.tiny import arguments, dense_arguments, make_trainer, write_dataset
from tools import evaluate

LENGTH, WINDOWS, FACTOR = 24, 5, 0.75
MODEL = ("--hybrid-layer-pattern", "REOE", "--mamba-head-dim", "8", "--mamba-num-groups", "2", "--rom-num-experts", "2")
MODEL += ("--rom-router-topk", "1", "--moe-router-pre-softmax", "--mod-capacity-factor", "0.5", "--mtp-num-layers", "1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(The checkpoints, the dataset) of a run of one step."""
    folder = tmp_path_factory.mktemp("run")
    prefix = write_dataset(folder / "d_text_document")
    make_trainer(arguments(prefix, *MODEL, "--train-iters", "1", "--save", str(folder / "save"))).train()
    return str(folder / "save"), prefix


def use_of(save: str, prefix: str, tp: int = 1, pp: int = 1) -> tuple[ExpertUse, ExpertUse]:
    world = str(dist.get_world_size() if dist.is_initialized() else 1)
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": world}
    # The pool's ranks have met already.
    with mock.patch.dict(os.environ, launched), mock.patch("megaforge.inference.restore.initialize"):
        trained = load_trained_model(save, tp=tp, pp=pp, device="cpu")
    stream = read_dataset(prefix, trained, "all")
    full, free = (
        expert_use(trained, stream, seq_length=LENGTH, batch_size=2, windows=WINDOWS, capacity_factor=factor)
        for factor in (FACTOR, None)
    )
    return full, free


def test_counts_are_those_of_training(run: tuple[str, str]) -> None:
    full, free = use_of(*run)
    trained = load_trained_model(run[0], device="cpu")
    stream = read_dataset(run[1], trained, "all")
    whole = (len(stream.tokens) - 1) // LENGTH
    rows = [
        torch.from_numpy(stream.tokens[s : s + LENGTH + 1].astype("int64"))
        for s in (n * whole // WINDOWS * LENGTH for n in range(WINDOWS))
    ]
    marks = torch.zeros(WINDOWS, LENGTH, dtype=torch.bool)
    for row in range(WINDOWS):
        start = row * whole // WINDOWS * LENGTH
        own = [d - start for d in stream.document_starts.tolist() if start <= d < start + LENGTH]
        marks[row, own] = True
    text = torch.stack(rows)
    model = trained.model.chunk.train()
    with torch.no_grad():
        assigned = model(text[:, :-1], text[:, 1:], torch.ones(WINDOWS, LENGTH), marks).experts[0, :3].double()
    assert [own.layer for own in free.layers] == ["0.ffn", "1.mixer", "1.ffn"], "no further prediction is made"
    assert [own.experts for own in free.layers] == [4, 2, 4] and free.capacity_factor is None
    assert assigned.sum(1).tolist() == [WINDOWS * 24 * 2, WINDOWS * 12, WINDOWS * 12 * 2], "half of them go on"
    for counts, own in zip(assigned, free.layers, strict=True):
        shares = [c / float(counts.sum()) for c in counts.tolist() if c]
        assert own.entropy_bits == pytest.approx(-math.fsum(s * math.log2(s) for s in shares))
        assert own.busiest == pytest.approx(float(counts.max()) * own.experts / float(counts.sum()))
        assert (own.capacity_used, own.overflow) == (None, 0.0)
    assert full.capacity_factor == FACTOR and (full.windows, full.tokens) == (WINDOWS, LENGTH)
    for own, places in zip(full.layers, (math.ceil(FACTOR * 48 / 4), math.ceil(FACTOR * 12 / 2), 5), strict=True):
        total = {"0.ffn": 48, "1.mixer": 12, "1.ffn": 24}[own.layer]
        assert own.capacity_used is not None and 0 < own.capacity_used <= 1
        assert own.capacity_used * own.experts * places == pytest.approx((1 - own.overflow) * total)
        assert own.overflow >= 1 - FACTOR - 0.1, "three quarters of the places that all would need"


def found_by_ranks(save: str, prefix: str) -> list[tuple[ExpertUse, ExpertUse]]:
    return [use_of(save, prefix, tp, pp) for tp, pp in ((2, 1), (1, 2), (1, 1))]


def test_every_layout_counts_the_same(ranks: RankPool, run: tuple[str, str]) -> None:
    expected = use_of(*run)
    for rank in ranks.run(2, found_by_ranks, *run):
        for found in rank:
            assert found == expected


def test_the_tool_prints_them(
    run: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["evaluate.py", "--load", run[0], "--input", run[1], "--part", "all", "--device", "cpu"]
    line += ["--expert-windows", "5", "--expert-capacity-factor", "0.75"]
    monkeypatch.setattr(sys, "argv", [*line, "--json"])
    assert evaluate.main() == 0
    told = json.loads(capsys.readouterr().out)["experts"]
    full, _ = use_of(*run)
    assert told == json.loads(json.dumps(full, default=vars)) and told["overflow"] > 0.1
    monkeypatch.setattr(sys, "argv", line)
    assert evaluate.main() == 0
    rows = capsys.readouterr().out.splitlines()[-6:]
    assert rows[0] == "experts in 5 windows of 24 tokens, chosen as in training; capacity factor 0.75"
    assert [row.split()[:2] for row in rows[2:5]] == [["0.ffn", "4"], ["1.mixer", "2"], ["1.ffn", "4"]]
    assert rows[5] == f"overflow {full.overflow:.2%} of all assignments"
    monkeypatch.setattr(sys, "argv", [*line[:-4], "--expert-windows", "0"])
    assert evaluate.main() == 0
    assert "experts" not in capsys.readouterr().out


def test_a_model_without_experts_has_no_capacity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_dataset(tmp_path / "d_text_document", documents=20)
    save = str(tmp_path / "save")
    make_trainer(dense_arguments(prefix, "*-", "--train-iters", "1", "--save", save)).train()
    line = ["evaluate.py", "--load", save, "--input", prefix, "--device", "cpu", "--expert-capacity-factor", "1.25"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(UserError, match="--expert-capacity-factor 1.25: .* has no layer with experts"):
        evaluate.main()

"""The memory of a teacher (``--distill-from``) in plans and dry runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megaforge.config.teacher import teacher_model
from megaforge.parallel.context import ParallelContext
from megaforge.planning.layout import layout_of
from megaforge.planning.plan_command import run
from megaforge.planning.search import worst_rank
from megaforge.planning.stages import cut_stages, model_parts
from megaforge.planning.teacher import teacher_bytes, teacher_pass
from megaforge.training.distillation import load_teacher
from megaforge.training.prepare import prepare
from megaforge.verification.dry_run import try_ranks
from tests.training.tiny import arguments, make_config, make_trainer, write_dataset

STUDENT = ("--hybrid-layer-pattern", "R-", "--hidden-size", "16", "--num-attention-heads", "2", "--objective")
STUDENT = (*STUDENT, "distillation", "--global-batch-size", "4")


def test_a_plan_counts_what_a_teacher_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix, save = write_dataset(tmp_path / "d_text_document"), str(tmp_path / "teacher")
    make_trainer(arguments(prefix, "--train-iters", "1", "--save", save)).train()
    argv = [*arguments(prefix, *STUDENT), "--distill-from", save]
    config = prepare(make_config(argv)).config
    teacher = load_teacher(config, ParallelContext.single(), None)
    alone = layout_of(config, 1)
    assert teacher_bytes(alone) == sum(parameter.nbytes for parameter in teacher.parameters()) > 0

    def total(name: str) -> float:
        given = dataclasses.replace(config, distill=dataclasses.replace(config.distill, distill_from=name))
        layout = layout_of(given, 1)
        parts = model_parts(config.model, torch.float32)
        return worst_rank(parts, layout, cut_stages(parts, layout)).total

    more = total(save) - total(str(tmp_path / "none"))
    assert teacher_bytes(alone) < more <= teacher_bytes(alone) + teacher_pass(alone)
    # The dry run builds the teacher of a split layout, and finds the plan right; so does who reads the plan.
    size = ("--vocab-size", str(config.model.vocab_size))
    split = make_config([*argv, *size, "--tp", "2", "--zero", "1"])
    _, [rank, *_] = try_ranks(split, 4)
    assert rank.teacher == teacher_bytes(layout_of(split, 4)) < teacher_bytes(alone)
    assert rank.total > rank.teacher + rank.state.total
    run([*argv, "--gpus", "1"])
    assert "the teacher's weights, in the total: 0.00 GB a rank" in capsys.readouterr().out


def test_a_teacher_that_is_elsewhere_is_told_of(tmp_path: Path) -> None:
    config = make_config([*arguments("corpus", *STUDENT), "--distill-from", str(tmp_path), "--vocab-size", "61"])
    found, note = teacher_model(config)
    assert found is None and note is not None and note.endswith("so the teacher's memory is not counted")
    assert teacher_bytes(layout_of(config, 1)) == 0 == teacher_pass(layout_of(config, 1))
    assert teacher_model(make_config(arguments("corpus"))) == (None, None)

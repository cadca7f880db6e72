"""``--elastic``: a run that goes on with other numbers of ranks learns what one that never stopped learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from megaforge.errors import UserError
from megaforge.planning.elastic import ElasticLayout
from megaforge.training.prepare import prepare
from tests.parallel.pool import RankPool
from tests.training.tiny import arguments, make_config, make_trainer, record, write_dataset

WRITTEN = ("--tp", "2", "--pp", "2", "--ep", "2", "--elastic", "2:4", "--machine", "h100-80g")


@pytest.mark.parametrize("text", ["4", "4:", ":4", "4:2", "0:4", "a:b", "2:4:8", "-1:4", "2.5:4"])
def test_bounds_are_two_numbers_in_order(text: str) -> None:
    with pytest.raises(UserError, match="--elastic .*such as --elastic 8:32"):
        parse_config(["--mock-data", "--vocab-size", "64", "--global-batch-size", "8", f"--elastic={text}"], prog="t")


def test_the_number_of_ranks_is_within_the_bounds(tmp_path: Path) -> None:
    for bounds, words in (("2:4", "1 rank was started; wait until 2 are there"), ("2:2", "wait until 2")):
        config = make_config(arguments("nowhere", "--elastic", bounds))
        with pytest.raises(UserError, match=words):
            prepare(config)


def test_a_layout_is_kept_where_it_is_valid_and_else_chosen() -> None:
    config = make_config(arguments("nowhere", *WRITTEN, "--vocab-size", "61"))
    elastic = ElasticLayout()
    assert elastic.planned(config, 4) == (config, []) == elastic.planned(config, 8) and elastic.why is None
    chosen, notes = elastic.planned(config, 2)
    assert chosen.parallel.tensor_model_parallel_size * chosen.parallel.pipeline_model_parallel_size <= 2
    assert chosen.training.global_batch_size == config.training.global_batch_size
    assert notes[-1] == elastic.why and notes[-1].startswith("--elastic 2:4: ")
    assert "not for these 2 ranks: --tp 2" in notes[-2] or "not for these 2 ranks: --pp 2" in notes[-2]
    with pytest.raises(UserError, match="--elastic 2:4: --tp 2 does not divide the 37 ranks"):
        elastic.planned(config, 37)
    tight = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, memory_limit=1e-6))
    with pytest.raises(UserError, match=r"--elastic 2:4: its fullest rank needs .* GB by the plan, more than 0% of 80"):
        elastic.planned(tight, 4)


def _train(config: Config) -> list[dict[str, Any]]:
    import torch.distributed as dist

    from megaforge.training.setup import build_trainer, make_context

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(dist.get_rank()))
        patch.setenv("WORLD_SIZE", str(dist.get_world_size()))
        trainer = build_trainer(prepare(config), make_context(config, "cpu"))
        recorder = record(trainer)
        trainer.train()
    return recorder.records


def test_from_four_ranks_to_two_and_back(ranks: RankPool, tmp_path: Path) -> None:
    """The losses and norms of a run, of one rank, that never stopped."""
    prefix, save = write_dataset(tmp_path / "data_text_document"), str(tmp_path / "run")
    line = arguments(prefix, "--micro-batch-size", "1", "--train-iters", "4")
    trainer = make_trainer(line)
    recorder = record(trainer)
    trainer.train()
    expected, line, found, layouts = recorder.records, [*line, *WRITTEN], [], []
    for world, leave in ((4, "1"), (2, "3"), (4, "4")):
        more = ("--save", save, "--load", save, "--exit-interval", leave, "--vocab-size", "62")
        config, _ = ElasticLayout().planned(make_config([*line, *more]), world)
        layouts.append((config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size))
        [records, *_] = ranks.run(world, _train, config)
        found += records
    assert layouts[0] == layouts[2] == (2, 2) != layouts[1]
    assert [one["iteration"] for one in found] == [1, 2, 3, 4] == [one["iteration"] for one in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["consumed_samples"] == theirs["consumed_samples"]
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), (name, theirs["iteration"])

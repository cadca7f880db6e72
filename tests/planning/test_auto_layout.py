"""``--layout auto``: all ranks take what rank 0 chooses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from megaforge.config.check_layout import check_layout
from megaforge.config.cli import parse_config
from megaforge.config.launcher import Launch
from megaforge.config.layout_settings import given_settings
from megaforge.errors import UserError
from megaforge.planning.auto_layout import AutoLayout, Decision, agreed
from megaforge.planning.machine import Stand

SMALL = ("--config", "cdrmix-test", "--vocab-size", "500", "--layout", "auto", "--device", "cpu")
PLANNED = (*SMALL, "--global-batch-size", "8", "--micro-batch-size", "1", "--machine", "h100-80g")


def test_ranks_agree_on_what_rank_0_decides() -> None:
    def decide(stands: list[Stand]) -> Decision:
        if stands[1].memory < 1:
            raise UserError("too small")
        return {"values": {}, "notes": [], "why": f"{[stand.memory for stand in stands]}"}

    def start(memories: list[float]) -> list[object]:
        store = HashStore()
        store.set_timeout(timedelta(minutes=5))

        def rank(number: int) -> object:
            try:
                stand = Stand("a", "cpu", memories[number], 1)
                return agreed(store, Launch("torchrun", number, 3, number), stand, decide)
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor(3) as threads:
            return list(threads.map(rank, range(3)))

    assert start([3.0, 4.0, 5.0]) == [{"values": {}, "notes": [], "why": "[3.0, 4.0, 5.0]"}] * 3
    assert start([3.0, 0.5, 5.0]) == ["too small"] * 3


def test_one_process_chooses_alone_and_a_dry_run_plans() -> None:
    parsed = parse_config([*SMALL, "--global-batch-size", "8", "--zero", "2"])
    config, chooser = parsed.config, AutoLayout(given_settings(parsed.origins), parsed.origins)
    chosen, notes = chooser(config)
    assert notes == [chooser.why] and "of 1 x cpu" in notes[0]
    assert (chosen.parallel.zero_stage, chosen.data, chosen.training.global_batch_size) == (2, config.data, 8)
    with pytest.raises(UserError, match="add --machine, such as h100-80g"):
        chooser.planned(config, 4)
    planned, notes = chooser.planned(parse_config(PLANNED).config, 4)
    assert check_layout(planned, 4).batches.size == 8 and "of 4 x h100-80g" in notes[0]


def test_the_limit_on_memory_holds_for_the_choice() -> None:
    parsed = parse_config([*PLANNED, "--memory-limit", "0.001", "--recompute", "full", "--tp", "1"])
    with pytest.raises(UserError, match="within 0% of 80 GB"):
        AutoLayout(given_settings(parsed.origins), parsed.origins).planned(parsed.config, 1)


def test_a_choice_goes_with_the_other_flags() -> None:
    """A teacher stands whole on a rank, which --pp would cut, and relations are of whole sequences and blocks."""
    flags = ("--objective", "distillation", "--distill-from", "nowhere", "--distill-relation-weight", "1")
    given = ("--tp", "1", "--ep", "1", "--global-batch-size", "3", "--num-layers", "3", "--quantize-weights", "ternary")
    parsed = parse_config([*PLANNED, *flags, *given])
    kept = given_settings(parsed.origins)
    with pytest.raises(UserError, match="no layout"):  # dp 2 does not divide the batch, and --pp 2 would
        AutoLayout(kept, parsed.origins).planned(parsed.config, 2)
    assert AutoLayout(kept).planned(parsed.config, 2)[0].parallel.pipeline_model_parallel_size == 2

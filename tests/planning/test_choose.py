"""The layout chosen for a run, and what of it the user may fix."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megaforge.config.check_layout import check_layout
from megaforge.config.cli import ParsedConfig, parse_config
from megaforge.config.layout_settings import given_settings
from megaforge.errors import UserError
from megaforge.planning.choose import choose_layout
from megaforge.planning.gpus import GPUS, Gpu, gpu_named
from megaforge.planning.layout import LIBRARIES, layout_of
from megaforge.planning.plan_command import run

H100 = GPUS["h100-80g"]
SMALL = ("--config", "cdrmix-test", "--vocab-size", "500", "--num-layers", "4", "--global-batch-size", "12")


def parsed(*more: str) -> ParsedConfig:
    return parse_config([*SMALL, *more])


def test_a_choice_is_a_run_of_these_ranks_and_what_is_given_holds() -> None:
    free = parsed().config
    for ranks in (1, 3):
        choice = choose_layout(free, ranks, H100)
        assert check_layout(choice.config, ranks).batches.size == 12, "what is learned does not depend on the ranks"
        assert layout_of(choice.config, ranks) == choice.found.layout
        assert choice.flags in choice.why and "\n" not in choice.why
        typed = parsed(*choice.flags.split()).config
        assert layout_of(typed, ranks) == choice.found.layout, "the flags can be copied"
    given = parsed("--pp", "2", "--sp", "--ep", "2", "--etp", "1", "--zero", "0", "--recompute", "full")
    kept = given_settings(given.origins)
    choice = choose_layout(given.config, 4, H100, kept)
    layout = choice.found.layout
    assert (layout.pp, layout.ep, layout.etp, layout.zero, layout.recompute) == (2, 2, 1, 0, "full")
    assert choice.config.parallel.sequence_parallel == (layout.tp > 1)
    assert choice == choose_layout(given.config, 4, H100, kept)
    assert "with --sequence-parallel, --pipeline-model-parallel-size," in choice.why
    stages = parsed("--pp", "2", "--vpp", "2", "--micro-batch-size", "1")
    layout = choose_layout(stages.config, 2, H100, given_settings(stages.origins)).found.layout
    assert (layout.vpp, layout.micro_batch_size, layout.schedule_name) == (2, 1, "interleaved")
    blocks = parsed("--pp", "2", "--num-layers-per-virtual-pipeline-stage", "1", "--micro-batch-size", "1")
    choice = choose_layout(blocks.config, 2, H100, given_settings(blocks.origins))
    assert layout_of(choice.config, 2).vpp == 2 and choice.config.parallel.virtual_pipeline_model_parallel_size is None


def test_presets_do_not_fix_a_layout_and_a_users_file_does(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("base: cdrmix-test\nparallel:\n  zero_stage: 2\n")
    assert given_settings(parsed().origins) == set()
    assert given_settings(parse_config(["--config", str(own), "--tp", "2", "--lr", "1"]).origins) == {
        "parallel.zero_stage",
        "parallel.tensor_model_parallel_size",
    }


def test_where_nothing_has_room_more_is_shared_out() -> None:
    """Long sequences over cp, then gradients; and an error once that does not do."""
    config = parsed("--seq-length", "2048", "--micro-batch-size", "1", "--ddp-bucket-size", "1000").config
    kept = {f"parallel.{name}" for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "recompute")}
    kept |= {"training.micro_batch_size", "parallel.expert_model_parallel_size"}
    whole = choose_layout(config, 2, H100, kept).found
    assert (whole.layout.cp, whole.layout.zero) == (1, 1)

    def beneath(needed: float) -> Gpu:
        return dataclasses.replace(H100, memory=(needed - 1) / 0.9)

    split = choose_layout(config, 2, beneath(whole.memory.total), kept).found
    assert (split.layout.cp, split.layout.zero) == (2, 1)
    whole_sequences = {*kept, "parallel.context_parallel_size"}
    shared = choose_layout(config, 2, beneath(whole.memory.total), whole_sequences).found
    assert (shared.layout.cp, shared.layout.zero) == (1, 2)
    with pytest.raises(UserError, match=r"no layout beside .*--micro-batch-size stays within 90% .* start more ranks"):
        choose_layout(config, 2, dataclasses.replace(H100, memory=LIBRARIES), kept)


def test_what_cannot_be_chosen_is_refused() -> None:
    config = parsed().config
    without = dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=None))
    with pytest.raises(UserError, match="add --global-batch-size N, such as 4"):
        choose_layout(without, 4, H100)
    with pytest.raises(UserError, match="no layout is valid for a global batch of 12; give another number of ranks"):
        choose_layout(config, 11, H100)


def test_a_device_may_come_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({"device": dataclasses.asdict(H100) | {"name": "own"}, "hosts": ["a"]}))
    assert gpu_named(str(path)) == dataclasses.replace(H100, name="own")
    run([*SMALL, "--gpu", str(path), "--gpus", "2", "--search", "--tp", "2", "--micro-batch-size", "1", "--top", "50"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--")]
    assert len(rows) > 1 and all(row.startswith("--tp 2 ") for row in rows), "a flag given is kept"
    for text, words in (
        ("{}", "no object 'device'"),
        ('{"device": {"name": "x"}}', "device.memory is not a positive number"),
        (json.dumps({"device": dataclasses.asdict(H100) | {"matmul": -1}}), "device.matmul"),
        ("[", "machine.json"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            gpu_named(str(path))
    with pytest.raises(UserError, match=r"--gpu nowhere.json: .*docs/planner.md"):
        gpu_named("nowhere.json")

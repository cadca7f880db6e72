"""What a run tells of itself."""

from __future__ import annotations

from pathlib import Path

from megaforge.monitor.events import read_events
from tests.training.tiny import arguments, make_trainer, write_dataset


def test_a_run_and_its_continuation_tell_their_story(tmp_path: Path) -> None:
    prefix, save = write_dataset(tmp_path / "data"), str(tmp_path / "run")
    flags = ("--save", save, "--load", save, "--eval-iters", "1", "--eval-interval", "2", "--save-interval", "2")
    make_trainer(arguments(prefix, *flags, "--train-iters", "2")).train()
    make_trainer(arguments(prefix, *flags, "--train-iters", "4")).train()
    events, torn = read_events(tmp_path / "run" / "events.jsonl")
    assert torn is None
    kinds = [event["kind"] for event in events if event["kind"] in ("start", "train", "evaluate", "save", "end")]
    assert kinds == ["start", "train", "evaluate", "save", "end"] * 2
    first, last = events[0], events[-1]
    assert first["layout"]["world"] == 1 and first["train_iters"] == 2
    assert last["iteration"] == 4 and last["complete"]
    assert [event["step"] for event in events if event["kind"] == "save"] == [2, 4]

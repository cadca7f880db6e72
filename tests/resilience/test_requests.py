"""What a rank hears, and that all ranks act on what one of them heard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megaforge.parallel.context import ParallelContext
from megaforge.resilience import requests as module
from megaforge.resilience.requests import Requests, make_requests, minutes_left
from tests.parallel.pool import RankPool
from tests.training.tiny import arguments, make_config, make_trainer, write_dataset


def test_a_signal_is_a_reason_and_the_same_one_passed_on_is_no_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    requests = Requests()
    assert requests.stop_reason(requests.votes()) is None
    assert requests.hear(signal.SIGUSR1) is None
    assert requests.stop_reason(requests.votes()) == "SIGUSR1"
    now += 2.9
    assert requests.hear(signal.SIGTERM) is None, "the launcher's SIGTERM after the scheduler's SIGUSR1"
    now += 0.1
    assert requests.hear(signal.SIGINT) == 130 and requests.hear(signal.SIGTERM) == 143


def test_time_ends_a_run_and_asks_for_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    requests = Requests(10, 3, "--exit-duration-in-mins 10 is over")
    seen = []
    for now in (179.0, 180.0, 599.0, 600.0):
        votes = requests.votes()
        seen.append((requests.save_is_due(votes), requests.stop_reason(votes)))
        if now == 180.0:
            requests.saved()
    over = "--exit-duration-in-mins 10 is over"
    assert seen == [(False, None), (True, None), (True, None), (True, over)]


def test_a_slurm_jobs_end_is_heeded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module.time, "time", lambda: 1000.0)

    def job(minutes: float) -> dict[str, str]:
        return {"SLURM_JOB_END_TIME": str(1000 + round(60 * minutes))}

    assert [minutes_left(lead, job(100)) for lead in (None, 30, 0)] == [90, 70, None]
    assert minutes_left(None, job(1000)) == 985 and minutes_left(20, job(5)) == 0
    assert minutes_left(None, {}) is None and minutes_left(None, {"SLURM_JOB_END_TIME": "Unknown"}) is None
    for own, minutes, told in ((91, 90, "the SLURM job ends soon"), (89, 89, "--exit-duration-in-mins 89 is over")):
        line = ["--mock-data", "--vocab-size", "64", "--save", "r", "--exit-duration-in-mins", str(own)]
        requests = make_requests(make_config(line), job(100))
        assert (requests.exit_minutes, requests.time_over) == (minutes, told)
    assert "saves and ends in 90.0 minutes" in capsys.readouterr().err


def _train(argv: list[str], heard: dict[int, int]) -> tuple[int, str | None, bool]:
    """Trains on one rank of a group; ``heard``: the signal that each rank has heard before its first step."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    try:
        trainer = make_trainer(argv, ParallelContext.create(tp=2))
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
    requests = Requests()
    if heard.get(-1) == rank:  # during the second step
        inner = trainer.engine.forward_backward

        def hearing(*args, **kwargs):  # type: ignore[no-untyped-def]
            if trainer.iteration == 1:
                requests.hear(signal.SIGUSR1)
            return inner(*args, **kwargs)

        trainer.engine.forward_backward = hearing  # type: ignore[method-assign]
    elif rank in heard:
        requests.hear(heard[rank])
    trainer.train(requests)
    return trainer.iteration, trainer.stop_reason, trainer.saved_iteration == trainer.iteration


@pytest.mark.parametrize(
    ("heard", "expected"),
    [
        ({1: signal.SIGTERM}, (0, "SIGTERM", True)),  # while it was set up: before the first step, nothing to save
        ({-1: 1}, (2, "SIGUSR1", True)),
        ({}, (3, None, True)),
    ],
)
def test_all_ranks_end_after_the_same_step(
    ranks: RankPool, tmp_path: Path, heard: dict[int, int], expected: tuple[int, str | None, bool]
) -> None:
    prefix = write_dataset(tmp_path / "data_text_document", documents=12)
    save = tmp_path / "run"
    flags = ("--tp", "2", "--train-iters", "3", "--save", str(save), "--save-interval", "0", "--load", str(save))
    assert ranks.run(2, _train, arguments(prefix, *flags), heard) == [expected, expected]
    assert (save / f"step_{expected[0]:07d}").is_dir() == (expected[0] > 0)


def test_the_second_signal_leaves_a_process_that_is_stuck() -> None:
    """The main thread sits in a call that never returns to Python, as in a collective whose peer is gone."""
    code = (
        "import threading; from megaforge.resilience import requests as r; r.REPEAT_SECONDS = 1e-9\n"
        "r.Requests().listen(True); print('ready', flush=True)\n"
        "lock = threading.Lock(); lock.acquire(); lock.acquire()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        said = process.stderr.readline()  # it has heard the first one, and says so without leaving
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + signal.SIGTERM
    assert "ends after this step" in said and "leaving at once" in err

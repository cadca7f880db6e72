"""Source 002's group on errors: what cannot be is said by name, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaforge.checkpoint.lock import take_lock
from megaforge.errors import UserError
from megaforge.fleet.command import train
from megaforge.fleet.processes import LocalJob, marked
from megaforge.fleet.recipe import read_fleet
from megaforge.fleet.supervisor import Supervisor
from tests.fleet.fakes import Starter, manager, write_fleet

OK = "flags: {mock_data: true, vocab_size: 64}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "models is missing"),
        ("models: [{name: a}, {name: a}]\n", "two models are called a"),
        ("models: [{name: a, output: x/y}, {name: b, output: x}]\n", "give each its own directory"),
        ("models: [{name: a, output: x}, {name: b, output: ./x/}]\n", "give each its own directory"),
        ("models: [{name: ../a}]\n", "name '../a'"),
        ("models: [{name: a, rank: 2}]\n", "unknown key 'rank'; did you mean ranks?"),
        ("models: [{name: a, script: train.py}]\n", "script"),
        ("models: {name: a}\n", "models must be a list"),
        ("models: [{name: a, flags: {save: x}}]\n", "save: the fleet gives each model its own"),
        ("models: [{name: a, flags: {lr: {x: 1}}}]\n", "lr: expected one value or a list"),
        ("modes: series\nmodels: [{name: a}]\n", "unknown key 'modes'; did you mean mode?"),
        ("mode: threads\nmodels: [{name: a}]\n", "mode"),
        ("workers: 0\nmodels: [{name: a}]\n", "fleet.workers: must be at least 1 and at most 1024, got '0'"),
        ("slurm_gpus: 1\nmodels: [{name: a}]\n", "launcher local"),
        ("sweep: {lr: 1}\nmodels: [{name: a}]\n", "sweep.lr: expected a list"),
        ("sweep: {lr: [1, 1]}\nmodels: [{name: a}]\n", "a value stands there twice"),
        ("models: [{name: a, flags: {lrr: 1}}]\n", "a: --lrr: unknown flag; did you mean --lr?"),
        ("models: [{name: a, flags: {lr: nan}}]\n", "a: --lr nan"),
    ],
)
def test_a_file_that_cannot_be_is_refused_before_anything_starts(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(OK + f"output: {tmp_path / 'out'}\n" + text)
    with pytest.raises(UserError, match=words.replace("?", r"\?").replace(".", r"\.")) as raised:
        Supervisor(read_fleet(str(path)), manager(), Starter())
    assert str(raised.value).startswith(str(path)) and not (tmp_path / "out").exists()


def test_no_room_no_output_and_a_second_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = write_fleet(tmp_path, "disk_gb_per_model: 1e8\n")
    with pytest.raises(UserError, match="3 models need 3e[+]08GB of disk, but only [0-9.]+GB are free; make room"):
        Supervisor(fleet, manager(), Starter()).run()
    for words, said in (
        (["--config", "none.yaml"], "--config none.yaml: cannot read it"),
        (["--config", str(tmp_path / "fleet.yaml"), "--workers", "x"], "--workers x: expected an integer"),
        (["--config", str(tmp_path / "fleet.yaml"), "--mode", "both"], "--mode both"),
    ):
        with pytest.raises(UserError, match=said):
            train(words)
    (tmp_path / "fleet.yaml").write_text((tmp_path / "fleet.yaml").read_text().replace("output:", "#"))
    with pytest.raises(UserError, match="--output is missing"):
        train(["--config", str(tmp_path / "fleet.yaml")])
    out, busy = (
        tmp_path / "out",
        "import sys; from megaforge.checkpoint.lock import take_lock; from pathlib import Path\n",
    )
    busy += "lock = take_lock(Path(sys.argv[1])); print('held', flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", busy, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    monkeypatch.setattr("megaforge.fleet.supervisor.take_lock", lambda directory: take_lock(directory, 0.0))
    with pytest.raises(UserError, match="another run saves there"):
        Supervisor(write_fleet(tmp_path), manager(), Starter()).run()
    other.communicate("\n")


# A rank that has a session of its own, as torchrun's have, and says when it is asked to end.
RANK = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1], 'w'), sys.exit(0)))\n"
RANK += "open(sys.argv[2], 'w'); time.sleep(600)"
LAUNCHER = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', *sys.argv[1:]], start_new_session=True)"
)
LAUNCHER += "; time.sleep(600)"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def test_no_process_is_left_behind(tmp_path: Path) -> None:
    asked, ready = tmp_path / "asked", tmp_path / "ready"
    line = [sys.executable, "-c", LAUNCHER, RANK, str(asked), str(ready)]
    job = LocalJob(line, tmp_path / "log", os.environ, patience=0.2)
    wait_for(ready)
    job.look()
    assert job.peak_memory() >= job.memory() > 1e6 and job.cpu_seconds() > 0
    assert len(list(marked(job._mark))) == 2 and job.poll() is None
    os.kill(int(str(job.pid)), signal.SIGKILL)  # the rank is an orphan now
    deadline = time.monotonic() + 300
    while (status := job.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert status == -signal.SIGKILL and not list(marked(job._mark))
    ready.unlink()
    code = "import os, sys, time; from megaforge.fleet.processes import LocalJob; from pathlib import Path\n"
    code += "LocalJob([sys.executable, '-c', *sys.argv[1:]], Path('log'), os.environ, 9.0); time.sleep(600)"
    line = [sys.executable, "-c", code, RANK, str(asked), str(ready)]
    supervisor = subprocess.Popen(line, cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()})
    wait_for(ready)
    supervisor.kill()
    supervisor.wait()
    wait_for(asked)  # it was asked to save and end

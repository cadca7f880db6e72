from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from megaforge.config.entry import launched_rank, run_entry
from megaforge.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE")
VARIABLES += ("SLURM_PROCID", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def start(body: str, rank: int, size: int) -> subprocess.Popen[str]:
    script = "from megaforge.config import entry\nfrom megaforge.errors import UserError\n"
    script += "entry._SECONDS_FOR_RANK_0 = 0.1\n"
    script += "def main():\n" + textwrap.indent(textwrap.dedent(body), "    ") + "\nentry.run_entry(main)\n"
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size)}
    return subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_rank_and_size_of_each_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched_rank() == (0, 1)
    for rank, size in zip(VARIABLES[0::2], VARIABLES[1::2], strict=True):
        with monkeypatch.context() as scoped:
            scoped.setenv(rank, "3")
            assert launched_rank() == (0, 1)
            scoped.setenv(size, "4")
            assert launched_rank() == (3, 4)


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3)])
def test_status_of_a_lone_process(returned: int | None, status: int) -> None:
    with pytest.raises(SystemExit) as ended:
        run_entry(lambda: returned)
    assert ended.value.code == status


def test_a_users_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise UserError("--lr -1: must be positive")

    with pytest.raises(SystemExit) as ended:
        run_entry(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --lr -1: must be positive\n"


def test_a_crash_shows_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_entry(lambda: 1 // 0)
    assert ended.value.code == 1
    assert capsys.readouterr().err.endswith("ZeroDivisionError: integer division or modulo by zero\n")


def test_every_rank_of_many_leaves_with_status_2() -> None:
    ranks = [start('print("said before"); raise UserError("no such file: x")', rank, 2) for rank in range(2)]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert [output for output, _ in outputs] == ["said before\n"] * 2
    assert [errors for _, errors in outputs] == ["error: no such file: x\n", "error (rank 1): no such file: x\n"]


def test_a_crashed_rank_of_many_does_not_wait_for_its_threads() -> None:
    body = """
    import threading
    threading.Thread(target=threading.Event().wait).start()
    raise ValueError("broken")
    """
    process = start(body, 1, 2)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    lines = errors.splitlines()
    assert lines[-1] == "[rank 1] ValueError: broken"
    assert all(line.startswith("[rank 1] ") for line in lines)


def test_torchrun_prints_a_common_mistake_once(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from megaforge.config.entry import run_entry\nfrom megaforge.errors import UserError\n"
        "import os, time\n"
        'def main():\n    time.sleep(0.2 * (os.environ["RANK"] == "0"))\n    raise UserError("a common mistake")\n'
        "run_entry(main)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("a common mistake") == 1
    assert "error: a common mistake\n" in done.stderr

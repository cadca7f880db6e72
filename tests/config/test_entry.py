from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megaforge.config.entry import run_entry
from megaforge.errors import UserError
from tests.end_to_end.launch import LIMIT

VARIABLES = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE")
VARIABLES += ("SLURM_STEP_ID", "TORCHELASTIC_ERROR_FILE")


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


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3)])
def test_status_of_a_lone_process(returned: int | None, status: int) -> None:
    with pytest.raises(SystemExit) as ended:
        run_entry(lambda: returned)
    assert ended.value.code == status


@pytest.mark.parametrize(("size", "said"), [(1, "done\nlate\n"), (2, "done\n")])
def test_a_rank_of_many_leaves_without_destructors_when_all_is_done(size: int, said: str) -> None:
    """Those of a process group have aborted runs that had finished."""
    process = start("import atexit; atexit.register(print, 'late'); print('done')", 0, size)
    out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out, err) == (0, said, "")


@pytest.mark.parametrize(("size", "returned", "said"), [(2, 0, "finalized\n"), (2, 3, ""), (1, 0, "")])
def test_mpirun_hears_of_a_rank_that_is_done(size: int, returned: int, said: str) -> None:
    """To Open MPI a rank that was in MPI and ends without finalizing has failed; a stand-in says when it is asked."""
    body = f"""
    import sys, types
    mpi = types.ModuleType("mpi4py.MPI")
    mpi.Is_initialized, mpi.Is_finalized = lambda: True, lambda: False
    mpi.Finalize = lambda: print("finalized", flush=True)
    sys.modules["mpi4py.MPI"] = mpi
    return {returned}
    """
    process = start(body, 0, size)
    assert process.communicate(timeout=LIMIT) == (said, "") and process.returncode == returned


def mistaken() -> None:
    raise UserError("--lr -1: must be positive")


def test_a_users_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_entry(mistaken)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --lr -1: must be positive\n"


def test_a_crash_shows_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_entry(lambda: 1 // 0)
    assert ended.value.code == 1
    assert capsys.readouterr().err.endswith("ZeroDivisionError: integer division or modulo by zero\n")


def test_every_rank_of_many_leaves_with_status_2() -> None:
    ranks = [start('print("said before"); raise UserError("no such file: x")', rank, 2) for rank in range(2)]
    outputs = [rank.communicate(timeout=LIMIT) for rank in ranks]
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
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    lines = errors.splitlines()
    assert lines[-1] == "[rank 1] ValueError: broken"
    assert all(line.startswith("[rank 1] ") for line in lines)


def test_torchruns_summary_has_a_common_mistake_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from megaforge.config import entry\nfrom megaforge.errors import UserError\n"
        "import os, pathlib, sys, time\n"
        "entry._SECONDS_FOR_RANK_0 = 600\n"  # until the launcher ends it, however busy that is
        "there = pathlib.Path(sys.argv[1])\n"
        'def main():\n    if os.environ["RANK"] == "1":\n        there.touch()\n'
        "    while not there.exists():\n        time.sleep(0.01)\n"
        '    raise UserError("a common mistake")\n'
        "entry.run_entry(main)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(script), str(tmp_path / "there")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode != 0
    assert done.stderr.count("a common mistake") == 1
    summary = done.stderr[done.stderr.index("Root Cause") :]
    assert "traceback : error: a common mistake\n" in summary


@pytest.mark.parametrize(("attempt", "spoken"), [("0", True), ("1", False)])
def test_torchrun_gets_the_error_of_its_last_attempt(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    attempt: str,
    spoken: bool,
) -> None:
    """In the form that torch reads; before a restart torchrun shows nothing, so the rank speaks."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    for main, status, words in (
        (mistaken, 2, "error: --lr -1: must be positive"),
        (lambda: 1 // 0, 1, "ZeroDivisionError: integer division or modulo by zero"),
    ):
        with pytest.raises(SystemExit) as ended:
            run_entry(main)
        assert ended.value.code == status
        failure = ProcessFailure(0, 1, status, str(file))
        assert words in ChildFailedError("x", {0: failure}).format_msg()
        assert (words in capsys.readouterr().err) == spoken


def test_a_full_disk_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        with open("/dev/full", "w") as file:
            file.write("x")

    with pytest.raises(SystemExit) as ended:
        run_entry(main)
    assert ended.value.code == 2
    assert "No space left on device" in capsys.readouterr().err

    def elsewhere() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/x")

    with pytest.raises(SystemExit) as ended:
        run_entry(elsewhere)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: /data/x: cannot be written: No space left on device")


def test_ctrl_c_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    for message in (None, "interrupted: run it again"):
        with pytest.raises(SystemExit) as ended:
            run_entry(main, message)
        assert ended.value.code == 130
        assert capsys.readouterr().err == (f"{message}\n" if message else "")


@pytest.mark.parametrize("body", ["while True: print('y' * 1000)", "print('short')", "print('x'); raise SystemExit(0)"])
def test_a_reader_that_leaves_is_no_fault(body: str) -> None:
    reader, writer = os.pipe()
    script = f"from megaforge.config.entry import run_entry\ndef main():\n    {body}\nrun_entry(main)\n"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    os.close(reader)
    _, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, errors) == (141, "")


def test_a_pipe_of_our_own_that_breaks_is_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(SystemExit) as ended:
        run_entry(main)
    assert ended.value.code == 1
    assert "Traceback" in capsys.readouterr().err


def test_output_that_finds_no_room() -> None:
    """Python's own buffer is full of it until the end."""
    script = "from megaforge.config.entry import run_entry\nrun_entry(lambda: print('x'))\n"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EISDIR])
def test_a_path_that_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str], number: int) -> None:
    def main() -> None:
        raise OSError(number, os.strerror(number), "runs/x")

    with pytest.raises(SystemExit) as ended:
        run_entry(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: runs/x: {os.strerror(number)}; ")

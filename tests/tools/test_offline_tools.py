"""The three offline commands as a user runs them: exit codes, messages, kill and resume, ranks, start-up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megaforge.data.preprocess.ranks import FileRanks, SingleRank, discover_ranks
from megaforge.errors import UserError
from tests.data.corpus_files import REPOSITORY, bpe_tokenizer, command, documents, run_tool, write_jsonl
from tests.disk_log import disk_log
from tests.held import held, is_alive, until

for package in ("tokenizers", "orjson", "zstandard"):
    pytest.importorskip(package, reason="needs the data extra")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bpe_tokenizer(tmp_path_factory.mktemp("bpe") / "tok.json")


def dataset(directory: Path, name: str = "p") -> tuple[bytes, bytes]:
    """The published files' bytes."""
    return (directory / f"{name}_text_document.bin").read_bytes(), (
        directory / f"{name}_text_document.idx"
    ).read_bytes()


def test_text_to_tokens_by_three_commands(tmp_path: Path) -> None:
    for number, text in enumerate(documents(60)):
        (tmp_path / f"{number}.txt").write_text(text)
    corpus, held, model = tmp_path / "c.jsonl.zst", tmp_path / "h.jsonl", tmp_path / "t.json"
    steps = [
        ("directory_to_jsonl", "--input", tmp_path, "--output", corpus, "--holdout-fraction", 0.2)
        + ("--holdout-output", held),
        ("train_tokenizer", "--input", corpus, "--vocab-size", 300, "--output", model),
        ("preprocess_data", "--input", corpus, held, "--output-prefix", tmp_path / "p", "--tokenizer-model", model)
        + ("--append-eod", "--workers", 2),
    ]
    for tool, *arguments in steps:
        result = run_tool(str(tool), *arguments)
        assert result.returncode == 0, result.stderr
    assert "MB/s" in result.stderr and "tokens/s" in result.stderr
    sidecar = json.loads((tmp_path / "p_text_document.json").read_text())
    assert sidecar["documents"] == 54 and sidecar["tokenizer"]["vocab_size"] == 300


@pytest.mark.parametrize("tool", ["directory_to_jsonl", "train_tokenizer", "preprocess_data"])
def test_a_mistake_gives_one_line_and_status_2(tool: str, tmp_path: Path) -> None:
    arguments = {
        "directory_to_jsonl": ("--output", tmp_path / "o"),
        "train_tokenizer": ("--vocab-size", 300, "--output", tmp_path / "o.json"),
        "preprocess_data": ("--output-prefix", tmp_path / "o", "--tokenizer-model", tmp_path / "t.json"),
    }[tool]
    result = run_tool(tool, "--input", tmp_path / "missing.jsonl", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --input") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_no_worker_and_is_continued(bpe: str, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", documents(9000, longest=100))
    arguments = ("--input", corpus, "--tokenizer-model", bpe, "--append-eod", "--shard-mb", 1)
    assert run_tool("preprocess_data", *arguments, "--output-prefix", tmp_path / "q").returncode == 0

    mine = [*arguments, "--output-prefix", tmp_path / "p", "--workers", 2, "--no-fast"]
    partial, go_on = tmp_path / "p_text_document.partial", tmp_path / "go_on"
    environment = held(tmp_path / "held", str(partial / "*.manifest.json"), 1, go_on)
    process = subprocess.Popen(command("preprocess_data", *mine), stderr=subprocess.DEVNULL, env=environment)
    until(lambda: list(partial.glob("*.manifest.json")) or process.poll() is not None)
    assert process.poll() is None, process.returncode
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.glob("p_text_document.*n")) and len(children) == 2
    go_on.touch()
    until(lambda: not any(is_alive(int(child)) for child in children))

    kept = len(list(partial.glob("*.manifest.json")))
    result = run_tool("preprocess_data", *mine)
    assert result.returncode == 0, result.stderr
    assert f"continuing a run that finished {kept} shards" in result.stderr
    assert dataset(tmp_path, "p") == dataset(tmp_path, "q")
    assert not partial.exists()


def test_two_runs_cannot_write_one_dataset(bpe: str, tmp_path: Path) -> None:
    import fcntl

    corpus = write_jsonl(tmp_path / "c.jsonl", documents(10))
    partial = tmp_path / "p_text_document.partial"
    partial.mkdir()
    with (partial / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = run_tool(
            "preprocess_data", "--input", corpus, "--output-prefix", tmp_path / "p", "--tokenizer-model", bpe
        )
    assert result.returncode == 2 and "another process is writing" in result.stderr


def test_start_up_loads_no_torch(bpe: str) -> None:
    for tool in ("directory_to_jsonl", "train_tokenizer", "preprocess_data"):
        code = (
            f"import sys; sys.path.insert(0, {str(REPOSITORY / 'tools')!r}); import {tool}; "
            "import megaforge.data.preprocess.worker; assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def _mpirun() -> str | None:
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


@pytest.mark.skipif(_mpirun() is None, reason="no mpirun (the mpich wheel brings one)")
def test_mpi_ranks_make_the_same_files(bpe: str, tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="needs the mpi extra")
    corpus = write_jsonl(tmp_path / "c.jsonl", documents(9000, longest=100))
    arguments = ["--input", corpus, "--tokenizer-model", bpe, "--append-eod", "--shard-mb", 1]
    launcher = [str(_mpirun()), "-n", "2"]
    result = run_tool("preprocess_data", *arguments, "--output-prefix", tmp_path / "p", prefix=launcher)
    assert result.returncode == 0, result.stderr
    assert "rank 1 of 2" in result.stderr
    assert run_tool("preprocess_data", *arguments, "--output-prefix", tmp_path / "q").returncode == 0
    assert dataset(tmp_path, "p") == dataset(tmp_path, "q")

    corpus.write_text(corpus.read_text() + "{\n")
    result = run_tool("preprocess_data", *arguments, "--output-prefix", tmp_path / "p", prefix=launcher)
    assert result.returncode == 2 and "line 9001: not valid JSON" in result.stderr


def test_srun_ranks_make_the_same_files(bpe: str, tmp_path: Path) -> None:
    """srun only sets the environment; the ranks find each other through the file system."""
    corpus = write_jsonl(tmp_path / "c.jsonl", documents(9000, longest=100))
    arguments = ["--input", corpus, "--tokenizer-model", bpe, "--append-eod", "--shard-mb", 1]
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}

    def srun(*more: object) -> list[tuple[int, str]]:
        started = [
            subprocess.Popen(
                command("preprocess_data", *arguments, *more),
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **step, "SLURM_PROCID": str(rank)},
            )
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=300)[1] for process in started]
        return [(process.returncode, text) for process, text in zip(started, outputs, strict=True)]

    for status, text in srun("--output-prefix", tmp_path / "p"):
        assert status == 0, text
    assert run_tool("preprocess_data", *arguments, "--output-prefix", tmp_path / "q").returncode == 0
    assert dataset(tmp_path, "p") == dataset(tmp_path, "q")
    assert not list(tmp_path.glob("*ranks*")) and not list(tmp_path.glob("*.partial"))

    corpus.write_text(corpus.read_text() + "{\n")
    for status, text in srun("--output-prefix", tmp_path / "r"):
        assert status == 2 and "line 9001: not valid JSON" in text


def test_what_a_rank_says_is_whole_before_others_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = disk_log(tmp_path, monkeypatch)
    group = FileRanks(tmp_path / "ranks", 0, 2, silence=0.1, poll=0.02)
    with pytest.raises(UserError, match="silent"):
        group.gather({"said": "x" * 10_000})
    group.close()
    told = [new for call, old, new in (one for one in done if len(one) == 3) if call == "replace" and old != new]
    assert told and all(os.path.basename(new).endswith(".json") for new in told)


def test_a_silent_rank_is_given_up(tmp_path: Path) -> None:
    group = FileRanks(tmp_path / "ranks", 0, 2, silence=0.3, poll=0.02)
    with pytest.raises(UserError, match="rank 1 of 2 has been silent"):
        group.gather("hello")
    group.close()


def test_a_batch_script_is_no_job_step() -> None:
    environment = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}
    assert isinstance(discover_ranks("unused", environment), SingleRank)

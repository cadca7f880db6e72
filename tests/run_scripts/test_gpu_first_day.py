"""The first half hour on a GPU, without one: its runner on steps that fail, hang and say nothing, and its table."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megaforge.config.check_layout import check_layout
from megaforge.config.cli import parse_config
from tests.bench.bench_gpu_kernels import (
    HEADER,
    LAYERS,
    LOGITS,
    MATRICES,
    PACKED_SHAPES,
    POINTWISE_SHAPES,
    SCHEMES,
    SHAPES,
    dry,
)
from tests.bench.gpu_pointwise import all_calls
from tests.bench.harness import print_table
from tests.gpu.first_day import __main__ as command
from tests.gpu.first_day import layer, runner
from tests.gpu.first_day.kernel_time import by_kind
from tests.gpu.first_day.runner import Figure, Step, pattern, report, run_step, run_steps
from tests.gpu.first_day.steps import ITERATIONS, NEWTON_SCHULZ, PACKED, POINTWISE, WKV, steps
from tests.held import time_begins_with

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"PATH": "/usr/bin:/bin"}
SPEED = pattern(r"^speed (\S+)$")


def shell(name: str, program: str, limit: float = 600, **more: object) -> Step:
    return Step(name, ["bash", "-c", program], limit, [Figure("speed", "2 to 3", SPEED, low=2, high=3)], **more)


def test_a_report_is_complete_whatever_the_steps_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time_begins_with(tmp_path / "said", monkeypatch)
    table = [
        shell("good", "echo speed 2.5"),
        shell("failing", "echo speed 1.0; echo '<oh> | no' >&2; exit 3"),
        shell("hanging", f"echo speed 2.0; touch {tmp_path}/said; sleep 600 & wait", limit=0.5),
        shell("silent", "echo nothing to read"),
        shell("wordy", "echo speed fast"),
        shell("without its tool", "echo speed 2.5", needs="no-such-program"),
        Step("without its command", ["/no/such/program"], 5),
    ]
    seen: list[int] = []
    outcomes = run_steps(table, 3600, ENVIRONMENT, after=lambda so_far: seen.append(len(so_far)))
    assert seen == list(range(1, 8))
    status = [outcome.status for outcome in outcomes]
    assert status[:2] == ["done", "failed: exit code 3"] and status[2].startswith("stopped after")
    assert status[3:6] == ["done", "done", "left out: no-such-program is not on PATH"]
    assert status[6].startswith("failed: ")
    page = report(outcomes, ["one | two"])
    rows = [line for line in page.splitlines() if line.startswith("|  | speed")]
    assert rows == [
        "|  | speed | 2.5 | 2 to 3 | as expected |",
        "|  | speed | 1.0 | 2 to 3 | differs |",
        "|  | speed | 2.0 | 2 to 3 | as expected |",  # what it said before it hung
        "|  | speed | - | 2 to 3 | not measured |",
        "|  | speed | fast | 2 to 3 | differs |",
        "|  | speed | - | 2 to 3 | not measured |",
    ]
    assert "- one \\| two" in page and "&lt;oh&gt; | no" in page and "nothing to read" in page
    assert page.count("\n## ") == 4  # failing, hanging, silent, wordy
    assert all(f"| {step.name} | status |" in page for step in table)


def test_a_stopped_step_takes_its_children_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe whose other end a child holds: it has an end once the child is gone."""
    pipe, begun = tmp_path / "pipe", tmp_path / "begun"
    time_begins_with(begun, monkeypatch)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    outcome = run_step(shell("", f"(exec 3>{pipe}; touch {begun}; sleep 120; echo late >&3) & wait"), 0.3, ENVIRONMENT)
    assert outcome.status.startswith("stopped")
    os.set_blocking(reader, True)
    assert os.read(reader, 9) == b""
    os.close(reader)


def test_steps_without_time_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by 0.3 s whenever it is looked at."""
    looks = itertools.count()
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: 0.3 * next(looks)))
    table = [shell("long", "sleep 600", limit=0.1), shell("after it", "echo speed 2")]
    outcomes = run_steps(table, 1.5, ENVIRONMENT)
    assert outcomes[0].status.startswith("stopped") and outcomes[1].status == "left out: no time left"


@pytest.mark.parametrize(("limits", "value", "verdict"), [
    ({}, "7", ""),
    ({"low": 1}, "1,024", "as expected"),
    ({"low": 1}, "0.5", "differs"),
    ({"high": 0}, "0", "as expected"),
    ({"high": 0}, "1", "differs"),
    ({"equal": "yes"}, "yes", "as expected"),
    ({"equal": "yes"}, "no, 0.1 apart", "differs"),
])  # fmt: skip
def test_verdicts(limits: dict, value: str, verdict: str) -> None:
    assert Figure("", "", SPEED, **limits).verdict(value) == verdict


def test_without_a_gpu_there_is_one_line_and_a_status(tmp_path: Path) -> None:
    target = tmp_path / "report.md"
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", str(ROOT / "run_scripts/gpu_first_day.sh"), "--output", str(target)],
        capture_output=True,
        text=True,
        env={"PATH": path},
        timeout=300,
    )
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert done.returncode == 1 and not target.exists()
    assert done.stderr.count("\n") == 1 and "no GPU" in done.stderr and done.stdout == ""


def test_the_whole_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A failed build is a line of the report, and the steps go on with the Python that is there."""
    pythons: list[str] = []

    def table(python: str, folder: Path) -> list[Step]:
        pythons.append(python)
        return [shell("only", "echo speed 2.5")]

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(command, "gpu", lambda: "NVIDIA H100, 580.1, 81559 MiB")
    monkeypatch.setattr(command, "build_step", lambda: shell("build", "echo no compiler; exit 1"))
    monkeypatch.setattr(command, "steps", table)
    target = tmp_path / "new" / "report.md"
    assert command.main(["--output", str(target)]) == 0
    page = target.read_text()
    assert pythons == [sys.executable] and "NVIDIA H100, 580.1" in page
    assert "| build | status | failed: exit code 1" in page and "no compiler" in page
    assert "|  | speed | 2.5 | 2 to 3 | as expected |" in page and list(target.parent.iterdir()) == [target]


def figures_of(name: str, folder: Path = Path("x")) -> dict[str, Figure]:
    (step,) = (step for step in steps("python", folder) if step.name == name)
    return {figure.name: figure for figure in step.figures}


def test_every_step_names_files_that_exist_and_fits_the_half_hour() -> None:
    table = steps("python", Path("x"))
    assert len({step.name for step in table}) == len(table)
    for step in table:
        for word in step.command:
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), word


def test_the_training_steps_are_valid_runs() -> None:
    runs = [step.command for step in steps("python", Path("x")) if "pretrain_cdrmix.py" in step.command]
    assert len(runs) == 5
    for run in runs:
        config = parse_config(list(run[2:]), prog="test").config
        assert check_layout(config, 1).micro_batches == 4 and config.training.train_iters == ITERATIONS


def test_every_pointwise_call_of_the_bench_can_be_made(capsys: pytest.CaptureFixture[str]) -> None:
    dry()
    printed = capsys.readouterr().out
    assert printed.count(" by torch runs") == len(all_calls([(2, 5, 2)], (3, 70), "cpu", False, False)) == 12


def test_figures_are_read_from_what_the_tools_print(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tests = figures_of("tests on the GPU")
    assert tests["passed"].read("..\n3 failed, 61 passed, 2 skipped in 9.1s\n") == "61"
    assert tests["last line"].read("..\n61 passed, 2 skipped in 9.1s\n") == "61 passed, 2 skipped in 9.1s"
    assert figures_of("races in WKV-7")["hazards"].read(
        "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    ) == "0"  # fmt: skip
    assert figures_of("reads and writes of routing")["errors"].read("========= ERROR SUMMARY: 2 errors\n") == "2"
    attention = figures_of("attention, 1 x 2048, 16 heads of 128, both ways")
    assert attention["mask, 4 groups, free, ms"].read("figure mask-4-free = 1.234\n  kernels\n") == "1.234"
    rows = [["8 x 4096 x 32", "WKV-7 fwd", "native", 1.75, 1.0, "1-1", 80.0]]
    rows += [["8 x 4096 x 32", "WKV-7 fwd+bwd", "native", 5.5, 1.0, "1-1", 80.0]]
    rows += [["8 x 4096 x 32", "norm, bonus, gate", "triton", 0.9, 1.0, "1-1", 80.0]]
    rows += [["1 x 4096 x 4096", "Newton-Schulz", "wgmma", 2.9, 1.0, "1-1", 80.0]]
    rows += [["1 x 4096 x 14336", "16 ternary", "gemv", 0.14, 0.2, "0.1-0.3", 1.0]]
    print("NVIDIA H100, torch 2.13.0; copies 2712 GB/s, TF32 371 TFLOP/s")
    print_table("Kernels", HEADER, rows)
    printed, kernels = capsys.readouterr().out, figures_of("kernels")
    read = {name: figure.read(printed) for name, figure in kernels.items()}
    assert {name: value for name, value in read.items() if value is not None} == {
        "copies, GB/s": "2712",
        "TF32 products, TFLOP/s": "371",
        "WKV-7 8 x 4096 x 32 fwd, ms": "1.75",
        "WKV-7 8 x 4096 x 32 fwd+bwd, ms": "5.5",
        "norm, bonus, gate, 8 x 4096 x 32 fwd+bwd, ms": "0.9",
        "Newton-Schulz 1 x 4096 x 4096, ms": "2.9",
        "packed, 1 x 4096 x 14336, 16 ternary, gemv, ms": "0.14",
    }
    assert {shape for shape, _, _ in WKV} <= {" x ".join(map(str, shape)) for shape in SHAPES}
    assert {(shape, what) for shape, what, _ in POINTWISE} <= set(
        all_calls(POINTWISE_SHAPES, LOGITS, "cpu", True, False)
    )
    assert {(shape, what) for shape, what, _, _ in PACKED} <= {
        (" x ".join(map(str, shape)), f"{LAYERS} {scheme}") for shape in PACKED_SHAPES for scheme in SCHEMES
    }
    assert {shape for shape, _ in NEWTON_SCHULZ} <= {" x ".join(map(str, shape)) for shape in MATRICES}


def test_runs_are_compared_by_their_metrics(tmp_path: Path) -> None:
    def write(name: str, losses: list[float]) -> None:
        records = [{"kind": "step", "iteration": i + 1, "loss": x, "grad_norm": 1.0} for i, x in enumerate(losses)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    losses = [10.8 - i / 10 for i in range(ITERATIONS)]
    write("base", losses)
    again = figures_of("the same run again", tmp_path)
    equal = again["losses equal to the first run's bits"]
    assert equal.read("") is None and again["loss at first"].read("") is None  # nothing was written
    write("again", losses)
    assert equal.read("") == "yes" and equal.verdict("yes") == "as expected"
    assert (again["loss at first"].read(""), again["loss at last"].read("")) == ("10.8", "9.9")
    write("again", [*losses[:-1], losses[-1] + 0.5])
    assert equal.read("") == "no, 0.5 apart" and equal.verdict(equal.read("") or "") == "differs"
    write("again", losses[:3])
    assert equal.read("") is None


def test_kernels_are_told_apart() -> None:
    times = {
        "wkv7_forward_kernel<64>": 3.0,
        "nvjet_sm90_tst_128x256": 5.0,
        "sm90_xmma_gemm_bf16": 1.0,
        "void at::native::vectorized_elementwise": 2.0,
        "flash_bwd_dq_dk_dv": 4.0,
        "ncclDevKernel_AllReduce": 1.0,
        "mystery": 7.0,
    }
    expected = {"wkv": 3.0, "products": 6.0, "elementwise": 2.0, "attention": 4.0, "communication": 1.0, "other": 7.0}
    assert by_kind(times.items()) == expected


def test_the_layer_runs() -> None:
    layer.main(batch=1, length=16, width=64, device="cpu")

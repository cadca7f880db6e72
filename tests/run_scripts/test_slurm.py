"""The SLURM scripts' own steps."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "run_scripts" / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_step_has_all_cores_of_its_task(script: Path) -> None:
    """Every srun comes after the line that hands ``--cpus-per-task`` on; scripts without one start another that has."""
    lines = script.read_text().splitlines()
    steps = [number for number, line in enumerate(lines) if line.split()[:1] == ["srun"]]
    handed_on = [n for n, line in enumerate(lines) if 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"' in line]
    if steps:
        assert handed_on and handed_on[0] < steps[0]
    else:
        assert any("exec bash run_scripts/slurm/pretrain.sbatch" in line for line in lines)


def test_there_is_a_step() -> None:
    assert any("\nsrun " in script.read_text() for script in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_its_output_needs_no_directory(script: Path) -> None:
    """SLURM opens the file before the script runs: where its directory is missing, the job ends without a word."""
    [output] = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH --output=")]
    assert "/" not in output

"""Every SLURM script of a CDRmix variant fits its GPUs, and would start the job that was planned."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megaforge.config.yaml_files import preset_names
from megaforge.planning.gpus import GPUS
from megaforge.planning.memory import rank_memory
from megaforge.planning.plan_command import parse, planned_layout
from megaforge.planning.stages import cut_stages, model_parts

SCRIPTS = Path(__file__).parents[2] / "run_scripts" / "slurm"
VARIANTS = [f"cdrmix-{stage}-{size}" for size in ("1b", "4b", "40b", "200b") for stage in ("core", "reason")]


def read_script(name: str) -> tuple[int, list[str]]:
    """(GPUs, arguments of the training script)."""
    text = (SCRIPTS / f"{name}.sbatch").read_text()
    nodes, per_node = (int(re.search(rf"#SBATCH --{key}=(\d+)", text)[1]) for key in ("nodes", "gpus-per-node"))
    (command,) = re.findall(r"^exec bash run_scripts/slurm/pretrain\.sbatch (.*) \"\$@\"$", text, re.MULTILINE)
    return nodes * per_node, shlex.split(command)


def test_every_variant_has_a_script_and_a_preset() -> None:
    assert {path.stem for path in SCRIPTS.glob("cdrmix-*.sbatch")} == set(VARIANTS)
    assert set(VARIANTS) <= set(preset_names())


@pytest.mark.parametrize("name", VARIANTS)
def test_layout_is_valid_and_fits_in_90_percent_of_80_gb(name: str) -> None:
    gpus, arguments = read_script(name)
    request = parse(arguments, "plan.py")
    assert request.config.name == name
    layout = planned_layout(request.config, gpus, request.own)
    parts = model_parts(request.config.model, layout.dtype)
    stages = cut_stages(parts, layout)
    for rank in range(layout.pp):
        memory = rank_memory(parts, layout, stages, rank)
        assert memory.total <= 0.9 * GPUS["h100-80g"].memory, f"rank {rank}: {memory.total / 1e9:.1f} GB"

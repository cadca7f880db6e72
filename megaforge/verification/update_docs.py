"""``tools/plan.py docs``: writes what the planner and the dry run say now into the documents that quote them.

A document marks such a place with ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from megaforge.config.cli import parse_config
from megaforge.monitor import names, prometheus
from megaforge.planning.communication import step_traffic
from megaforge.planning.gpus import GPUS
from megaforge.planning.measured_activations import comparison_rows
from megaforge.planning.plan_command import planned_layout
from megaforge.planning.plan_request import parse_docs, parse_scaling, read_jobs
from megaforge.planning.report import assumptions, search_text
from megaforge.planning.scaling import scaling_text
from megaforge.planning.search import search, worst_rank
from megaforge.planning.stages import cut_stages, model_parts
from megaforge.planning.time import step_time
from megaforge.verification.optimizer_table import optimizer_table
from megaforge.verification.slurm_jobs import try_job

DOCUMENTS = (
    "README.md",
    "docs/planner.md",
    "docs/layouts.md",
    "docs/metrics.md",
    "docs/prometheus.md",
    "docs/optimizers.md",
)
GPU = GPUS["h100-80g"]
LAYOUTS_LISTED = 8
_200B = "--tp 4 --sp --pp 16 --vpp 2 --ep 8 --etp 1 --zero 1 --recompute full"
# Of docs/layouts.md: flags of cdrmix-core-4b on 32 GPUs.
EFFECTS = (
    "",
    "--zero 1",
    "--zero 2",
    "--tp 4 --zero 1",
    "--tp 4 --sp --zero 1",
    "--cp 4 --zero 1",
    "--cp 4 --cp-comm-type p2p --zero 1",
    "--pp 4 --zero 1",
    "--pp 4 --vpp 3 --zero 1",
    "--pp 4 --pipeline-schedule gpipe --zero 1",
    "--pp 4 --pipeline-schedule zb-h1 --zero 1",
    "--pp 4 --pipeline-schedule zb-v --zero 1",
    "--ep 8 --zero 1",
    "--ep 8 --zero 1 --recompute selective",
    "--ep 8 --zero 1 --recompute moe",
    "--ep 8 --zero 1 --recompute full",
    "--tp 4 --sp --ep 8 --zero 1",
    "--tp 4 --sp --ep 8 --etp 1 --zero 1",
)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, numbers to the right."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


def _search(name: str, gpus: int) -> str:
    config = parse_config(["--config", name]).config
    found = search(config, gpus, GPU, count=LAYOUTS_LISTED)
    text = search_text(found, GPU, name, gpus, 0.9).rpartition("\n\nassumed:")[0]
    command = f"$ python tools/plan.py memory --config {name} --gpu {GPU.name} --search --gpus {gpus} --top"
    return f"```\n{command} {LAYOUTS_LISTED}\n{text}\n```"


def _scaling(*runs: str) -> str:
    shown = []
    for flags in runs:
        request = parse_scaling(flags.split(), "plan.py scaling")
        text = scaling_text(request.config, request.own.gpus, GPU, weak=request.own.weak)
        shown.append(f"$ python tools/plan.py scaling {flags}\n{text}")
    return "```\n" + "\n\n".join(shown) + "\n```"


def _ladders() -> str:
    rows: list[tuple[str, ...]] = [("variant", "GPUs", "layout", "fullest rank, GB", "predicted MFU")]
    for job in sorted(read_jobs(Path("run_scripts/slurm/cdrmix.txt")).values(), key=lambda job: job.name):
        tried = try_job(job)
        parts = model_parts(job.config.model, tried.layout.dtype)
        time = step_time(parts, tried.layout, cut_stages(parts, tried.layout), GPU)
        flags = " ".join(job.arguments[2:])
        rows.append((f"`{job.name}`", f"{job.gpus:,}", f"`{flags}`", f"{tried.fullest / 1e9:.1f}", f"{time.mfu:.0%}"))
    return markdown(rows)


def _effects() -> str:
    rows: list[tuple[str, ...]] = [("flags", "state", "activations", "in all", "sent in a step", "bubble", "step, s")]
    for flags in EFFECTS:
        config = parse_config(["--config", "cdrmix-core-4b", *flags.split()]).config
        layout = planned_layout(config, 32)
        parts = model_parts(config.model, layout.dtype)
        stages = cut_stages(parts, layout)
        fullest = worst_rank(parts, layout, stages)
        held, time = fullest.state, step_time(parts, layout, stages, GPU)
        sent = step_traffic(parts, layout, stages, 0)
        sizes = (held.total, fullest.activations, fullest.total)
        axes = ", ".join(f"{axis} {size / 1e9:.1f}" for axis, size in sent.items() if size > 5e7)
        shown = f"`{flags}`" if flags else "none"
        rows.append((shown, *(f"{size / 1e9:.1f}" for size in sizes), axes, f"{time.bubble:.1%}", f"{time.total:.2f}"))
    return markdown(rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "activations": lambda: markdown(comparison_rows()),
    "assumptions": lambda: assumptions(GPU).removeprefix("assumed: "),
    "search-40b": lambda: _search("cdrmix-core-40b", 128),
    "search-200b": lambda: _search("cdrmix-core-200b", 1024),
    "scaling-1b": lambda: _scaling(
        "--config cdrmix-core-1b --zero 1 --gpus 1 2 4 8 16 32",
        "--config cdrmix-core-1b --zero 1 --gpus 1 2 4 8 16 32 --weak --global-batch-size 8",
    ),
    "scaling-200b": lambda: _scaling(
        f"--config cdrmix-core-200b {_200B} --gpus 256 512 1024",
        f"--config cdrmix-core-200b {_200B} --gpus 256 512 1024 --weak --global-batch-size 256",
    ),
    "ladders": _ladders,
    "effects": _effects,
    "metrics": names.table,
    "prometheus": prometheus.table,
    "optimizers": optimizer_table,
}


def blocks_of(text: str) -> dict[str, str]:
    """The marked places of a document and what stands there."""
    return dict(re.findall(r"<!-- begin ([\w-]+) -->\n(.*?)\n<!-- end \1 -->", text, re.DOTALL))


def _with_block(block: str, place: re.Match[str]) -> str:
    return place[1] + block + place[2]


def rewritten(text: str, blocks: dict[str, str]) -> str:
    """The document with these places filled anew."""
    for name, block in blocks.items():
        place = re.compile(rf"(<!-- begin {name} -->\n).*?(\n<!-- end {name} -->)", re.DOTALL)
        text = place.sub(partial(_with_block, block), text)
    return text


def run(arguments: Sequence[str], prog: str = "plan.py docs") -> None:
    """Fills the marked places of the documents, all of them or those that are named.

    Raises:
        UserError: an unknown place.
    """
    chosen = parse_docs(arguments, prog)
    made = {name: BLOCKS[name]() for name in chosen}
    for document in map(Path, DOCUMENTS):
        text = document.read_text()
        document.write_text(rewritten(text, made))
        print(f"{document}: {', '.join(name for name in blocks_of(text) if name in made) or 'nothing'}")

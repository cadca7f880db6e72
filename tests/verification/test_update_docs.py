"""The documents quote what the planner says now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megaforge.config.cli import parse_config
from megaforge.config.schema import settings
from megaforge.errors import UserError
from megaforge.models.prepared_run import check_run
from megaforge.planning.measured_activations import CASES
from megaforge.planning.plan_request import PLACES, read_jobs
from megaforge.verification import update_docs
from megaforge.verification.update_docs import BLOCKS, DOCUMENTS, blocks_of, markdown, rewritten

REPOSITORY = Path(__file__).parents[2]
QUOTED = {document: blocks_of((REPOSITORY / document).read_text()) for document in DOCUMENTS}


def test_every_place_is_filled_by_somebody() -> None:
    assert {name for places in QUOTED.values() for name in places} == set(BLOCKS) == set(PLACES)


@pytest.mark.parametrize("name", ["assumptions", "effects", "metrics", "optimizers", "scaling-1b"])
def test_what_is_quick_to_compute_is_up_to_date(name: str) -> None:
    fresh = BLOCKS[name]()
    for places in QUOTED.values():
        assert places.get(name, fresh) == fresh


def test_the_errors_shown_are_small_and_of_every_case() -> None:
    for document in ("README.md", "docs/planner.md"):
        rows = [row.strip("| ").split(" | ") for row in QUOTED[document]["activations"].splitlines()[2:]]
        assert [row[0] for row in rows] == list(CASES)
        assert all(abs(float(row[-1].rstrip("%"))) < (2 if "bf16" in row[0] else 0.1) for row in rows)


@pytest.mark.parametrize(("name", "gpus"), [("40b", 128), ("200b", 1024)])
def test_listed_layouts_would_start(name: str, gpus: int) -> None:
    listed = re.findall(r"^(--tp .*?--micro-batch-size \d)", QUOTED["docs/planner.md"][f"search-{name}"], re.MULTILINE)
    assert len(listed) == update_docs.LAYOUTS_LISTED
    for flags in listed:
        config = parse_config(["--config", f"cdrmix-core-{name}", *flags.split()]).config
        check_run(config, gpus)


def test_the_page_of_layouts_names_every_flag_and_its_commands_would_start() -> None:
    text = (REPOSITORY / "docs/layouts.md").read_text()
    for setting in settings().values():
        if setting.section == "parallel":
            assert f"{setting.flag}" in text, setting.flag
    commands = re.findall(r"^torchrun --nproc-per-node (\d+) pretrain_cdrmix\.py (.*) \$DATA$", text, re.MULTILINE)
    assert len(commands) == text.count("torchrun") > 10
    for ranks, flags in commands:
        config = parse_config(flags.split()).config
        check_run(config, int(ranks))


def test_the_dry_runs_shown_are_of_jobs_that_fit() -> None:
    """They have the flags of a ladder, whose every rank is tried elsewhere."""
    jobs = read_jobs(REPOSITORY / "run_scripts/slurm/cdrmix.txt")
    shown = 0
    for document in ("README.md", "docs/planner.md"):
        text = (REPOSITORY / document).read_text().replace("\\\n", " ")
        for name, flags, ranks in re.findall(
            r"pretrain_cdrmix\.py --config (\S+) (.*?)--dry-run +--dry-run-world-size (\d+)", text
        ):
            job = jobs[name]
            assert (job.gpus, list(job.arguments[2:])) == (int(ranks), flags.split())
            shown += 1
    assert shown == 2


def test_the_ladders_are_those_of_the_table() -> None:
    rows = QUOTED["docs/planner.md"]["ladders"].splitlines()[2:]
    jobs = [job for _, job in sorted(read_jobs(REPOSITORY / "run_scripts/slurm/cdrmix.txt").items())]
    assert [row.split(" | ")[0].strip("| `") for row in rows] == [job.name for job in jobs]
    for row, job in zip(rows, jobs, strict=True):
        assert f" {job.gpus:,} | `{' '.join(job.arguments[2:])}` |" in row


def test_places_are_filled_and_the_rest_is_left_alone() -> None:
    text = "a\n<!-- begin one -->\nold\n<!-- end one -->\nb\n<!-- begin two -->\nx\n<!-- end two -->\n"
    assert rewritten(text, {"one": "new \\1"}) == text.replace("old", "new \\1")
    assert blocks_of(text) == {"one": "old", "two": "x"}
    assert markdown([("a", "b"), ("1", "2")]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"
    with pytest.raises(UserError, match="three: there is no such place; choose activations"):
        update_docs.run(["three"])

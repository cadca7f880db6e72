"""The stage before a finished model is handed on: the compliance report of its run (:mod:`megaforge.compliance`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaforge.checkpoint.phase_interface import Compliance
from megaforge.compliance import report
from megaforge.config.compliance_config import ComplianceConfig
from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.errors import UserError
from megaforge.parallel.agree import from_first_rank
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer


class NotCompliantError(UserError):
    """A run does not pass, and has to. ``alert``: what is raised then besides the failure."""

    alert = "compliance"


class ComplianceStage(Callback):
    """Measures a run with ``--phase6-output`` once it is complete and saved, and writes the report into ``--save``.

    Attributes:
        found: what the output says of it, once it is measured.
    """

    place = Place.BEFORE

    def __init__(self, asked: ComplianceConfig) -> None:
        self.asked = asked
        self.found: Compliance | None = None

    @classmethod
    def of(cls, config: Config) -> ComplianceStage | None:
        """What the flags ask for."""
        handed_on = config.checkpoint.phase6_output is not None and config.checkpoint.save is not None
        return cls(config.compliance) if handed_on else None

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """
        Raises:
            NotCompliantError: on every rank: it does not pass, and has to.
        """
        if not trainer.complete or trainer.saved_iteration != trainer.iteration:
            return
        trainer.tell_phase("the compliance report")
        with trainer.events.timed("compliance") as told:
            self.found, lacking = from_first_rank(trainer.ctx, lambda: measure_handed_on(path.parent, self.asked))
            told.update(score=round(self.found.score, 6), passed=self.found.passed, lacking=lacking)
        print_rank_0(f"compliance: score {self.found.score:.4f}; {path.parent / report.JSON_FILE} has the report")
        if self.asked.enforce_compliance and not self.found.passed:
            raise refusal(self.asked, lacking)


def measure_handed_on(run: Path, asked: ComplianceConfig, output: Path | None = None) -> tuple[Compliance, list[str]]:
    """The report of a run, written into ``output`` (default: its own directory): what the output for the next phase
    says of it, and what it lacks."""
    measured = report.measure_run(run)
    measured.write(output or run, asked.compliance_level, asked.min_compliance_score)
    passed = measured.passes(asked.compliance_level, asked.min_compliance_score)
    lacking = measured.lacking(asked.compliance_level, asked.min_compliance_score)
    return Compliance(measured.score, passed), lacking


def asked_of(
    meta: Mapping[str, Any], level: str | None = None, score: float | None = None, enforce: bool | None = None
) -> ComplianceConfig:
    """What the run of a checkpoint with this ``meta`` was asked for, but for what is given here."""
    known = meta.get("config", {}).get("compliance", {})
    names = [field.name for field in fields(ComplianceConfig)]
    asked = ComplianceConfig(**{name: known[name] for name in names if name in known})
    return ComplianceConfig(
        asked.enforce_compliance if enforce is None else enforce,
        asked.compliance_level if level is None else level,
        asked.min_compliance_score if score is None else score,
    )


def refusal(asked: ComplianceConfig, lacking: list[str]) -> NotCompliantError:
    """Why nothing is handed on."""
    return NotCompliantError(
        f"--enforce-compliance: --compliance-level {asked.compliance_level} with --min-compliance-score "
        f"{asked.min_compliance_score:g} is not reached, and the output is not written: {'; '.join(lacking)}. The "
        "checkpoint is saved; tools/phase_interface.py export writes the output once the run passes, or less is "
        "asked for"
    )

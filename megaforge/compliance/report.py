"""The report: rules on the code, controls on a run, their score and the level that they reach."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaforge.compliance.code import OWN, Code, read_code
from megaforge.compliance.measure import LEVELS, Finding, Measure, Part, Rule, level, reaches, score
from megaforge.compliance.tools import waivers
from megaforge.config.config import Config
from megaforge.config.phase5_config import TrainingConfig
from megaforge.config.schema import config_from_dict
from megaforge.durable import replacing
from megaforge.errors import UserError
from megaforge.monitor.provenance import code_version
from megaforge.registry import COMPLIANCE_GATES, COMPLIANCE_RULES

if TYPE_CHECKING:
    from megaforge.compliance.controls import Control

TITLE = "Power of Ten, adapted to Python, C++ and CUDA"
NO_CERTIFICATE = "Adapted from G. J. Holzmann, The Power of 10, IEEE Computer, June 2006; this is not a certificate."
JSON_FILE, HTML_FILE = "compliance.json", "compliance.html"


@dataclass(frozen=True)
class Report:
    """What was measured.

    Attributes:
        rules: with what each measured.
        gates: names, with where each is broken.
        waivers: comments that silence a tool.
        controls: of a run; nothing where only code was measured.
        run: the directory of the run, or None.
        made: when, ISO 8601 in UTC.
        code: version, commit and whether files differ from it.
    """

    rules: tuple[tuple[Rule, Measure], ...]
    gates: tuple[tuple[str, tuple[Finding, ...]], ...]
    waivers: tuple[Finding, ...]
    controls: tuple[Control, ...] = ()
    run: str | None = None
    made: str = ""
    code: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def parts(self) -> list[Part]:
        """What counts: the rules that were measured, and the controls."""
        of_code = [
            Part(f"rule {rule.number}", measure.share, rule.weight)
            for rule, measure in self.rules
            if measure.share is not None
        ]
        return of_code + [Part(control.name, control.share) for control in self.controls]

    @property
    def score(self) -> float:
        """From 0 to 1."""
        return score(self.parts)

    @property
    def level(self) -> str | None:
        """The highest one that is reached, or None."""
        return level(self.parts, all(not found for _, found in self.gates))

    def passes(self, asked: str, least: float) -> bool:
        """Whether the level ``asked`` is reached with a score of at least ``least``."""
        return reaches(self.level, asked) and self.score >= least

    def lacking(self, asked: str, least: float = 0.0) -> list[str]:
        """What stands between this and the level ``asked``."""
        wanted = next(one for one in LEVELS if one.name == asked)
        bound = max(wanted.score, least)
        found = [f"{name}: {len(places)}, the first at {places[0].place}" for name, places in self.gates if places]
        if self.score < bound:
            found.append(f"the score is {self.score:.4f}, and {asked} asks for {bound:g}")
        return found + [
            f"{part.name}: {part.share:.3f}, and {asked} asks for {wanted.least:g}"
            for part in self.parts
            if part.share < wanted.least
        ]

    def as_json(self, asked: str, least: float = 0.0) -> dict[str, Any]:
        """All of it."""
        return {
            "title": f"{TITLE}. {NO_CERTIFICATE}",
            "made": self.made,
            "code": self.code,
            "run": self.run,
            "score": round(self.score, 6),
            "level": self.level,
            "asked": {"level": asked, "score": least},
            "passed": self.passes(asked, least),
            "lacking": self.lacking(asked, least),
            "rules": [_rule_as_json(rule, measure) for rule, measure in self.rules],
            "gates": [{"name": name, "findings": [one._asdict() for one in places]} for name, places in self.gates],
            "waivers": [one._asdict() for one in self.waivers],
            "controls": [
                {
                    "name": control.name,
                    "title": control.title,
                    "share": round(control.share, 6),
                    "checks": [check._asdict() for check in control.checks],
                }
                for control in self.controls
            ],
        }

    def lines(self, asked: str, least: float = 0.0) -> list[str]:
        """For people: a line a rule, gate and control, then the score."""
        found = [f"{TITLE} (not a certificate)"]
        for rule, measure in self.rules:
            share = "not measured" if measure.share is None else f"{measure.share:.3f}"
            of = "" if measure.share is None else f"{measure.compliant:,} of {measure.applicable:,} {measure.units}"
            note = f"  [{measure.note}]" if measure.note else ""
            found.append(f"rule {rule.number:2}  {share:>12}  x{rule.weight}  {rule.title}: {of}{note}")
        for name, places in self.gates:
            found.append(f"gate     {'holds' if not places else f'{len(places)} places':>12}      {name}")
        for control in self.controls:
            failing = [check.text for check in control.checks if not check.holds]
            because = f"; not so: {'; '.join(failing)}" if failing else ""
            found.append(f"run      {control.share:12.3f}  x1  {control.title}{because}")
        found.append(f"waivers  {len(self.waivers):12}")
        found.append(f"score    {self.score:12.4f}      level reached: {self.level or 'none'}; asked: {asked}")
        return found + [f"lacking: {one}" for one in self.lacking(asked, least)]

    def write(self, directory: Path, asked: str, least: float = 0.0) -> list[Path]:
        """Writes :data:`JSON_FILE` and :data:`HTML_FILE`; returns them.

        Raises:
            UserError: they cannot be written.
        """
        from megaforge.compliance.page import page

        content = self.as_json(asked, least)
        texts = {JSON_FILE: json.dumps(content, indent=1) + "\n", HTML_FILE: page(content)}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                with replacing(directory / name) as temporary:
                    temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{directory}: the report cannot be written ({error.strerror})") from error
        return [directory / name for name in texts]


def _rule_as_json(rule: Rule, measure: Measure) -> dict[str, Any]:
    return {
        "number": rule.number,
        "title": rule.title,
        "adapted": rule.adapted,
        "weight": rule.weight,
        "units": measure.units,
        "applicable": measure.applicable,
        "compliant": measure.compliant,
        "share": None if measure.share is None else round(measure.share, 6),
        "note": measure.note,
        "findings": [one._asdict() for one in measure.findings],
    }


def measure_code(code: Code) -> Report:
    """The rules and gates, on code alone."""
    rules: list[Rule] = sorted(
        (COMPLIANCE_RULES.get(name) for name in COMPLIANCE_RULES.names()), key=lambda rule: rule.number
    )
    gates = [COMPLIANCE_GATES.get(name) for name in COMPLIANCE_GATES.names()]
    return Report(
        rules=tuple((rule, rule.measure(code)) for rule in rules),
        gates=tuple((gate.name, tuple(gate.find(code))) for gate in gates),
        waivers=tuple(waivers(code)),
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        code=code_version() if code.root == OWN else {},
    )


@functools.cache
def of_own_code() -> Report:
    """:func:`measure_code` of this program, once a process."""
    return measure_code(read_code())


def measure_run(run: str | Path, code: Report | None = None) -> Report:
    """The report on a run: its controls beside the rules on the code.

    Args:
        run: what it was given as ``--save``.
        code: what was measured on the code (default: :func:`of_own_code`).

    Raises:
        UserError: there is no checkpoint.
    """
    from megaforge.compliance.allocation import ALLOCATION, of_run
    from megaforge.compliance.controls import CONTROLS, Evidence

    evidence = Evidence.of(Path(run))
    controls = tuple(control(evidence) for control in CONTROLS)
    report = code or of_own_code()
    allocated = of_run(evidence.metrics)
    rules = tuple((rule, allocated if rule == ALLOCATION else measure) for rule, measure in report.rules)
    return dataclasses.replace(report, rules=rules, controls=controls, run=str(run))


def calculate_compliance_score(config: Config | TrainingConfig, code: Report | None = None) -> float:
    """The score that a run of ``config`` can reach: the rules on the code, and whether the configuration asks for what
    the controls look at.

    Args:
        config: a :class:`megaforge.config.config.Config`, or that of another pipeline's 1-bit phase
            (:class:`megaforge.config.phase5_config.TrainingConfig`), whose runs are saved.
        code: what was measured on the code (default: :func:`of_own_code`).

    Returns:
        From 0 to 1; what a run has reached is measured by :func:`measure_run`.
    """
    from megaforge.compliance.controls import asked

    ours = _of_phase5(config) if isinstance(config, TrainingConfig) else config
    report = dataclasses.replace(code or of_own_code(), controls=tuple(asked(ours)))
    return report.score


def _of_phase5(theirs: TrainingConfig) -> Config:
    """A run of theirs, which is saved."""
    ours = config_from_dict(theirs.settings(), source="phase 5's configuration")
    return dataclasses.replace(ours, checkpoint=dataclasses.replace(ours.checkpoint, save="run"))


def failed(report: Report, asked: str, least: float) -> str:
    """One sentence for an error message."""
    lacking: Sequence[str] = report.lacking(asked, least)
    return f"level {asked} is not reached (score {report.score:.4f}): {'; '.join(lacking)}"

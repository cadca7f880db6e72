"""What is looked at on a run: its audit trail, encryption, validation, what it takes to repeat it, its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megaforge.checkpoint.anchors import check_checkpoints
from megaforge.checkpoint.directory import list_steps
from megaforge.checkpoint.find import check_file
from megaforge.checkpoint.manifest import Manifest, read_manifest
from megaforge.config.config import Config
from megaforge.config.schema import config_from_dict
from megaforge.errors import CheckpointError, UserError
from megaforge.monitor.audit import AUDIT_FILE, Trail, read_trail
from megaforge.monitor.events import EVENTS_FILE, read_events


class Check(NamedTuple):
    """One thing that was looked at, and whether it is as it should be."""

    text: str
    holds: bool


@dataclass(frozen=True)
class Control:
    """What a run has to show for one thing.

    Attributes:
        name: one word.
        title: for people.
    """

    name: str
    title: str
    checks: tuple[Check, ...]

    @property
    def share(self) -> float:
        """Checks that hold, of all."""
        return sum(check.holds for check in self.checks) / len(self.checks)


@dataclass(frozen=True)
class Evidence:
    """What a run's directory holds.

    Attributes:
        manifests: of its checkpoints, newest first.
        damaged: what is wrong with checkpoints, by their name.
        events: of ``events.jsonl``; nothing where it cannot be read.
        trail: of ``audit.jsonl``, or why it does not hold.
    """

    run: Path
    manifests: Mapping[str, Manifest]
    damaged: Mapping[str, str]
    events: tuple[Mapping[str, Any], ...]
    trail: Trail | str
    config: Config | None = None
    newest: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Path) -> Evidence:
        """Reads it; every byte of each checkpoint too.

        Raises:
            UserError: there is no checkpoint.
        """
        steps = list_steps(run) if run.is_dir() else []
        if not steps:
            raise UserError(f"{run}: no checkpoint (step_N) in it; name what a run was given as --save")
        manifests: dict[str, Manifest] = {}
        damaged: dict[str, str] = {}
        for _, path in steps:
            try:
                manifests[path.name] = manifest = read_manifest(path)
                problems = (check_file(path / name, record) for name, record in manifest.files.items())
                if problem := next(filter(None, problems), None):
                    damaged[path.name] = problem.text
            except (CheckpointError, OSError) as error:
                damaged[path.name] = str(error)
        newest: Mapping[str, Any] = next((one.meta for one in manifests.values()), {})
        return cls(run, manifests, damaged, _events(run), _trail(run), _config(newest, run), newest)

    @property
    def metrics(self) -> Path | None:
        """The metrics file, as the configuration names it; None: there is none."""
        named = None if self.config is None else self.config.logging.metrics_file
        return None if named is None else Path(named)  # as the run, of the directory that it was started in


def _events(run: Path) -> tuple[Mapping[str, Any], ...]:
    try:
        return tuple(read_events(run / EVENTS_FILE).events)
    except UserError:
        return ()


def _trail(run: Path) -> Trail | str:
    try:
        return read_trail(run / AUDIT_FILE)
    except UserError as error:
        return str(error)


def _config(meta: Mapping[str, Any], run: Path) -> Config | None:
    """As the newest checkpoint has it, and valid today."""
    try:
        config = config_from_dict(meta["config"], source=str(run))
        config.validate()
    except (UserError, KeyError):
        return None
    return config


def audit(evidence: Evidence) -> Control:
    """The chain holds, and fits the checkpoints."""
    trail = evidence.trail
    problems = [trail] if isinstance(trail, str) else check_checkpoints(evidence.run, trail)
    checks = [
        Check(f"{AUDIT_FILE} is there (--audit-trail)", (evidence.run / AUDIT_FILE).is_file()),
        Check(f"its chain holds{_because(problems if isinstance(trail, str) else [])}", not isinstance(trail, str)),
        Check(f"it fits the checkpoints{_because([] if isinstance(trail, str) else problems)}", not problems),
    ]
    return Control("audit", "every operation is on record", tuple(checks))


def encryption(evidence: Evidence) -> Control:
    """Checkpoints are encrypted."""
    checks = [
        Check(f"{name} is encrypted (--encrypt-checkpoints)", manifest.seal is not None)
        for name, manifest in evidence.manifests.items()
    ]
    return Control("encryption", "checkpoints are encrypted", tuple(checks) or (Check("a checkpoint is there", False),))


def validation(evidence: Evidence) -> Control:
    """The configuration was and is valid, and the model was judged by data that it was not trained on."""
    judged = any(event["kind"] == "evaluate" and "error" not in event for event in evidence.events)
    checks = [
        Check("the configuration in the newest checkpoint is valid", evidence.config is not None),
        Check("the model was evaluated on data that it was not trained on (--eval-iters)", judged),
    ]
    return Control("validation", "inputs are checked, and the result is judged", tuple(checks))


def reproducibility(evidence: Evidence) -> Control:
    """Code, configuration and data are known."""
    starts = [event for event in evidence.events if event["kind"] == "start"]
    clean = [event.get("dirty") is False for event in starts]
    known = [isinstance(event.get("commit"), str) for event in starts]
    checks = [
        Check("the commit of every start is on record", bool(known) and all(known)),
        Check("no file differed from it", bool(clean) and all(clean)),
        Check("the newest checkpoint has the whole configuration", bool(evidence.newest.get("config"))),
        Check("it has the identity of the data", bool(evidence.newest.get("state", {}).get("data"))),
        *_recorded(evidence),
    ]
    return Control("reproducibility", "the run can be made again", tuple(checks))


def _recorded(evidence: Evidence) -> list[Check]:
    kinds = set() if isinstance(evidence.trail, str) else {record["kind"] for record in evidence.trail.records}
    receipt = (evidence.run / "receipt.json").is_file()
    return [Check("the versions of what computed are on record", receipt or "environment" in kinds)]


def digests(evidence: Evidence) -> Control:
    """Every byte of every checkpoint is what was written."""
    names = [*evidence.manifests, *(name for name in evidence.damaged if name not in evidence.manifests)]
    checks = [
        Check(f"{name} is whole{_because([evidence.damaged.get(name, '')])}", name not in evidence.damaged)
        for name in names
    ]
    return Control("digests", "checkpoints are what was written", tuple(checks))


def _because(problems: Iterable[str]) -> str:
    said = "; ".join(filter(None, problems))
    return f": {said}" if said else ""


CONTROLS: tuple[Callable[[Evidence], Control], ...] = (audit, encryption, validation, reproducibility, digests)


def asked(config: Config) -> list[Control]:
    """What a run of ``config`` would have to show, before it runs."""
    saves = config.checkpoint.save is not None
    checks = {
        "audit": Check("--audit-trail", saves and config.resilience.audit_trail),
        "encryption": Check("--encrypt-checkpoints", saves and config.checkpoint.encrypt_checkpoints),
        "validation": Check("--eval-iters", bool(config.training.eval_iters)),
        "reproducibility": Check("--audit-trail, for the versions of what computes", config.resilience.audit_trail),
        "digests": Check("--save", saves),
    }
    return [Control(name, "as the configuration asks", (check,)) for name, check in checks.items()]

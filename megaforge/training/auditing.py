"""``--audit-trail``: what a run puts on record (:mod:`megaforge.monitor.audit`)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megaforge.checkpoint.anchors import KEY, check_anchor
from megaforge.checkpoint.encryption import read_secret
from megaforge.checkpoint.manifest import read_manifest
from megaforge.config.launcher import print_rank_0
from megaforge.config.schema import config_to_dict
from megaforge.errors import UserError
from megaforge.monitor.audit import AUDIT_FILE, AuditTrail, Signer
from megaforge.monitor.provenance import code_version, environment
from megaforge.parallel.agree import from_first_rank

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer

KEY_VARIABLE, KEY_FILE_VARIABLE = "MEGAFORGE_AUDIT_KEY", "MEGAFORGE_AUDIT_KEY_FILE"


def open_trail(trainer: Trainer, directory: Path) -> AuditTrail | None:
    """The trail of ``trainer`` below ``directory``, with what it runs on record; None without ``--audit-trail``. On the
    first rank.

    Raises:
        UserError: the trail is broken, the key is none, or nothing can be written.
    """
    path = directory / AUDIT_FILE
    if not trainer.config.resilience.audit_trail:
        if path.exists():
            print_rank_0(f"{path} is there, and this run puts nothing on record: add --audit-trail")
        return None
    secret = read_secret(KEY_VARIABLE, KEY_FILE_VARIABLE, optional=True)
    trail = AuditTrail(path, None if secret is None else Signer(secret))
    config = json.loads(json.dumps(config_to_dict(trainer.config)))
    trail.append("configuration", digest=_digest(config), config=config)
    trail.append("environment", **code_version(), **environment())
    data = {"state": trainer.data.state(0), "tokenizer": trainer.tokenizer}
    trail.append("data", digest=_digest(data), data=data)
    return trail


def check_loaded(trainer: Trainer, path: Path | None) -> None:
    """That the trail goes on from the checkpoint ``path`` of its own run. Collective.

    Raises:
        UserError: on every rank: records are missing.
    """
    save = trainer.config.checkpoint.save
    if path is None or save is None or not trainer.config.resilience.audit_trail:
        return

    def check() -> None:
        if trainer.audit is None or path.parent.resolve() != Path(save).resolve():
            return
        problem = check_anchor(read_manifest(path).meta.get(KEY), trainer.audit.trail)
        if problem is not None:
            raise UserError(
                f"--audit-trail: {path.name}: {problem}; restore {Path(save) / AUDIT_FILE}, or set it aside and begin "
                f"another: python tools/audit.py set-aside {save} --reason TEXT"
            )

    from_first_rank(trainer.ctx, check)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

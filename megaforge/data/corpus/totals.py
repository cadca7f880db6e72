"""What all partitions together counted, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megaforge.data.corpus.job import Job, item_name
from megaforge.data.sidecar import digest_of
from megaforge.errors import UserError


@dataclass
class Total:
    """Sums over the partitions.

    Attributes:
        stages: in order, by name, the numbers of :class:`megaforge.data.corpus.tasks.StageCounts`; a stage that the
            recipe names twice is ``NAME`` and ``NAME (2)``.
        datasets: by name, documents, bytes of text and documents a language.
        read: SHA-256 (hex) of all that was read.
    """

    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    read: str = ""

    def check_kept(self, job: Job) -> None:
        """
        Raises:
            UserError: no document is left; with what dropped them.
        """
        if self.datasets:
            return
        read = next(iter(self.stages.values()), {"documents": 0})["documents"]
        why = []
        for name, counts in self.stages.items():
            for reason, number in sorted(counts["reasons"].items(), key=lambda item: -item[1])[:2]:
                why.append(f"{name} dropped {number:,} ({reason})")
        raise UserError(f"{job.recipe.label}: the corpus is empty: of {read:,} documents {'; '.join(why) or 'none'}")


def total_of(job: Job) -> Total:
    """Sums what the finished tasks counted.

    Raises:
        UserError: one is missing.
    """
    total, digests = Total(), []
    last = len(job.segments) - 1
    for number in range(len(job.segments)):
        for item in range(len(job.partitions)):
            result = job.work.result(f"segment{number}", item_name(item))
            for name, counts in result["stages"].items():
                _add(total.stages.setdefault(name, {}), counts)
            if number == 0:
                digests.append(result["digest"])
            if number == last:
                for name, counts in result["datasets"].items():
                    _add(total.datasets.setdefault(name, {}), counts)
    order = ["read", *job.stage_names()]
    total.stages = {name: total.stages[name] for name in order if name in total.stages}
    total.datasets = dict(sorted(total.datasets.items()))
    total.read = digest_of(digests)
    return total


def _add(total: dict[str, Any], counts: dict[str, Any]) -> None:
    for name, value in counts.items():
        if isinstance(value, dict):
            _add(total.setdefault(name, {}), value)
        else:
            total[name] = total.get(name, 0) + value

"""``--elastic MIN:MAX``: a run goes on with another number of ranks than its layout is written for.

The global batches stay the same, so what is learned does too; the checkpoint moves to the other layout as it is loaded.
"""

from __future__ import annotations

from megaforge.config.config import Config
from megaforge.config.launcher import discover_launch
from megaforge.errors import UserError
from megaforge.models.prepared_run import check_run

Chosen = tuple[Config, list[str]]


class ElasticLayout:
    """The layout as written where it is valid for the ranks at hand; otherwise the one that ``--layout auto`` chooses
    for them. Knows torch only then.

    Attributes:
        why: the line that says what was chosen; None where the layout is as written.
    """

    def __init__(self) -> None:
        self.why: str | None = None
        self._meeting: object = None  # holds the place where the ranks meet

    def __call__(self, config: Config) -> Chosen:
        """``config``, whose vocabulary size is known, with a layout for the ranks that were started, and what to say of
        it. Collective where it chooses.

        Raises:
            UserError: on every rank: no layout is valid or has room.
        """
        return self._choose(config, discover_launch().world_size, here=True)

    def planned(self, config: Config, world_size: int) -> Chosen:
        """The same for ``world_size`` ranks that are not here, on the device that ``--machine`` names."""
        return self._choose(config, world_size, here=False)

    def _choose(self, config: Config, world_size: int, *, here: bool) -> Chosen:
        refusal = _refusal(config, world_size)
        if refusal is None:
            return config, []
        from megaforge.planning.auto_layout import AutoLayout

        self._meeting = chooser = AutoLayout(frozenset())
        flag = f"--elastic {config.resilience.elastic}"
        try:
            chosen, notes = chooser(config) if here else chooser.planned(config, world_size)
        except UserError as error:
            raise UserError(f"{flag}: {refusal}. {error}") from error
        self.why = str(chooser.why).replace("--layout auto", flag, 1)
        others = [note for note in notes if note != chooser.why]
        return chosen, [*others, f"{flag}: the layout as written is not one of {world_size} ranks: {refusal}", self.why]


def _refusal(config: Config, world_size: int) -> str | None:
    """Why the layout of ``config`` is none of ``world_size`` ranks, or None."""
    try:
        check_run(config, world_size)
    except UserError as error:
        return str(error)
    return None

"""``--layout auto``: rank 0 chooses the layout for the ranks that were started, before they form groups."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch.distributed.distributed_c10d import Store

from megaforge.config.config import Config
from megaforge.config.launcher import Launch, discover_launch
from megaforge.config.layout_settings import CHOSEN
from megaforge.config.partners import check_partners
from megaforge.errors import UserError
from megaforge.parallel.distributed import open_store
from megaforge.planning.choose import Choice, choose_layout
from megaforge.planning.gpus import Gpu, gpu_named
from megaforge.planning.machine import Stand, machine_of, this_stand

Chosen = tuple[Config, list[str]]
Decision = Mapping[str, Any]  # JSON: the values of CHOSEN, the notes to say, and why


class AutoLayout:
    """Chooses once. All ranks hold one until they have met again, for it holds the place where they meet.

    Attributes:
        why: the line that says what was chosen; None before.
    """

    flag = "--layout auto"

    def __init__(self, kept: Collection[str], origins: Mapping[str, str] | None = None) -> None:
        """
        Args:
            kept: of :data:`megaforge.config.layout_settings.CHOSEN`, what the user wrote.
            origins: of every setting (:class:`megaforge.config.cli.ParsedConfig`); what is chosen goes with what the
                user wrote.
        """
        self.kept, self._origins = kept, origins
        self.why: str | None = None
        self._store: Store | None = None

    def __call__(self, config: Config) -> Chosen:
        """``config``, whose vocabulary size is known, with the layout, and what to say of it. Collective.

        Raises:
            UserError: on every rank: no layout has room, or the device that ``--machine`` names is unknown.
        """
        launch = discover_launch()
        self._store = open_store() if launch.world_size > 1 else None
        stand = this_stand(config.training.device, launch.local_rank)
        return self._take(config, agreed(self._store, launch, stand, lambda stands: self._decide(config, stands)))

    def planned(self, config: Config, world_size: int) -> Chosen:
        """The same for ``world_size`` ranks that are not here, on the device that ``--machine`` names."""
        if config.parallel.machine is None:
            raise UserError(
                f"{self.flag}: a dry run's ranks have no memory to look at; add --machine, such as h100-80g"
            )
        return self._take(config, self._decide(config, [Stand("", "", 0.0, 0)] * world_size))

    def _decide(self, config: Config, stands: list[Stand]) -> Decision:
        gpu, notes = self._device(config, stands)
        share = config.parallel.memory_limit
        choice = choose_layout(config, len(stands), gpu, self.kept, share, self._fits)
        return {"values": _values(choice), "notes": notes, "why": choice.why}

    @staticmethod
    def _device(config: Config, stands: list[Stand]) -> tuple[Gpu, list[str]]:
        """The device to plan for, and what to say of it."""
        given = config.parallel.machine
        if given is not None:
            return gpu_named(given, "--machine"), []
        gpu, note = machine_of(stands)
        return gpu, [note] if note else []

    def _fits(self, config: Config) -> bool:
        try:
            if self._origins is not None:
                check_partners(config, self._origins)
        except UserError:
            return False
        return True

    def _take(self, config: Config, decision: Decision) -> Chosen:
        self.why = decision["why"]
        sections = {"parallel": dict[str, Any](), "training": dict[str, Any]()}
        for key, value in decision["values"].items():
            section, name = key.split(".")
            sections[section][name] = value
        changed = {name: dataclasses.replace(getattr(config, name), **own) for name, own in sections.items()}
        return dataclasses.replace(config, **changed), [*decision["notes"], decision["why"]]


def _values(choice: Choice) -> dict[str, Any]:
    split = (key.split(".") for key in CHOSEN)
    return {f"{section}.{name}": getattr(getattr(choice.config, section), name) for section, name in split}


def agreed(store: Store | None, launch: Launch, stand: Stand, decide: Callable[[list[Stand]], Decision]) -> Decision:
    """What rank 0 decides of where all ranks stand. Collective.

    Args:
        store: what the ranks share; None for one rank.

    Raises:
        UserError: on every rank, where ``decide`` raises it.
    """
    if store is None:
        return decide([stand])
    store.set(f"layout/stand/{launch.rank}", json.dumps(dataclasses.astuple(stand)))
    if launch.rank:
        decision = json.loads(store.get("layout/decision"))
        if "error" in decision:
            raise UserError(decision["error"])
        return dict(decision)
    try:
        names = [f"layout/stand/{rank}" for rank in range(launch.world_size)]
        mine = decide([Stand(*json.loads(store.get(name))) for name in names])
    except UserError as error:
        store.set("layout/decision", json.dumps({"error": str(error)}))
        raise
    store.set("layout/decision", json.dumps(mine))
    return mine

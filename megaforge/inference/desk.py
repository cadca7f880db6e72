"""The frame of tools that ask a trained model about texts (:mod:`megaforge.inference.text_flags`)."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megaforge.config.launcher import discover_launch
from megaforge.inference.open_model import open_model

if TYPE_CHECKING:
    from megaforge.data.tokenizer import Tokenizer
    from megaforge.inference.restore import TrainedModel


class Desk:
    """Asks on all ranks; rank 0 prints."""

    def __init__(self, flags: argparse.Namespace, trained: TrainedModel) -> None:
        self.flags, self.trained = flags, trained
        self.tokenizer: Tokenizer = trained.load_tokenizer(flags.tokenizer_model)

    def ask(self) -> None:
        """What the flags say."""
        if self.flags.task:
            self.ask_task()
        else:
            self.ask_input()

    def ask_task(self) -> None:
        """New texts of a task."""
        raise NotImplementedError

    def ask_input(self) -> None:
        """A text of the user's."""
        raise NotImplementedError

    def show(self, text: str) -> None:
        """Prints a line."""
        if self.trained.ctx.is_first_rank:
            print(text, flush=True)


def ask_at(desk: type[Desk], flags: argparse.Namespace) -> int:
    """Opens the model of the flags and asks what they say; returns the exit status."""
    _ = discover_launch()
    from megaforge.parallel.distributed import shutdown

    desk(flags, open_model(flags)).ask()
    shutdown()
    return 0

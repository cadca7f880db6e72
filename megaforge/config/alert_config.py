"""Flags of alerts: what is worth waking somebody, and how that somebody is told."""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import dataclass
from urllib.parse import urlsplit

from megaforge.config.fields import flag
from megaforge.errors import UserError
from megaforge.registry import ALERTS

_VARIABLE = "env:"


@dataclass(frozen=True)
class AlertConfig:
    """When a run raises an alert, and who hears of it."""

    # When
    alerts_off: tuple[str, ...] = flag((), "alerts that are never raised", choices=ALERTS)
    alert_window: int = flag(
        100, "steps that tell what loss and throughput are usual, for alerts", least=16, most=1 << 16
    )
    alert_throughput_share: float = flag(
        0.8, "an alert where the tokens per second are below this share of their median", above=0, below=1
    )
    alert_memory_share: float = flag(0.9, "an alert where a rank's or a machine's memory is fuller", above=0, most=1)
    alert_disk_share: float = flag(0.9, "an alert where a disk that the run writes to is fuller", above=0, most=1)
    alert_expert_use: float = flag(
        0.25,
        "an alert where the tokens of some layer go to few experts: to fewer, by their entropy, than this share of the "
        "way from the --moe-router-topk of one token to all alike",
        above=0,
        below=1,
    )

    # Who
    alert_webhook: str | None = flag(
        None,
        "address that alerts are posted to as JSON; env:NAME takes it from a variable, so that it is not kept with the "
        "configuration",
        metavar="URL|env:NAME",
    )
    alert_command: str | None = flag(
        None,
        "program, with arguments, that is started for each alert: it reads the JSON from standard input",
        metavar="CMD",
    )
    alert_repeat_minutes: float = flag(
        30.0, "an alert is told at most once in this time, and again after it while it lasts", least=0
    )

    def validate(self) -> None:
        if self.alert_webhook is not None and not self.alert_webhook.startswith(_VARIABLE):
            check_address(self.alert_webhook, "--alert-webhook")
        _ = self.command_words

    def webhook_address(self) -> str | None:
        """Where alerts are posted to; None: nowhere. Reads the environment.

        Raises:
            UserError: the variable is not set, or holds no address.
        """
        given = self.alert_webhook
        if given is None or not given.startswith(_VARIABLE):
            return given
        name = given.removeprefix(_VARIABLE)
        address = os.environ.get(name, "")
        if not address:
            raise UserError(
                f"--alert-webhook {given}: the variable {name!r} is not set; export it before the run starts"
            )
        check_address(address, f"--alert-webhook {given}")
        return address

    def command(self) -> list[str] | None:
        """The program that is started for an alert, and its arguments; None: none. Looks for it.

        Raises:
            UserError: there is no such program.
        """
        words = self.command_words
        if words is not None and shutil.which(words[0]) is None:
            raise UserError(
                f"--alert-command {self.alert_command}: there is no program {words[0]!r} here; give its path, and make "
                "it executable"
            )
        return words

    @property
    def command_words(self) -> list[str] | None:
        """
        Raises:
            UserError: ``--alert-command`` is not a command line.
        """
        if self.alert_command is None:
            return None
        try:
            words = shlex.split(self.alert_command)
        except ValueError as error:
            raise UserError(f"--alert-command {self.alert_command}: {error}; quote it as for a shell") from error
        if not words:
            raise UserError(f"--alert-command {self.alert_command!r}: it names no program; give one, such as notify.sh")
        return words


def check_address(address: str, shown: str) -> None:
    """
    Args:
        shown: how the message names it: it does not show the address, for those of webhooks are secrets.

    Raises:
        UserError: it is not an address of the web.
    """
    try:
        parts = urlsplit(address)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        whole = False
    if not whole or not address.isascii() or any(letter.isspace() for letter in address):
        raise UserError(f"{shown}: its value is not an address; give one such as https://hooks.example.com/T0/B0")

"""Flags of the Prometheus endpoint."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.errors import UserError


@dataclass(frozen=True)
class PrometheusConfig:
    """Where a run's numbers can be fetched while it goes on."""

    prometheus_port: int | None = flag(
        None,
        "the first rank serves the run's newest numbers to Prometheus on this port (needs the extra 'prometheus')",
        least=1,
        most=65535,
    )
    prometheus_address: str = flag(
        "127.0.0.1",
        "with --prometheus-port: the address to listen at; 0.0.0.0: every one of the machine's, for all who reach it",
        metavar="ADDRESS",
    )

    def validate(self) -> None:
        """
        Raises:
            UserError: the address cannot be one of this machine's.
        """
        address = self.prometheus_address
        if not address or any(letter.isspace() or letter in "/[]@" for letter in address):
            raise UserError(
                f"--prometheus-address {address}: expected an address or a name of this machine, without http:// and "
                "port, such as 0.0.0.0"
            )

"""Flags of what is changed in samples as they are read. Those of fill-in-the-middle have Megatron-LM's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.errors import UserError


@dataclass(frozen=True)
class AugmentationConfig:
    """What :class:`megaforge.config.run_config.DataConfig` has of augmentation."""

    fim_data: bool = flag(False, "fill-in-the-middle: move the middle of a share of the documents behind their ends")
    fim_rate: float = flag(0.5, "with --fim-data: share of the documents", least=0, most=1)
    fim_spm_rate: float = flag(
        0.5, "with --fim-data: share of these that give the suffix first (SPM), not the prefix (PSM)", least=0, most=1
    )
    fim_domain_rates: tuple[str, ...] = flag(
        (),
        "with --fim-data: another --fim-rate for some domains of the datasets, such as code:0.5 web:0",
        metavar="DOMAIN:RATE",
    )
    fim_prefix_token: str | None = flag(
        None, "token that begins the prefix, by name or id (default: the tokenizer's, such as <|fim_prefix|>)"
    )
    fim_middle_token: str | None = flag(None, "token that begins the middle, by name or id")
    fim_suffix_token: str | None = flag(None, "token that begins the suffix, by name or id")
    span_mask_rate: float = flag(
        0.0, "share of the input tokens that are hidden in spans; labels stay as they are", least=0, below=1
    )
    span_mask_length: float = flag(3.0, "with --span-mask-rate: mean tokens of a span", least=1, most=1 << 20)
    token_dropout: float = flag(
        0.0, "share of the input tokens that are hidden one by one; labels stay as they are", least=0, below=1
    )
    mask_token: str | None = flag(
        None, "token that hides others, by name or id (default: the tokenizer's, such as <|mask|>)"
    )

    @property
    def domain_rates(self) -> Mapping[str, float]:
        """``--fim-domain-rates`` by domain.

        Raises:
            UserError: a word that is not DOMAIN:RATE with a rate from 0 to 1, or a domain twice.
        """
        given, found = " ".join(self.fim_domain_rates), dict[str, float]()
        for word in self.fim_domain_rates:
            domain, _, rate = word.rpartition(":")
            try:
                value = float(rate)
            except ValueError:
                value = -1.0
            if not domain or not 0 <= value <= 1:
                raise UserError(
                    f"--fim-domain-rates {given}: {word} is not DOMAIN:RATE with a rate from 0 to 1, such as code:0.5"
                )
            if domain in found:
                raise UserError(f"--fim-domain-rates {given}: {domain} stands there twice; leave out one")
            found[domain] = value
        return found

    def validate(self) -> None:
        """The fields' bounds, and the words of ``--fim-domain-rates``."""
        _ = self.domain_rates

"""Flags of what stage B measures of the model that it began with."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag


@dataclass(frozen=True)
class CoreTextConfig:
    """Whether stage B leaves the core's language modelling as it was."""

    core_eval_iters: int | None = flag(
        None,
        "global batches of stage A's validation text that stage B measures before its first step and after its last "
        "(default: stage A's --eval-iters; 0: none)",
        least=0,
    )
    core_data_path: tuple[str, ...] = flag((), "where stage A's --data-path lies now (default: where it lay then)")

    def validate(self) -> None:
        """Whether the text is there is seen when it is opened."""

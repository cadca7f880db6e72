"""A model's answers, from step to step."""

from __future__ import annotations

from typing import Any

from megaforge.reasoning.control import PolicyControl
from megaforge.reasoning.rlvr.experience import Answer


class AnswerControl(PolicyControl):
    """See :class:`megaforge.reasoning.control.PolicyControl`."""

    def kept_of(self, state: Any) -> Answer:
        return Answer.of(state)

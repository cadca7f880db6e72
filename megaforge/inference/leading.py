"""One rank asks, all answer: what reads tasks and judges answers runs on the first rank alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

from megaforge.inference.answer_cache import AnswerCache
from megaforge.inference.requests import Answer, Answerer, Request

T = TypeVar("T")
Ask = Callable[[Sequence[Request]], list[Answer]]


def led(answerer: Answerer, work: Callable[[Ask], T], cache: AnswerCache | None = None) -> T | None:
    """What ``work`` returns, on the first rank; it is given a function that asks the model. Other ranks help to answer
    and return None. Collective.

    Args:
        cache: of the first rank: it is asked before the model.
    """
    ctx = answerer.trained.ctx
    if (group := ctx.control) is None:
        return work(lambda requests: _asked(answerer.answer, requests, cache))
    if not ctx.is_first_rank:
        while (requests := _told(group, None)) is not None:
            answerer.answer(requests)
        return None
    answering = False

    def everywhere(requests: Sequence[Request], told: Callable[[list[int], list[Answer]], None] | None) -> list[Answer]:
        nonlocal answering
        answering = True  # an error in here is every rank's
        _ = _told(group, list(requests))
        answers = answerer.answer(requests, told)
        answering = False
        return answers

    try:
        return work(lambda requests: _asked(everywhere, requests, cache))
    finally:
        if not answering:
            _ = _told(group, None)


def _told(group: dist.ProcessGroup, requests: list[Request] | None) -> list[Request] | None:
    """What the first rank says."""
    message = [requests]
    dist.broadcast_object_list(message, src=0, group=group)
    return message[0]


def _asked(
    answer: Callable[[Sequence[Request], Callable[[list[int], list[Answer]], None] | None], list[Answer]],
    requests: Sequence[Request],
    cache: AnswerCache | None,
) -> list[Answer]:
    """Answers from the cache, or else from the model."""
    known = [None if cache is None else cache.find(request) for request in requests]
    left = list(dict.fromkeys(request for request, found in zip(requests, known, strict=True) if found is None))

    def keep(places: list[int], answers: list[Answer]) -> None:
        if cache is not None:
            cache.keep([left[place] for place in places], answers)

    new = dict(zip(left, answer(left, keep) if left else [], strict=True))
    return [new[request] if found is None else found for request, found in zip(requests, known, strict=True)]

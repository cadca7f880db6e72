from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from megaforge.monitor.wait_sampler import WaitSampler, waits_for_others
from tests.monitor.looks import Looks
from tests.parallel.pool import RankPool


class Frame:
    """Who asks for its place is in the line that calls it, as work that was handed over is."""

    def wait(self) -> FrameType:
        return sys._getframe(1)


def test_frames_that_wait() -> None:
    frame = Frame()
    assert waits_for_others(frame.wait()), "the line that waits"
    assert not waits_for_others(sys._getframe())
    code = compile("import sys\nframe = sys._getframe()", dist.__file__, "exec")
    names: dict[str, FrameType] = {}
    exec(code, names)
    assert waits_for_others(names["frame"]), "code of torch.distributed"


def test_looks_count_while_it_is_on() -> None:
    looks = Looks()
    sampler = WaitSampler(looks.rest)
    try:
        looks.at_work(2)
        looks.waiting()
        assert (sampler.looks, sampler.waits) == (0, 0), "it is off"
        sampler.on = True
        looks.at_work(2)
        looks.waiting(3)
        looks.at_work()
        sampler.on = False
        looks.waiting()
        assert sampler.take() == (6, 3) and (sampler.looks, sampler.waits) == (0, 0)
        sampler.on = True
        looks.waiting()
        assert sampler.take() == (1, 1), "anew"
    finally:
        sampler.close()


def test_it_looks_again_and_again_by_itself() -> None:
    sampler = WaitSampler()
    sampler.on = True
    while sampler.looks < 3:  # however long that takes
        time.sleep(0.001)
    sampler.close()
    assert sampler.take()[0] >= 3 and "wait-sampler" not in [thread.name for thread in threading.enumerate()]


def come_late(seen: Path) -> int:
    """The first rank's looks that found it in the barrier, which the others come to when there is one."""
    if dist.get_rank():
        while not seen.exists():
            time.sleep(0.01)
        dist.barrier()
        return 0

    samplers: list[WaitSampler] = []  # the thread that looks starts before the sampler has its name

    def rest(closed: threading.Event) -> bool:
        if any(sampler.waits for sampler in samplers):
            seen.touch()
        return closed.wait(0.01)

    samplers.append(WaitSampler(rest))
    samplers[0].on = True
    dist.barrier()
    samplers[0].close()
    return samplers[0].waits


def test_a_rank_in_a_collective_waits(ranks: RankPool, tmp_path: Path) -> None:
    waits, _ = ranks.run(2, come_late, tmp_path / "seen")
    assert waits >= 1

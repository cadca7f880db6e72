from __future__ import annotations

import sys
import time
from types import FrameType

import torch.distributed as dist

from megaforge.monitor.wait_sampler import WaitSampler, waits_for_others


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
    sampler = WaitSampler()
    try:
        time.sleep(0.1)
        assert sampler.looks == 0
        sampler.on = True
        time.sleep(0.5)
        sampler.on = False
        looks, waits = sampler.take()
        assert 5 <= looks <= 30 and waits == 0 and (sampler.looks, sampler.waits) == (0, 0)
    finally:
        sampler.close()

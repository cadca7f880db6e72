"""How much of its time a thread waits for other ranks: by looking at it now and then, from another thread."""

from __future__ import annotations

import linecache
import os
import sys
import threading
from collections.abc import Callable
from types import FrameType

import torch.distributed as dist

_HERTZ = 50
_DISTRIBUTED = os.path.dirname(dist.__file__) + os.sep


class WaitSampler:
    """Looks at what the thread that made it does, 50 times a second unless told otherwise; costs that thread nothing
    between looks.

    Attributes:
        on: whether looks count at present.
        looks: those that counted.
        waits: of these, those that found it in a collective or waiting for one.
    """

    def __init__(self, rest: Callable[[threading.Event], bool] = lambda closed: closed.wait(1 / _HERTZ)) -> None:
        """``rest``: waits for the next look, in the thread that looks; true once the event is set and none follows."""
        self.on = False
        self.looks = self.waits = 0
        self._watched = threading.get_ident()
        self._rest, self._closed = rest, threading.Event()
        self._thread = threading.Thread(target=self._sample, name="wait-sampler", daemon=True)
        self._thread.start()

    def take(self) -> tuple[int, int]:
        """(looks, waits) so far, which then begin anew."""
        taken = self.looks, self.waits
        self.looks = self.waits = 0
        return taken

    def close(self) -> None:
        """Ends the looking."""
        self._closed.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._rest(self._closed):
            if self.on:
                frame = sys._current_frames().get(self._watched)
                self.looks += 1
                self.waits += frame is not None and waits_for_others(frame)


def waits_for_others(frame: FrameType) -> bool:
    """Whether code that stands at ``frame`` is inside ``torch.distributed``, or waits for work that was handed to it
    (``work.wait()``)."""
    file = frame.f_code.co_filename
    return file.startswith(_DISTRIBUTED) or ".wait(" in linecache.getline(file, frame.f_lineno)

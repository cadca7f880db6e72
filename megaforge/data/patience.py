"""Reading samples from files that may fail for a moment: once more after a while, then a clear end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from megaforge.errors import UserError

Fill = Callable[[int, npt.NDArray[np.int64], npt.NDArray[np.bool_]], int]
FIRST_WAIT = 0.5  # seconds before the first repetition; each further one waits twice as long


class Patience:
    """Repeats what raises an ``OSError`` up to ``retries`` times.

    A read error of a memory map is not an exception but a signal (SIGBUS) that ends the process: what starts ranks
    again is the repetition there.
    """

    def __init__(self, retries: int, tell: Callable[..., None]) -> None:
        """``tell``: takes ``what`` is repeated, the ``error``, and which ``attempt`` failed."""
        self.retries, self._tell = retries, tell

    def fill(self, fill: Fill) -> Fill:
        """``SampleView.fill``, repeated."""

        def patiently(k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> int:
            def once() -> int:
                marks[:] = False
                return fill(k, tokens, marks)

            return int(self.repeat(once, f"sample {k}"))

        return patiently

    def repeat(self, action: Callable[[], Any], what: str) -> Any:
        """The result of ``action``.

        Raises:
            UserError: it failed each time; names ``what``, and the file where the system told it.
        """
        for attempt in range(self.retries + 1):
            try:
                return action()
            except OSError as error:
                text = describe(error)
                if attempt == self.retries:
                    times = f" ({attempt + 1} times)" if attempt else ""
                    raise UserError(
                        f"{what} cannot be read{times}: {text}; look after the file system, then start the run again: "
                        "it goes on from its newest checkpoint"
                    ) from error
                self._tell(what=what, error=text, attempt=attempt + 1)
                time.sleep(FIRST_WAIT * 2**attempt)
        raise AssertionError("the last attempt has returned or raised")


def describe(error: OSError) -> str:
    """The error and its file, as far as the system tells them."""
    text = error.strerror or str(error) or type(error).__name__
    return f"{text}: {error.filename}" if error.filename else text

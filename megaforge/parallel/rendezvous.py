"""Where the ranks of one start meet, on a store that outlives them."""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_PAUSE = 0.01  # seconds between two looks at who has come


def meet(rank: int, world_size: int, timeout: timedelta) -> Store:
    """A store that the ranks of this start share and no earlier start has written to. Collective.

    torchrun's agent keeps its store over restarts and its workers use it as theirs, so a restarted rank would read the
    address that its partner had before the restart (https://github.com/pytorch/pytorch/issues/135712). The restart
    count is not the same on all nodes, so it cannot tell the starts apart.
    """
    store: Store = next(rendezvous("env://", timeout=timeout))[0]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    return PrefixStore(agree_on_start(store, rank, world_size, timeout), store)


def agree_on_start(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name for this start of the ranks, the same on all of them and never used before on ``store``. Collective.

    Each rank leaves a number that nobody had before. Rank 0 answers each number that it finds; an answer to a rank's
    own number comes from a rank 0 that is alive, whatever earlier starts have left behind. It goes on until all have
    taken their answer, because the first number that it found may have been an earlier start's.

    Raises:
        RuntimeError: the others have not come in time.
    """
    number = secrets.token_hex(8)
    if rank:
        store.set(f"came/{rank}", number)
        store.wait([f"answer/{number}"], timeout)
        start = store.get(f"answer/{number}").decode()
        store.add(f"taken/{start}", 1)
        return start
    answered: set[bytes] = set()
    deadline = time.monotonic() + timeout.total_seconds()
    while (taken := store.add(f"taken/{number}", 0)) < world_size - 1:
        for other in range(1, world_size):
            if store.check([f"came/{other}"]) and (found := store.get(f"came/{other}")) not in answered:
                store.set(f"answer/{found.decode()}", number)
                answered.add(found)
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{world_size - 1 - taken} of {world_size} ranks have not come within {timeout.total_seconds():.0f} s"
            )
        time.sleep(_PAUSE)
    return number

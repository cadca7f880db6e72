"""The parity matrix as a command: ranks that go from layout to layout, and the table that rank 0 prints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from megaforge.device import communication_backend, resolve_device
from megaforge.errors import UserError
from megaforge.parallel.distributed import discover_launch, open_store
from megaforge.training.setup import set_numerics
from megaforge.verification.parity import (
    KINDS,
    TOLERANCE,
    Comparison,
    combined,
    compare,
    parity_config,
    write_documents,
)
from megaforge.verification.parity_layouts import LAYOUTS, ParityLayout
from megaforge.verification.parity_options import Options, parse_options

_WIDTH = max(len(layout.name) for layout in LAYOUTS)


def run(argv: Sequence[str], script: str) -> int:
    """The command; 0 when every layout that was compared agrees.

    Started by a launcher (torchrun, srun, mpirun) it is one of the ranks; on its own it starts ``script`` with the
    same arguments on as many ranks as the largest layout needs, ``--max-ranks`` at most.
    """
    options, launch = parse_options(argv), discover_launch()
    with tempfile.TemporaryDirectory() as folder:
        fitting = _fitting(options, os.path.join(folder, "none"))
        if launch.launcher != "python":
            return _rank(options, fitting, folder)
        ranks = max((layout.ranks for layout in fitting if layout.ranks <= options.max_ranks), default=1)
        return _rank(options, fitting, folder) if ranks == 1 else _start_ranks(ranks, [script, *argv])


def _fitting(options: Options, data_path: str) -> list[ParityLayout]:
    """The layouts that can carry the model; without names, one that cannot is left out.

    Raises:
        UserError: a layout that was asked for by name cannot, or none can.
    """
    fitting, refusal = [], None
    for layout in options.layouts:
        try:
            _ = parity_config(data_path, options.dtype, layout, options.flags, options.name)
            fitting.append(layout)
        except UserError as error:
            refusal = UserError(f"layout {layout.name}: {error}")
            if options.named:
                raise refusal from error
    if not fitting and refusal is not None:
        raise refusal
    return fitting


def _start_ranks(count: int, command: list[str]) -> int:
    """Runs ``command`` as ``count`` ranks on this machine; the first status that is not 0, which ends all of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"OMP_NUM_THREADS": "1", **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)},
        )
        for rank in range(count)
    ]
    try:
        while True:
            statuses = [process.poll() for process in processes]
            failed = [status for status in statuses if status]
            if failed or None not in statuses:
                return failed[0] if failed else 0
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _rank(options: Options, fitting: list[ParityLayout], folder: str) -> int:
    """One rank's way through the layouts. Only rank 0 knows the outcome, and gives it as its status."""
    launch = discover_launch()
    model = parity_config("none", options.dtype, None, options.flags, options.name)
    device = resolve_device(model.training.device, launch.local_rank)
    set_numerics(model, device)
    assert model.model.vocab_size is not None
    prefix = os.path.join(folder, "parity_text_document")
    documents = write_documents(prefix, model.model.vocab_size, runs=options.dtype == "fp64")
    store = open_store() if launch.world_size > 1 else None
    runnable = [layout for layout in fitting if layout.ranks <= launch.world_size]
    table = _Table(options, device)
    for layout in runnable:
        if launch.rank >= layout.ranks:
            continue
        with _group(layout, store, launch.rank, device):
            found = _compare(options, documents, layout, device)
        everyone = _gather(store, layout, launch.rank, found)
        if launch.rank == 0:
            table.add(layout, everyone)
    if launch.rank == 0:
        return table.end(runnable, fitting)
    return 0


@contextmanager
def _group(layout: ParityLayout, store: Store | None, rank: int, device: torch.device) -> Iterator[None]:
    """A default process group of the first ranks, for as long as the layout's run."""
    if layout.ranks > 1 and store is not None:
        own = PrefixStore(layout.name, store)
        dist.init_process_group(communication_backend(device), store=own, rank=rank, world_size=layout.ranks)
    try:
        yield
    except BaseException as error:
        error.add_note(f"at layout {layout.name}: {' '.join(layout.flags)}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _compare(options: Options, documents: str, layout: ParityLayout, device: torch.device) -> Comparison:
    config, reference = (
        parity_config(documents, options.dtype, one, options.flags, options.name) for one in (layout, None)
    )
    return compare(config, reference, device)


def _gather(store: Store | None, layout: ParityLayout, rank: int, found: Comparison) -> list[Comparison]:
    """What all ranks of the layout found, on rank 0; the others leave their note and go on."""
    if store is None or layout.ranks == 1:
        return [found]
    if rank > 0:
        store.set(f"{layout.name}/{rank}", json.dumps([found.worst, sorted(found.held)]))
        return []
    notes = [json.loads(store.get(f"{layout.name}/{other}")) for other in range(1, layout.ranks)]
    return [found, *(Comparison({k: (v[0], v[1]) for k, v in worst.items()}, frozenset(held)) for worst, held in notes)]


class _Table:
    """Prints a line as soon as a layout is compared."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self._options, self._device = options, device
        self._wrong: list[str] = []
        self._started = False

    def _start(self) -> None:
        dtype = self._options.dtype
        print(f"{self._options.name}, {dtype} on {self._device.type}: largest relative difference from one rank")
        print(f"(agrees: at most {TOLERANCE[dtype]:g})\n")
        print(f"{'layout':<{_WIDTH}}  ranks" + "".join(f"  {kind:>8}" for kind in KINDS) + "  verdict", flush=True)
        self._started = True

    def add(self, layout: ParityLayout, ranks: list[Comparison]) -> None:
        if not self._started:
            self._start()
        options = self._options
        config = parity_config("none", options.dtype, layout, options.flags, options.name)
        found = combined(ranks, config)
        fine = found.agrees(options.dtype)
        numbers = "".join(f"  {found.worst[kind][0]:>8.1e}" for kind in KINDS)
        print(f"{layout.name:<{_WIDTH}}  {layout.ranks:>5}{numbers}  {'agrees' if fine else 'DIFFERS'}", flush=True)
        if not fine:
            wrong = [f"{kind} by {e:.1e} ({w})" for kind, (e, w) in found.worst.items() if e > TOLERANCE[options.dtype]]
            self._wrong.append(f"{layout.name} ({' '.join(layout.flags)}): {'; '.join(wrong)}")

    def end(self, compared: list[ParityLayout], fitting: list[ParityLayout]) -> int:
        """The last lines, and the command's status."""
        print(f"\n{len(compared) - len(self._wrong)} of {len(compared)} layouts agree with one rank")
        larger = [layout.name for layout in fitting if layout not in compared]
        if larger:
            print(f"not compared, as they need more ranks: {', '.join(larger)}")
        misfits = [layout.name for layout in self._options.layouts if layout not in fitting]
        if misfits:
            print(f"not compared, as they cannot carry this model (--layouts NAME says why): {', '.join(misfits)}")
        for line in self._wrong:
            print(f"differs: {line}")
        return 1 if self._wrong or not compared else 0

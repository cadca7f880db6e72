"""What checkpoints cost: step time while saving every 10 steps, bandwidth against the disk's own, encryption.

Goals: at most 3 % of training time added by ``--async-save`` every 10 steps; save and load at 0.8 of the disk's own
bandwidth; encryption at most 15 % of the writer's time. The disk's own is one file of as many bytes, written in blocks
of 1 MiB and synced, and read back into memory of its size. Loads are measured twice: from the disk (the system has been
told to forget the files) and from what it keeps of them in memory.

    python tests/bench/bench_checkpoint.py [--megabytes 256] [--steps 20] [--rounds 5] [--folder DIR]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.checkpoint.background import BackgroundSave
from megaforge.checkpoint.checkpoint import load_checkpoint, save_checkpoint, take_snapshot
from megaforge.checkpoint.encryption import KEY_VARIABLE, Key
from megaforge.checkpoint.shards import TensorEntry
from megaforge.config.cli import parse_config
from megaforge.parallel.context import ParallelContext
from megaforge.resilience.nodes import Nodes
from megaforge.resilience.snapshots import SnapshotStore
from megaforge.training.prepare import prepare
from megaforge.training.setup import build_trainer
from megaforge.training.snapshots import snapshot_folder
from megaforge.training.trainer import Trainer
from tests.bench.harness import Measure, Ratio, interleaved_ratio, print_json, print_table

CTX = ParallelContext.single()
BLOCK, TENSORS, EVERY = 1 << 20, 16, 10
SECRET = bytes(range(32))
SNAPSHOTS = ("--save-interval", "0", "--snapshot-interval", str(EVERY))


def entries(megabytes: int) -> list[TensorEntry]:
    """A model's worth of tensors."""
    size = megabytes * (1 << 20) // TENSORS // 4
    return [TensorEntry(f"t{number}", None, torch.randn(size)) for number in range(TENSORS)]


def disk_write(folder: Path, content: memoryview) -> None:
    with open(folder / "raw", "wb", buffering=0) as file:
        for start in range(0, len(content), BLOCK):
            file.write(content[start : start + BLOCK])
        os.fsync(file.fileno())


def disk_read(folder: Path, into: memoryview) -> None:
    with open(folder / "raw", "rb", buffering=0) as file:
        for start in range(0, len(into), BLOCK):
            file.readinto(into[start : start + BLOCK])


def forget(folder: Path) -> None:
    """Has the system drop what it keeps of these files in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(
    action: Callable[[], object],
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], object] = lambda: None,
) -> Measure:
    def measure() -> float:
        before()
        start = clock()
        action()
        return clock() - start

    return measure


def trainer_of(save: Path | None, *more: str) -> Trainer:
    """The quickstart's size on random tokens, with AdamW: two moments of every weight are to be saved."""
    where = () if save is None else ("--save", str(save), "--save-interval", str(EVERY), "--keep-last", "2", *more)
    line = (
        *("--config", "cdrmix-tiny", "--optimizer", "adam", "--device", "cpu"),
        *("--mock-data", "--vocab-size", "4096", "--seq-length", "256"),
        *("--train-iters", str(10**6), "--global-batch-size", "4", "--log-level", "warning", "--lr-warmup-iters", "10"),
        *("--lr-decay-style", "constant", "--eval-iters", "0"),
    )
    trainer = build_trainer(prepare(parse_config([*line, *where], prog="bench").config), CTX)
    trainer._emit("on_train_start")
    return trainer


def steps_of(trainer: Trainer, steps: int) -> Measure:
    """Seconds of ``steps`` further steps, with what callbacks do after them."""

    def measure() -> float:
        start, end = time.perf_counter(), trainer.iteration + steps
        batches = iter(trainer._loader(trainer.data, trainer.progress.batches, trainer.consumed_samples))
        while trainer.iteration < end:
            trainer._emit("on_step_end", trainer._timed_step(batches))
        batches.close()  # type: ignore[attr-defined]
        return time.perf_counter() - start

    return measure


def snapshots(folder: Path, megabytes: int, rounds: int) -> dict[str, Ratio]:
    """What a run waits for a snapshot, against copying as many bytes; making and finding one, against the disk's
    writing and reading them."""
    held = entries(megabytes)
    flat = torch.cat([entry.tensor for entry in held])
    raw, twin = memoryview(flat.numpy()).cast("B"), torch.empty_like(flat)
    memory = snapshot_folder(None, str(folder / "run"))
    store, background = SnapshotStore(CTX, memory, Nodes(((0,),)), "bench"), BackgroundSave(CTX)

    def begin() -> None:
        background.begin(take_snapshot(1, held, {}, CTX), store.write)

    def settle() -> None:
        if background.in_flight:
            background.wait()

    def load() -> None:
        load_checkpoint(store.find(0) or memory, held, CTX, verify=False, fetch=store.fetch)

    begin()
    found = {"snapshot, wait": interleaved_ratio(timed(begin, before=settle), timed(lambda: twin.copy_(flat)), rounds)}
    settle()
    found["snapshot, whole"] = interleaved_ratio(
        timed(lambda: (begin(), settle())), timed(lambda: disk_write(folder, raw)), rounds
    )
    buffer = memoryview(bytearray(len(raw)))
    read = timed(lambda: disk_read(folder, buffer), before=lambda: forget(folder))
    found["snapshot, found and loaded"] = interleaved_ratio(timed(load), read, rounds)
    store.remove()
    return found


def training(folder: Path, steps: int, rounds: int) -> dict[str, Ratio]:
    """A run that saves every 10 steps against one that does not."""
    found = {}
    plain = trainer_of(None)
    for name, more in (
        ("steps, --async-save", ("--async-save",)),
        ("steps, --async-save --encrypt-checkpoints", ("--async-save", "--encrypt-checkpoints")),
        ("steps, saves between them", ()),
        ("steps, --snapshot-interval", (*SNAPSHOTS, "--load", str(folder / "run"))),
    ):
        saving = trainer_of(folder / "run", *more)
        steps_of(saving, EVERY)()  # the first save allocates
        found[name] = interleaved_ratio(steps_of(saving, steps), steps_of(plain, steps), rounds)
        saving._emit("on_train_end")
        shutil.rmtree(folder / "run", ignore_errors=True)
    return found


def bandwidths(folder: Path, megabytes: int, rounds: int) -> dict[str, Ratio]:
    """Seconds of saves and loads against those of the disk, and of encrypted against plain ones."""
    held, key = entries(megabytes), Key(SECRET)
    raw = memoryview(torch.cat([entry.tensor for entry in held]).numpy()).cast("B")
    buffer = memoryview(bytearray(len(raw)))

    def save(name: str, key: Key | None) -> Callable[[], object]:
        return lambda: save_checkpoint(folder / name, 1, held, {}, CTX, key=key)

    def load(name: str, verify: bool) -> Callable[[], object]:
        return lambda: load_checkpoint(folder / name / "step_0000001", held, CTX, verify=verify)

    found = {"save": interleaved_ratio(timed(save("plain", None)), timed(lambda: disk_write(folder, raw)), rounds)}
    for where, before in (("from the disk", lambda: forget(folder)), ("from memory", lambda: None)):
        read = timed(lambda: disk_read(folder, buffer), before=before)
        found[f"load {where}"] = interleaved_ratio(timed(load("plain", False), before=before), read, rounds)
        found[f"load {where}, hashes checked"] = interleaved_ratio(
            timed(load("plain", True), before=before), read, rounds
        )
    both = (timed(save("sealed", key), time.process_time), timed(save("plain", None), time.process_time))
    found["encrypted save, CPU"] = interleaved_ratio(*both, rounds)
    both = (timed(save("sealed", key)), timed(save("plain", None)))
    found["encrypted save"] = interleaved_ratio(*both, rounds)
    loads = (timed(load("sealed", False)), timed(load("plain", False)))
    found["encrypted load"] = interleaved_ratio(*loads, rounds)
    return found


PARTS = ("bandwidths", "snapshots", "training")
PEERS = {"steps": "no saves", "save": "disk", "load": "disk", "encrypted": "plain", "snapshot": "disk"}


def peer_of(case: str) -> str:
    return "copy" if case == "snapshot, wait" else PEERS[case.split()[0].rstrip(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="of the checkpoint that bandwidths are of")
    parser.add_argument("--steps", type=int, default=20, help="of a measured stretch of training")
    parser.add_argument("--rounds", type=int, default=5, help="measured pairs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary directory)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ[KEY_VARIABLE] = SECRET.hex()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        found: dict[str, Ratio] = {}
        if "bandwidths" in options.parts:
            found |= bandwidths(Path(name), options.megabytes, options.rounds)
        if "snapshots" in options.parts:
            found |= snapshots(Path(name), options.megabytes, options.rounds)
        if "training" in options.parts:
            found |= training(Path(name), options.steps, options.rounds)
    rows: list[list[object]] = []
    for case, ratio in found.items():
        peer = peer_of(case)
        rows.append([case, ratio.candidate, peer, ratio.peer, ratio.median, f"{ratio.min:.3f}-{ratio.max:.3f}"])
    print_table(
        f"checkpoints: {options.megabytes} MB; stretches of {options.steps} steps, a save every {EVERY}; seconds",
        ["case", "seconds", "peer", "its seconds", "ratio", "range"],
        rows,
    )
    print_json("checkpoint", {case: ratio.case(peer_of(case)) for case, ratio in found.items()})


if __name__ == "__main__":
    main()

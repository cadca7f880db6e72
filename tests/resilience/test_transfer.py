"""Files on their way between ranks arrive whole, or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megaforge.checkpoint.hashed_file import FileRecord
from megaforge.parallel.context import ParallelContext
from megaforge.resilience import transfer
from megaforge.resilience.transfer import Move, move_files
from tests.parallel.pool import RankPool


def record(content: bytes) -> FileRecord:
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def _move(folder: Path) -> tuple[list[str], list[str]]:
    """Both ways at once: whole, of several blocks, altered on the way, missing, where it cannot be written."""
    transfer._BLOCK = 1000
    ctx = ParallelContext.create()
    rank, other = ctx.world.rank, 1 - ctx.world.rank
    own = folder / str(rank)
    contents = {"whole": b"w" * 1000, "blocks": bytes(range(250)) * 17, "altered": b"a" * 30, "missing": b"m" * 2001}
    (own / ".arriving_blocked").mkdir(parents=True)
    moves = []
    for name, content in (contents | {"blocked": b"b" * 10}).items():
        moves += [Move(f"{name}{source}", record(content), source, 1 - source) for source in (0, 1)]
        if name != "missing":
            (own / f"{name}{rank}").write_bytes(content if name != "altered" else b"b" * 30)
    (own / f".arriving_blocked{other}").mkdir()
    problems = move_files(moves, own, ctx)
    arrived = sorted(path.name for path in own.iterdir() if path.is_file() and path.name.endswith(str(other)))
    assert (own / f"blocks{other}").read_bytes() == contents["blocks"]
    return problems, arrived


def test_what_arrives_is_what_was_sent(ranks: RankPool, tmp_path: Path) -> None:
    for rank, (problems, arrived) in enumerate(ranks.run(2, _move, tmp_path)):
        other = 1 - rank
        assert arrived == [f"blocks{other}", f"whole{other}"]
        texts = "\n".join(sorted(problems))
        assert f"altered{other} is not what rank {other} wrote" in texts
        assert f"missing{rank} cannot be sent" in texts and f"missing{other} is not what" in texts
        assert f"blocked{other} cannot be received" in texts and len(problems) == 4


def test_alone_nothing_moves(tmp_path):
    assert move_files([], tmp_path, ParallelContext.single()) == []

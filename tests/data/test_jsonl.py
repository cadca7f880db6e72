"""Any cut of a JSONL file into byte ranges gives every line to exactly one range, compressed or not."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest

from megaforge.data.jsonl import LineReader
from megaforge.errors import UserError

zstandard = pytest.importorskip("zstandard", reason="needs the data extra")


def write_all(directory: Path, content: bytes) -> list[Path]:
    """The content plain, as two gzip members and as two Zstandard frames."""
    half = len(content) // 2
    files = {
        "a.jsonl": content,
        "a.jsonl.gz": gzip.compress(content[:half]) + gzip.compress(content[half:]),
        "a.jsonl.zst": zstandard.compress(content[:half]) + zstandard.compress(content[half:]),
    }
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return [directory / name for name in files]


@pytest.mark.parametrize("seed", range(25))
def test_ranges_share_the_lines_out(seed: int, tmp_path: Path) -> None:
    source = random.Random(seed)
    lines = [b"x" * source.choice([0, 0, 1, 2, 5, 30, 3000]) + b"\n" for _ in range(source.randint(0, 60))]
    content = b"".join(lines) + (b"tail" if seed % 2 else b"")
    for path in write_all(tmp_path, content):
        cuts = [0, *sorted(source.randint(0, len(content)) for _ in range(6))]
        with LineReader(path) as reader:
            read = []
            for start, stop in zip(cuts, [*cuts[1:], None], strict=True):
                if source.random() < 0.3:
                    reader.goto(source.choice(cuts))  # a detour changes nothing
                reader.goto(start)
                owned = [line for part in reader.chunks(stop, source.choice([1, 10, 100, 10**6])) for line in part]
                begins = [content.find(line) for line in owned[:1]]
                assert all(stop is None or begin < stop for begin in begins)
                read += owned
            assert b"".join(read) == content
            assert reader.at_end()
            middle = source.randint(0, len(content))
            before = content[: max(middle - 1, 0)].count(b"\n") + (middle > 0 and len(content) > 0)
            assert reader.count_lines(middle) == before


def test_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf{}\n{}\n")
    with LineReader(path) as reader:
        assert list(reader.chunks(None)) == [[b"{}\n", b"{}\n"]]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_damaged_files_are_refused(name: str, damage: str, tmp_path: Path) -> None:
    content = b"".join(b'{"text": "%d"}\n' % (n * 7919) for n in range(5000))
    write_all(tmp_path, content)
    path = tmp_path / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4] if damage == "cut" else content)
    with pytest.raises(UserError, match="damaged or cut short"), LineReader(path) as reader:
        list(reader.chunks(None))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--input .*none.jsonl: No such file"):
        LineReader(tmp_path / "none.jsonl")

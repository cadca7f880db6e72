"""Files of a directory tree as documents: one JSON line each, in an order that depends on nothing but their names."""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import io
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megaforge.data.corpus.decode import NotText, decode
from megaforge.data.corpus.stdlib import STDLIB_EXCLUDES, pydoc_topics, stdlib_directory
from megaforge.data.jsonl import LineReader
from megaforge.data.text.formats import PROSE, holds_records, plain_suffix
from megaforge.data.text.readers import open_text, place
from megaforge.errors import UserError, require

RECORDS = (".jsonl", ".ndjson")
SOURCE = frozenset(
    (
        ".py .pyi .pyx .pxd .ipy .c .h .cc .cpp .cxx .hh .hpp .hxx .cu .cuh .m .mm .rs .go .zig .nim .d .v .sv .vhd "
        ".java .kt .kts .scala .groovy .clj .cs .fs .vb .swift .dart .js .mjs .cjs .jsx .ts .tsx .vue .svelte .css "
        ".scss .less .html .htm .xml .svg .php .rb .pl .pm .lua .tcl .r .jl .m4 .hs .ml .mli .elm .ex .exs .erl .hrl "
        ".lisp .lsp .el .scm .rkt .f .f90 .f95 .f03 .for .pas .ada .adb .ads .asm .s .sql .sh .bash .zsh .fish .ps1 "
        ".bat .cmake .mk .mak .gradle .toml .yaml .yml .ini .cfg .conf .proto .thrift .graphql .tf .nix .dockerfile"
    ).split()
)
NAMES = frozenset(
    "readme license licence copying copyright notice authors contributors changelog changes news history todo install "
    "makefile dockerfile rakefile gemfile cmakelists.txt".split()
)
DEFAULT_EXCLUDES = (
    *(".git", ".hg", ".svn", ".bzr", "__pycache__", ".venv", "venv", ".tox", ".nox", "node_modules"),
    *(".mypy_cache", ".pytest_cache", ".ruff_cache", "*.egg-info", "*.dist-info"),
)


@dataclass(frozen=True)
class DirectorySettings:
    """The flags of ``tools/directory_to_jsonl.py``."""

    inputs: tuple[str, ...]
    output: str
    json_key: str = "text"
    exclude: tuple[str, ...] = ()
    max_file_mb: float = 16.0
    python_stdlib: bool = False
    holdout_fraction: float = 0.0
    holdout_output: str | None = None
    keep_duplicates: bool = False

    def validate(self) -> None:
        """Raises UserError where the flags alone are wrong."""
        if not self.inputs and not self.python_stdlib:
            raise UserError("--input is missing: give a directory, files, or --python-stdlib")
        for path in self.inputs:
            if not os.path.exists(path):
                raise UserError(f"--input {path} does not exist")
        if not 0 <= self.holdout_fraction < 1:
            raise UserError(f"--holdout-fraction {self.holdout_fraction}: choose one in [0, 1), for example 0.02")
        if (self.holdout_fraction > 0) != (self.holdout_output is not None):
            raise UserError("--holdout-fraction and --holdout-output go together; give both or neither")
        if self.max_file_mb <= 0:
            raise UserError(f"--max-file-mb {self.max_file_mb}: choose a positive number")


@dataclass
class Report:
    """What became of the files: documents and UTF-8 bytes written to each output, and (path, reason) of the skipped."""

    documents: list[int] = field(default_factory=lambda: [0, 0])
    text_bytes: list[int] = field(default_factory=lambda: [0, 0])
    skipped: list[tuple[str, str]] = field(default_factory=list)


def directory_to_jsonl(settings: DirectorySettings) -> Report:
    """Writes ``{"text": ..., "source": ...}`` lines; the outputs appear whole or not at all.

    Which documents are held out follows from their text alone (SHA-256 below the fraction), so it stays the same when
    files are added, moved or renamed, and equal documents never land on both sides. Exact duplicates are dropped.

    Raises:
        UserError: a flag is wrong, nothing was found, or an output cannot be written.
    """
    settings.validate()
    dumps = require("orjson", extra="data", purpose="writing JSONL").dumps
    report, seen = Report(), set[bytes]()
    with ExitStack() as stack:
        names = [settings.output] + ([settings.holdout_output] if settings.holdout_output else [])
        outputs = [stack.enter_context(_atomic_output(name)) for name in names]
        for source, text in _documents(settings, report):
            digest = hashlib.sha256(text.encode()).digest()
            if not text.strip():
                report.skipped.append((source, "empty"))
            elif digest[:12] in seen and not settings.keep_duplicates:
                report.skipped.append((source, "the same text as an earlier document"))
            else:
                seen.add(digest[:12])
                side = int(int.from_bytes(digest[:8], "big") < settings.holdout_fraction * 2.0**64)
                outputs[side].write(dumps({settings.json_key: text, "source": source}) + b"\n")
                report.documents[side] += 1
                report.text_bytes[side] += len(text.encode())
        if not report.documents[0]:
            raise UserError(_nothing_found(settings, report))
    return report


def print_report(report: Report, settings: DirectorySettings) -> None:
    """Lists the skipped files with their reasons, and the totals, on stderr."""
    for path, reason in report.skipped:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    outputs = [settings.output, settings.holdout_output]
    for output, documents, size in zip(outputs, report.documents, report.text_bytes, strict=True):
        if output is not None:
            print(f"{output}: {documents:,} documents, {size / 1e6:,.2f} MB of text", file=sys.stderr)
    if report.skipped:
        print(f"skipped {len(report.skipped):,} files or records", file=sys.stderr)


def _documents(settings: DirectorySettings, report: Report) -> Iterator[tuple[str, str]]:
    """(source, text) of every document, in order; what cannot be used goes into the report."""
    ours = {os.path.realpath(name) for name in (settings.output, settings.holdout_output) if name}
    excludes = (*DEFAULT_EXCLUDES, *settings.exclude)
    roots = [(root, excludes) for root in settings.inputs]
    if settings.python_stdlib:
        roots.insert(0, (stdlib_directory(), (*excludes, *STDLIB_EXCLUDES)))
    for root, patterns in roots:
        for path, name in _files(root, patterns, report):
            if os.path.realpath(path) in ours:
                continue
            yield from _file(path, name, settings.json_key, settings.max_file_mb, report)
    if settings.python_stdlib:
        yield from pydoc_topics()


def _files(root: str, excludes: Sequence[str], report: Report) -> Iterator[tuple[str, str]]:
    """(path, name to show) of every file under ``root``, sorted by name; a single file is its own tree."""
    if not os.path.isdir(root):
        yield root, os.path.basename(root)
        return
    base = os.path.basename(os.path.abspath(root))
    for directory, subdirectories, files in os.walk(root):
        relative = Path(os.path.relpath(directory, root))
        subdirectories[:] = sorted(d for d in subdirectories if not _excluded((relative / d).as_posix(), excludes))
        for name in sorted(files):
            local = (relative / name).as_posix()
            if _excluded(local, excludes):
                continue
            path = os.path.join(directory, name)
            if os.path.islink(path) or not os.path.isfile(path):
                report.skipped.append((f"{base}/{local}", "a symbolic link or a special file"))
                continue
            yield path, f"{base}/{local}"


def _excluded(relative: str, patterns: Sequence[str]) -> bool:
    """Whether the path, or its last component, matches a pattern."""
    name = relative.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(relative, pattern) or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _file(path: str, name: str, key: str, max_mb: float, report: Report) -> Iterator[tuple[str, str]]:
    lower, suffix = os.path.basename(name).lower(), plain_suffix(name)
    try:
        known = suffix in PROSE or suffix in SOURCE or lower in NAMES or lower.split(".")[0] in NAMES
        if suffix in RECORDS:
            yield from _records(path, name, key, report)
        elif not known and suffix != ".json":
            report.skipped.append((name, f"no text or source file by its name ({suffix or 'no extension'})"))
        elif os.path.getsize(path) > max_mb * (1 << 20):
            report.skipped.append((name, f"larger than --max-file-mb {max_mb:g}"))
        elif suffix == ".json" and _is_json_lines(path):
            yield from _records(path, name, key, report)
        else:
            with LineReader(path) as reader:
                text = decode(reader.rest())
            if suffix == ".json":
                yield from _json_texts(text, name, key, report)
            else:
                yield name, text
    except NotText as error:
        report.skipped.append((name, str(error)))
    except UserError as error:
        report.skipped.append((name, str(error)))


def _is_json_lines(path: str) -> bool:
    """Whether a ``.json`` holds an object a line, several of them, rather than one value."""
    with LineReader(path) as reader:
        return holds_records(reader.head())


def _records(path: str, name: str, key: str, report: Report) -> Iterator[tuple[str, str]]:
    """The records of a JSONL file, read as a stream of any length."""
    before = 0
    with open_text(path, key) as reader:
        for chunk in reader.chunks(None):
            report.skipped += [(f"{name}{place(reader, before + n + 1)}", reason) for n, reason in chunk.bad]
            for number, text in zip(chunk.numbers, chunk.texts, strict=True):
                yield f"{name}:{before + number + 1}", text
            before += chunk.records


def _json_texts(content: str, name: str, key: str, report: Report) -> Iterator[tuple[str, str]]:
    """The texts of a JSON file: an object with the key, or a list of such objects or of strings."""
    loads = require("orjson", extra="data", purpose="reading JSON").loads
    try:
        value = loads(content)
    except ValueError as error:
        report.skipped.append((name, f"not valid JSON ({error})"))
        return
    several = isinstance(value, list)
    without = 0
    for number, record in enumerate(value if several else [value]):
        text = record if isinstance(record, str) else _text_of(record, key)
        if text is None:
            without += 1
        else:
            yield (f"{name}:{number}" if several else name), text
    if without:
        count = f"{without:,} of its records have" if several else "it has"
        report.skipped.append((name, f"{count} no string under the key {key!r}"))


def _text_of(record: Any, key: str) -> str | None:
    text = record.get(key) if isinstance(record, dict) else None
    return text if isinstance(text, str) else None


def _nothing_found(settings: DirectorySettings, report: Report) -> str:
    reasons = Counter(reason for _, reason in report.skipped).most_common(3)
    why = "; ".join(f"{count} x {reason}" for reason, count in reasons) or "there are no files"
    if report.documents[1]:
        why = "all documents fell to --holdout-output"
    return f"--input {' '.join(settings.inputs)}: no document for {settings.output} ({why})"


@contextmanager
def _atomic_output(name: str) -> Iterator[IO[bytes]]:
    """A file to write (compressed if its name says so) that takes its name only when the block ends well."""
    temporary = Path(f"{name}.tmp-{os.getpid()}")
    try:
        with ExitStack() as stack:
            raw = stack.enter_context(temporary.open("wb"))
            stream: Any = raw
            if name.endswith(".gz"):
                stream = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
            elif name.endswith(".zst"):
                zstandard = require("zstandard", extra="data", purpose=f"--output {name}")
                writer = zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False)
                stream = stack.enter_context(io.BufferedWriter(writer, 1 << 20))
            yield stream
            stream.flush()
        os.replace(temporary, name)
    except OSError as error:
        raise UserError(f"cannot write {name}: {error.strerror}; choose a writable --output") from error
    finally:
        temporary.unlink(missing_ok=True)

"""Files of a directory tree as documents: one JSON line each, in an order that depends on nothing but their names."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from megaforge.data.corpus.decode import NotText, decode
from megaforge.data.corpus.split import Splitter
from megaforge.data.corpus.stdlib import STDLIB_EXCLUDES, pydoc_topics, stdlib_directory
from megaforge.data.corpus.walk import DEFAULT_EXCLUDES, walk
from megaforge.data.jsonl import LineReader
from megaforge.data.left_out import LeftOut, details_path
from megaforge.data.outputs import atomic_output, temporary_path
from megaforge.data.text.formats import PROSE, TextFormat, holds_records, plain_suffix, text_format
from megaforge.data.text.readers import open_text, place
from megaforge.errors import UserError, require

RECORDS = (".jsonl", ".ndjson", ".parquet", ".arrow")
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
    split_documents: str | None = None
    document_size: int = 16384
    force: bool = False

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
        if self.holdout_output is not None and os.path.realpath(self.holdout_output) == os.path.realpath(self.output):
            raise UserError(f"--holdout-output {self.holdout_output}: choose another file than --output")
        if not self.json_key.isprintable():
            raise UserError(f"--json-key {self.json_key!r}: choose a key of printable characters")
        if not self.max_file_mb > 0:
            raise UserError(f"--max-file-mb {self.max_file_mb}: choose a positive number")
        if self.document_size < 1:
            raise UserError(f"--document-size {self.document_size}: choose a positive number of characters")
        if self.split_documents is not None and not self.split_documents.strip():
            raise UserError(f"--split-documents {self.split_documents!r}: give blank-lines, size, or a marker")


@dataclass
class Report:
    """What became of the files: documents and UTF-8 bytes written to each output, and what was left out."""

    documents: list[int] = field(default_factory=lambda: [0, 0])
    text_bytes: list[int] = field(default_factory=lambda: [0, 0])
    left_out: LeftOut = field(default_factory=LeftOut)


def directory_to_jsonl(settings: DirectorySettings) -> Report:
    """Writes ``{"text": ..., "source": ...}`` lines; the outputs appear whole or not at all.

    Which documents are held out follows from their text alone (SHA-256 below the fraction), so it stays the same when
    files are added, moved or renamed, and equal documents never land on both sides. Exact duplicates are dropped.

    Raises:
        UserError: a flag is wrong, nothing was found, or an output cannot be written or would replace another file.
    """
    settings.validate()
    dumps = require("orjson", extra="data", purpose="writing JSONL").dumps
    report, seen = Report(), set[bytes]()
    with ExitStack() as stack:
        outputs = [stack.enter_context(atomic_output(name, settings.force, flag)) for flag, name in _outputs(settings)]
        for source, text in _documents(settings, report):
            digest = hashlib.sha256(text.encode()).digest()
            if not text.strip():
                report.left_out.add(source, "empty")
            elif digest[:12] in seen and not settings.keep_duplicates:
                report.left_out.add(source, "the same text as an earlier document")
            else:
                seen.add(digest[:12])
                side = int(int.from_bytes(digest[:8], "big") < settings.holdout_fraction * 2.0**64)
                outputs[side].write(dumps({settings.json_key: text, "source": source}) + b"\n")
                report.documents[side] += 1
                report.text_bytes[side] += len(text.encode())
        _check_sides(settings, report)
    return report


def print_report(report: Report, settings: DirectorySettings) -> None:
    """Says on stderr what was left out, by reason, and the totals; writes the list of it beside the output."""
    details = report.left_out.write(settings.output)
    for line in report.left_out.summary():
        print(line, file=sys.stderr)
    if details is not None:
        print(f"left out {report.left_out.total:,} in all, listed in {details}", file=sys.stderr)
    for (_, name), documents, size in zip(_outputs(settings), report.documents, report.text_bytes, strict=False):
        print(f"{name}: {documents:,} documents, {size / 1e6:,.2f} MB of text", file=sys.stderr)


def _outputs(settings: DirectorySettings) -> list[tuple[str, str]]:
    """(flag, file) of everything that is written."""
    outputs = [("--output", settings.output)]
    if settings.holdout_output is not None:
        outputs.append(("--holdout-output", settings.holdout_output))
    return outputs


def _documents(settings: DirectorySettings, report: Report) -> Iterator[tuple[str, str]]:
    """(source, text) of every document, in order; what cannot be used goes into the report."""
    names = [name for _, name in _outputs(settings)]
    ours = {
        os.path.realpath(name)
        for name in [*names, details_path(settings.output), *(str(temporary_path(name)) for name in names)]
    }
    excludes = (*DEFAULT_EXCLUDES, *settings.exclude)
    split = None
    if settings.split_documents is not None:
        split = Splitter(settings.split_documents, settings.document_size)
    roots = [(root, excludes) for root in settings.inputs]
    if settings.python_stdlib:
        roots.insert(0, (stdlib_directory(), (*excludes, *STDLIB_EXCLUDES)))
    for root, patterns in roots:
        for path, name in walk(root, patterns, report.left_out):
            if os.path.realpath(path) not in ours:
                yield from _file(path, name, settings, split, report.left_out)
    if settings.python_stdlib:
        yield from pydoc_topics()
    if split is not None:
        split.check()


def _file(
    path: str, name: str, settings: DirectorySettings, split: Splitter | None, left_out: LeftOut
) -> Iterator[tuple[str, str]]:
    """The documents of one file. A file that ``--input`` names itself is read whatever its name and size are."""
    lower, suffix, named = os.path.basename(name).lower(), plain_suffix(name), path in settings.inputs
    known = suffix in PROSE or suffix in SOURCE or lower in NAMES or lower.split(".")[0] in NAMES
    try:
        if suffix in RECORDS:
            yield from _records(path, name, settings.json_key, left_out)
        elif not known and suffix != ".json" and not named:
            left_out.add(name, f"no text or source file by its name ({suffix or 'no extension'})")
        elif os.path.getsize(path) > settings.max_file_mb * (1 << 20) and not named:
            left_out.add(name, f"larger than --max-file-mb {settings.max_file_mb:g}")
        elif _is_json_lines(path, suffix, known):
            yield from _records(path, name, settings.json_key, left_out)
        else:
            with LineReader(path) as reader:
                text = decode(reader.rest())
            if suffix == ".json":
                yield from _json_texts(text, name, settings.json_key, left_out)
            elif split is None:
                yield name, text
            else:
                yield from ((f"{name}:{number}", part) for number, part in enumerate(split(text), 1))
    except (NotText, UserError) as error:
        left_out.add(name, str(error).removeprefix(f"--input {path}: "))
    except OSError as error:
        left_out.add(name, f"cannot be read ({error.strerror})")


def _is_json_lines(path: str, suffix: str, known: bool) -> bool:
    """Whether a ``.json`` or a file of an unknown name holds an object a line rather than one value."""
    if known:
        return False
    if suffix != ".json":
        return text_format(path) is TextFormat.LINES
    with LineReader(path) as reader:
        return holds_records(reader.head())


def _records(path: str, name: str, key: str, left_out: LeftOut) -> Iterator[tuple[str, str]]:
    """The records of a JSONL file, read as a stream of any length."""
    before = 0
    with open_text(path, key) as reader:
        for chunk in reader.chunks(None):
            for number, reason in chunk.bad:
                left_out.add(f"{name}{place(reader, before + number + 1)}", reason)
            for number, text in zip(chunk.numbers, chunk.texts, strict=True):
                yield f"{name}:{before + number + 1}", text
            before += chunk.records


def _json_texts(content: str, name: str, key: str, left_out: LeftOut) -> Iterator[tuple[str, str]]:
    """The texts of a JSON file: an object with the key, or a list of such objects or of strings."""
    loads = require("orjson", extra="data", purpose="reading JSON").loads
    try:
        value = loads(content)
    except ValueError as error:
        left_out.add(name, f"not valid JSON ({error})")
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
        detail = f" ({without:,} of its records)" if several else ""
        left_out.add(name, f"no string under the key {key!r}{detail}")


def _text_of(record: Any, key: str) -> str | None:
    text = record.get(key) if isinstance(record, dict) else None
    return text if isinstance(text, str) else None


def _check_sides(settings: DirectorySettings, report: Report) -> None:
    """Refuses an output without a document."""
    where = f"--input {' '.join(settings.inputs)}"
    if not report.documents[0]:
        reasons = list(report.left_out.counts.items())[:3]
        why = "; ".join(f"{count:,} x {reason}" for reason, count in reasons) or "there are no files"
        if report.documents[1]:
            why = f"all {report.documents[1]:,} fell to --holdout-output; --split-documents makes more of few texts"
        raise UserError(f"{where}: no document for {settings.output} ({why})")
    if settings.holdout_output is not None and not report.documents[1]:
        raise UserError(
            f"--holdout-fraction {settings.holdout_fraction}: none of {report.documents[0]:,} documents fell to "
            f"--holdout-output; choose a larger one, or more documents (--split-documents)"
        )

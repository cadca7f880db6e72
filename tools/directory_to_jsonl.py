#!/usr/bin/env python3
"""Gathers the text and source files of directories into JSONL, one document a line.

    python tools/directory_to_jsonl.py --input notes/ src/ --output train.jsonl \\
        --holdout-fraction 0.02 --holdout-output heldout.jsonl
    python tools/directory_to_jsonl.py --input book.txt --split-documents blank-lines --output book.jsonl

Reads .txt, .md, .rst, source files of some eighty languages, .json and .jsonl (also .gz and .zst, with the text under
--json-key), and any file that --input names itself. What is left out is counted by reason and listed in
OUTPUT.skipped.tsv. --python-stdlib takes the running Python's standard library
(without its tests) and the language reference that help() shows.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.arguments import ArgumentParser, integer, number
from megaforge.config.entry import run_entry
from megaforge.data.corpus.directory import DirectorySettings, directory_to_jsonl, print_report


def parse_arguments(arguments: list[str] | None = None) -> DirectorySettings:
    """The settings that the command line asks for."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", default=[], metavar="PATH", help="directories (recursive) or files")
    parser.add_argument("--python-stdlib", action="store_true", help="the running Python's library and documentation")
    parser.add_argument("--output", required=True, help="the JSONL file; .gz and .zst are compressed")
    parser.add_argument("--json-key", default="text", help="the key of the text, read and written")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="names or relative paths, with *")
    parser.add_argument(
        "--max-file-mb", type=number(above=0), default=16.0, help="larger files are skipped, JSONL apart"
    )
    parser.add_argument(
        "--holdout-fraction", type=number(0, below=1), default=0.0, help="share of the documents to hold out"
    )
    parser.add_argument("--holdout-output", help="the JSONL file of the documents held out")
    parser.add_argument("--keep-duplicates", action="store_true", help="keep documents equal to an earlier one")
    parser.add_argument(
        "--split-documents",
        metavar="blank-lines|size|MARKER",
        help="cut each text into documents: at blank lines, at --document-size, or at a marker ('<|endoftext|>')",
    )
    parser.add_argument("--document-size", type=integer(1), default=16384, help="characters of a document at most")
    parser.add_argument("--force", action="store_true", help="replace outputs that hold something else")
    flags = parser.parse_args(arguments)
    return DirectorySettings(
        inputs=tuple(flags.input),
        output=flags.output,
        json_key=flags.json_key,
        exclude=tuple(flags.exclude),
        max_file_mb=flags.max_file_mb,
        python_stdlib=flags.python_stdlib,
        holdout_fraction=flags.holdout_fraction,
        holdout_output=flags.holdout_output,
        keep_duplicates=flags.keep_duplicates,
        split_documents=flags.split_documents,
        document_size=flags.document_size,
        force=flags.force,
    )


def main() -> int:
    """Runs the command; 0 when the files are published."""
    settings = parse_arguments()
    print_report(directory_to_jsonl(settings), settings)
    return 0


if __name__ == "__main__":
    run_entry(main, "interrupted: nothing was written")

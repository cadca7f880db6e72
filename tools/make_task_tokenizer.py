#!/usr/bin/env python3
"""Makes a tokenizer of tasks in chunks, of which each word is a token.

python tools/make_task_tokenizer.py --output words.json
python tools/make_task_tokenizer.py --tasks kv_chunks needle_chunks --output words.json
"""

from __future__ import annotations

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.arguments import ArgumentParser
from megaforge.config.entry import run_entry
from megaforge.data.task_tokenizer import make_task_tokenizer
from megaforge.registry import load_extensions


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="whose words (default: all tasks')")
    parser.add_argument("--output", required=True, metavar="FILE.json", help="the tokenizer")
    parser.add_argument("--extensions", nargs="+", default=[], metavar="FILE", help="files with tasks of your own")
    parser.add_argument("--force", action="store_true", help="replace what stands at --output")
    return parser.parse_args(arguments)


def main() -> int:
    flags = parse_arguments()
    _ = load_extensions(tuple(flags.extensions))
    _ = make_task_tokenizer(flags.tasks, flags.output, flags.force)
    return 0


if __name__ == "__main__":
    run_entry(main)

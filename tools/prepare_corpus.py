#!/usr/bin/env python3
"""Makes a corpus from raw documents: reads, cleans, filters, removes duplicates, tokenises, and says why.

    python tools/prepare_corpus.py --config corpus.yaml --output corpus --workers 8
    python tools/prepare_corpus.py explain corpus --document 12-345
    python tools/prepare_corpus.py stages

corpus.yaml names the sources, the stages in order with their settings, and the tokenizer; 'stages' lists all keys.
The output holds datasets/NAME_text_document for --data-path, a lineage of every document that was read, and
corpus.json. Run again after a kill, it continues.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: no idle threads in a tool that never multiplies

from megaforge.config.arguments import ArgumentParser, integer
from megaforge.config.entry import run_entry
from megaforge.errors import require
from megaforge.registry import CORPUS_ENGINES


def prepare(arguments: list[str]) -> int:
    """``prepare_corpus.py --config ... --output ...``."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="corpus.yaml: sources, stages and datasets")
    parser.add_argument("--output", required=True, metavar="DIR", help="the directory of the corpus")
    parser.add_argument("--workers", type=integer(1, 4096), default=1, help="processes, on each rank")
    parser.add_argument("--engine", choices=CORPUS_ENGINES.names(), default="local", help="what runs the workers")
    parser.add_argument("--on-error", choices=("fail", "skip"), default="fail", help="what a bad record or file does")
    parser.add_argument("--keep-work", action="store_true", help="keep the tables that the stages passed on")
    parser.add_argument("--force", action="store_true", help="make it again, in place of whatever corpus is there")
    flags = parser.parse_args(arguments)
    require("pyarrow", extra="corpus", purpose="tools/prepare_corpus.py")
    from megaforge.data.corpus.pipeline import CorpusSettings, prepare_corpus

    prepare_corpus(CorpusSettings(**vars(flags)))
    return 0


def explain(arguments: list[str]) -> int:
    """``prepare_corpus.py explain DIR``: prints what is known of documents."""
    parser = ArgumentParser(prog="prepare_corpus.py explain", description=explain.__doc__)
    parser.add_argument("corpus", metavar="DIR", help="the output of a finished run")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--document", metavar="ID", help="its id, such as 12-345")
    wanted.add_argument("--url", help="its address")
    wanted.add_argument("--path", help="its file, as it was named in the sources")
    flags = parser.parse_args(arguments)
    require("pyarrow", extra="corpus", purpose="tools/prepare_corpus.py explain")
    from megaforge.data.corpus.explain import explain_documents

    print(explain_documents(flags.corpus, flags.document, flags.url, flags.path))
    return 0


def stages(arguments: list[str]) -> int:
    """``prepare_corpus.py stages [NAME]``: lists what corpus.yaml may hold."""
    parser = ArgumentParser(prog="prepare_corpus.py stages", description=stages.__doc__)
    parser.add_argument("stage", nargs="?", metavar="NAME", help="one stage; default: everything")
    flags = parser.parse_args(arguments)
    require("pyarrow", extra="corpus", purpose="tools/prepare_corpus.py stages")
    from megaforge.data.corpus.listing import list_keys

    print(list_keys(flags.stage))
    return 0


def main() -> int:
    """Runs the command; 0 when the corpus is published."""
    commands = {"explain": explain, "stages": stages}
    name, *rest = [*sys.argv[1:], ""]
    return commands[name](rest[:-1]) if name in commands else prepare(sys.argv[1:])


if __name__ == "__main__":
    run_entry(main, "interrupted: what is finished is kept; run the same command again to continue")

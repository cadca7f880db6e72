"""The text every Python brings along: its standard library's source and its language documentation (PSF licence).

Read in place and never redistributed; it differs between Python versions, so it suits a first run, not a comparison.
"""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Iterator

# Tests and their fixtures, installed packages, and files that describe this machine's build. Topics are taken as
# documents of their own. The codecs of old character sets are tables of numbers.
STDLIB_EXCLUDES = (
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "config-*", "_bundled"),
    *("_sysconfigdata*", "pydoc_data/topics.py"),
    *("encodings/cp*.py", "encodings/iso*.py", "encodings/mac_*.py", "encodings/koi8*.py"),
)


def stdlib_directory() -> str:
    """Where the running Python keeps its standard library."""
    return sysconfig.get_path("stdlib")


def pydoc_topics() -> Iterator[tuple[str, str]]:
    """(name, text) of the language reference's topics as ``help()`` shows them; none where they are not installed."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name in sorted(topics):
        yield f"pydoc:{name}", topics[name]

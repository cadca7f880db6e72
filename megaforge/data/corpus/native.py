"""The compiled form of what stages count in texts (csrc/corpus_text), where it was built; else NumPy does the same."""

from __future__ import annotations

import importlib
from typing import Any

_module: Any
try:
    _module = importlib.import_module("megaforge.data._corpus_text")
except ImportError:
    _module = None


def corpus_text() -> Any:
    """The extension; None where it was not built."""
    return _module


def notice() -> list[str]:
    """The line to say once where the extension is missing."""
    if _module is not None:
        return []
    return [
        "counting words with NumPy: the extension megaforge.data._corpus_text was not built "
        "(pip install --no-build-isolation -e .); heuristics, quality and minhash are several times slower"
    ]

"""Writes a dataset of 20,000 documents under the prefix that is given."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.training.tiny import write_dataset

if __name__ == "__main__":
    print(write_dataset(Path(sys.argv[1]), documents=20_000, vocab=50_000))

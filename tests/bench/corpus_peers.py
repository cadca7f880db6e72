"""What bench_corpus compares with: the same stages and signatures of other packages, in CPU-seconds on texts in memory.

``datatrove`` splits words by spaCy. Each of its stages, as each of ours, gets all the texts: its filters drop most of
what a machine's own documentation holds, and what is dropped would be spared the stages that follow.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from megaforge.data.corpus import features
from megaforge.data.corpus.records import make_records
from megaforge.data.corpus.stage import JoinStage, Scope
from megaforge.data.corpus.stages.heuristics import HeuristicsSettings
from megaforge.data.corpus.stages.length import LengthSettings
from megaforge.data.corpus.stages.minhash import MinhashSettings
from megaforge.data.corpus.stages.normalise import NormaliseSettings
from megaforge.data.corpus.stages.pii import PiiSettings
from megaforge.data.corpus.stages.quality import QualitySettings
from tests.bench.harness import Measure

SETTINGS = (
    NormaliseSettings(),
    LengthSettings(),
    HeuristicsSettings(),
    QualitySettings(),
    PiiSettings(),
    MinhashSettings(),
)


def rate(texts: list[str], work: Callable[[], object]) -> Measure:
    """A measure: MB of the texts a CPU-second of ``work``."""
    size = sum(len(text.encode()) for text in texts) / 1e6

    def measure() -> float:
        start = time.process_time()
        work()
        return size / (time.process_time() - start)

    return measure


def our_stages(texts: list[str]) -> Measure:
    """The stages whose like datatrove has."""
    pa.set_cpu_count(1)
    stages = [settings.open(Scope(Path("."))) for settings in SETTINGS]
    records = make_records(texts)

    def work() -> None:
        features._last = None
        for stage in stages:
            stage.sketch(records) if isinstance(stage, JoinStage) else stage.apply(records)

    return rate(texts, work)


def our_signatures(texts: list[str]) -> Measure:
    """Words, runs of five and signatures of 128 values."""
    stage, records = MinhashSettings().open(Scope(Path("."))), make_records(texts)
    return rate(texts, lambda: stage.sketch(records))


def datasketch_signatures(texts: list[str]) -> Measure:
    """Raises ImportError where datasketch is not installed."""
    from datasketch import MinHash

    def work() -> None:
        for text in texts:
            words = text.lower().split()
            runs = {" ".join(words[at : at + 5]).encode() for at in range(max(1, len(words) - 4))}
            MinHash(num_perm=128).update_batch(runs)

    return rate(texts, work)


def datatrove_stages(texts: list[str]) -> Measure:
    """Mended encodings, length, Gopher's rules, personal data and signatures. Raises ImportError where datatrove or
    spaCy is not installed."""
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter, LambdaFilter
    from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter

    steps = [
        FTFYFormatter(),
        LambdaFilter(lambda document: 50 <= len(document.text) <= 10**6),
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        PIIFormatter(),
    ]
    return rate(texts, lambda: _run([*steps, _signatures()], texts))


def datatrove_signatures(texts: list[str]) -> Measure:
    """14 bands of 8 values, its default. Raises ImportError where datatrove or spaCy is not installed."""
    _signatures()
    return rate(texts, lambda: _run([_signatures()], texts))


def _signatures() -> Any:
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig

    # Its default hash hands text to xxhash, which takes bytes alone from 4.0 on.
    return MinhashDedupSignature(tempfile.mkdtemp(), MinhashConfig(hash_config=HashConfig(hash_fc="sha1")))


def _run(steps: list[Any], texts: list[str]) -> None:
    from datatrove.data import Document
    from loguru import logger

    logger.remove()
    logging.disable(logging.INFO)
    for step in steps:
        documents = (Document(text=text, id=str(row), metadata={}) for row, text in enumerate(texts))
        for _ in step.run(documents, 0, 1) or ():
            pass

"""JSONL text to Megatron's ``.bin/.idx``: the whole run, from the flags to the published dataset.

The input is cut into shards; each worker turns one shard after another into a dataset of its own and no token ever
crosses a process; joining them is concatenating bytes. So the result does not depend on workers, ranks or restarts.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megaforge.data.fast_bpe import FastEncoder, proven_encoder
from megaforge.data.indexed_dataset import optimal_dtype
from megaforge.data.jsonl import is_compressed
from megaforge.data.outputs import make_parents
from megaforge.data.preprocess.only_run import only_run
from megaforge.data.preprocess.plan import (
    PreprocessSettings,
    ShardQueue,
    Source,
    WorkDirectory,
    cut_into_shards,
    shard_bytes,
)
from megaforge.data.preprocess.pool import run_shards, single_threaded
from megaforge.data.preprocess.progress import Progress
from megaforge.data.preprocess.publish import Job, SourceHasher, publish, standing_dataset
from megaforge.data.preprocess.ranks import RankGroup, discover_ranks, together
from megaforge.data.preprocess.shard import Encoder, WorkerSpec
from megaforge.data.text.expand import expand_inputs
from megaforge.data.text.readers import open_text
from megaforge.data.tokenizer import Tokenizer, load_tokenizer
from megaforge.errors import UserError, require

_PROOF_BYTES = 48 << 10


def preprocess(settings: PreprocessSettings) -> list[str]:
    """Writes ``PREFIX_KEY_document.bin``, ``.idx`` and ``.json`` for every JSON key; returns these dataset prefixes.

    A dataset that is already there, made from the same text with the same settings, is left as it is. Shards of a
    killed run are kept. Under mpirun or srun all ranks call this; rank 0 joins what they made.

    Raises:
        UserError: on every rank, when any rank met a mistake.
    """
    settings.validate()
    settings = dataclasses.replace(settings, inputs=expand_inputs(settings.inputs))
    make_parents(settings.output_prefix, "--output-prefix")
    single_threaded()
    group = discover_ranks(settings.output_prefix)
    outputs = []
    try:
        for key in settings.json_keys:
            output = f"{settings.output_prefix}_{key}_document"
            with only_run(output, Path(f"{output}.partial"), group, "--output-prefix") as held:
                _one_dataset(settings, key, output, group, held)
            outputs.append(output)
    except Exception:
        group.close()
        raise
    group.close()
    return outputs


def _one_dataset(settings: PreprocessSettings, key: str, output: str, group: RankGroup, lock_error: str | None) -> None:
    encoder: Encoder | None = None

    def prepare() -> dict[str, Any] | None:
        nonlocal encoder
        if group.rank:
            return None
        if lock_error:
            raise UserError(lock_error)
        job, encoder = _prepare(settings, key, output)
        return job

    prepared = together(group, prepare)
    if prepared[0] is None:
        return
    job = Job.from_json(prepared[0])
    hasher = SourceHasher([source.path for source in job.sources]) if group.rank == 0 else None
    try:
        _ = together(group, lambda: _tokenize(job, settings.workers, group, encoder))
        _ = together(group, lambda: publish(job, hasher) if hasher is not None else None)
    finally:
        if hasher is not None:
            hasher.stop()


def _open_sources(settings: PreprocessSettings, key: str) -> list[Source]:
    """The inputs, measured; says which of them are one document each."""
    require("orjson", extra="data", purpose="reading JSONL")
    sources = [Source.of(path, key) for path in settings.inputs]
    if not any(source.bytes for source in sources):
        raise UserError(f"--input {' '.join(settings.inputs)}: the corpus is empty")
    for source in sources:
        if not (source.lines or source.rows):
            print(
                f"{source.path}: one document (tools/directory_to_jsonl.py cuts a text into several)", file=sys.stderr
            )
    return sources


def _describe(settings: PreprocessSettings, key: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the sidecar says of the dataset before there is one: how its tokens are made."""
    return {
        "format": "megaforge-dataset",
        "version": 1,
        "tokenizer": {
            "type": tokenizer.type,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            **({"eod_token": settings.eod_token} if settings.eod_token else {}),
        },
        "settings": {"append_eod": settings.append_eod, "json_key": key, "on_error": settings.on_error},
        "dtype": optimal_dtype(tokenizer.vocab_size).name,
    }


def _prepare(settings: PreprocessSettings, key: str, output: str) -> tuple[dict[str, Any] | None, FastEncoder | None]:
    """Rank 0: checks everything that can be checked and makes the job's JSON, None if there is nothing to do.

    The proven fast encoder, if there is one, comes with it.
    """
    sources = _open_sources(settings, key)
    tokenizer = load_tokenizer(settings.tokenizer_type, settings.tokenizer_model, settings.eod_token)
    if settings.append_eod and tokenizer.eod is None:
        raise UserError(
            f"--append-eod: {settings.tokenizer_model} names no end-of-document token; name one with --eod-token"
        )
    described = _describe(settings, key, tokenizer)
    size = shard_bytes(sources, settings.shard_mb)
    work = WorkDirectory(Path(f"{output}.partial"))
    identity = {**described, "shard_bytes": size, "sources": [list(vars(source).values()) for source in sources]}
    if not settings.force and not work.is_for(identity):
        other, whole = standing_dataset(output, described, sources)
        if other is not None:
            raise UserError(
                f"--output-prefix {settings.output_prefix}: {output}.bin, .idx or .json exists ({other}); choose "
                "another prefix, or pass --force to replace it"
            )
        if whole:
            print(f"{output}: already made from this text with these settings (--force remakes it)", file=sys.stderr)
            return None, None
    work.prepare(identity)
    finished = len(list(work.path.glob("*.manifest.json")))
    if finished:
        print(f"{output}: continuing a run that finished {finished:,} shards", file=sys.stderr)
    fast, encoder = _fast_path(tokenizer, key, sources, work) if settings.fast else (None, None)
    spec = WorkerSpec(
        tokenizer_type=settings.tokenizer_type,
        tokenizer_model=settings.tokenizer_model,
        eod_token=settings.eod_token,
        fast=fast,
        eod=tokenizer.eod if settings.append_eod else None,
        dtype=described["dtype"],
        json_key=key,
        on_error=settings.on_error,
        work_directory=str(work.path),
        sources=settings.inputs,
    )
    groups = [[shard.to_json() for shard in group] for group in cut_into_shards(sources, size)]
    job = {
        "output": output,
        "spec": spec.to_json(),
        "sources": [vars(source) for source in sources],
        "groups": groups,
        "sidecar": described,
    }
    return job, encoder


def _fast_path(
    tokenizer: Tokenizer, key: str, sources: Sequence[Source], work: WorkDirectory
) -> tuple[str | None, FastEncoder | None]:
    """The fast encoder, proven, and the file of its definition; or neither (and one line why)."""
    encoder, difference = proven_encoder(tokenizer, _first_texts(sources, key))
    if difference is not None:
        print(f"the fast path (gigatoken) is off: {difference}; using tokenizers instead", file=sys.stderr)
    if encoder is None:
        return None, None
    path = work.path / "fast_tokenizer.json"
    path.write_text(encoder.definition, encoding="utf-8")
    return str(path), encoder


def _first_texts(sources: Sequence[Source], key: str) -> Iterator[str]:
    """Text from the beginning of the corpus, for the proof; bad lines are skipped."""
    room = _PROOF_BYTES
    with open_text(next(source.path for source in sources if source.bytes), key) as reader:
        for chunk in reader.chunks(_PROOF_BYTES):
            for text in chunk.texts:
                text = text[: min(room, 1 << 14)]
                room -= len(text)
                yield text
                if room <= 0:
                    return


def _tokenize(job: Job, workers: int, group: RankGroup, encoder: Encoder | None) -> None:
    known = not any(source.rows or is_compressed(source.path) for source in job.sources)
    total = sum(source.bytes for source in job.sources) // group.size if known else None
    label = "tokenise" if group.size == 1 else f"tokenise (rank {group.rank} of {group.size})"
    progress = Progress(total, label)
    run_shards(ShardQueue(job.groups, group.rank, group.size), job.spec, workers, progress, encoder)
    progress.finish()

"""Everything that can be wrong with a run and be seen before torch is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from megaforge.config.check_layout import vocabulary_cost
from megaforge.config.checkpoint_source import newest_meta
from megaforge.config.config import Config
from megaforge.config.launcher import discover_launch, print_rank_0
from megaforge.data.augment.source import augmentations_of
from megaforge.data.data_source import source_kind, unread_settings
from megaforge.data.run_tokenizer import with_run_tokenizer
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from megaforge.models.prepared_run import PreparedRun, check_run
from megaforge.registry import POSITION_EMBEDDINGS
from megaforge.tasks.at_end import check_tasks, why_not

Choose = Callable[[Config], tuple[Config, list[str]]]


def prepare(config: Config, said: Sequence[str] = (), choose: Choose | None = None) -> PreparedRun:
    """Checks the run against its ranks and files, and prints ``said`` and what else is to be noted; the vocabulary size
    is filled in.

    Args:
        choose: gives the configuration its layout, and what to note of it.

    Raises:
        UserError: the same on every rank, which makes it safe to leave.
    """
    world_size = discover_launch().world_size
    _check_world_size(config.parallel.world_size, world_size)
    _check_elastic(config, world_size)
    source_kind(config.data).check(config)
    config, tokenizer, notes = _with_saved_vocabulary(config)
    _ = augmentations_of(config, tokenizer)
    if choose is not None:
        config, more = choose(config)
        notes = [*notes, *more]
    _check_prompts(config, tokenizer)
    asks_nothing = why_not(config, tokenizer is not None)
    if tokenizer is not None and asks_nothing is None:
        check_tasks(config, lambda text: len(tokenizer.encode(text)))
    notes = notes if asks_nothing is None else [*notes, asks_nothing]
    run = check_run(config, world_size, tokenizer, [*notes, *unread_settings(config.data)])
    for note in (*said, *run.notes):
        print_rank_0(note)
    return run


def _check_prompts(config: Config, tokenizer: Tokenizer | None) -> None:
    """
    Raises:
        UserError: nothing makes tokens of ``--generate-prompts``, one has none, or the model lacks positions for it.
    """
    flags = config.generation
    if not flags.generate_prompts:
        return
    if tokenizer is None:
        raise UserError("--generate-prompts: the run has no tokenizer: add --tokenizer-model FILE")
    longest = POSITION_EMBEDDINGS.get(config.model.position_embedding_type).longest(config.model)
    for prompt in flags.generate_prompts:
        tokens, more = len(tokenizer.encode(prompt)), flags.generate_tokens
        if not tokens:
            raise UserError(f"--generate-prompts {prompt!r:.80}: the tokenizer makes no token of it; give another text")
        if longest is not None and tokens + more > longest:
            raise UserError(
                f"--generate-prompts {prompt!r:.80}: its {tokens} tokens and --generate-tokens {more} are more than "
                f"the {longest} positions of the model (--max-position-embeddings)"
            )


def _check_world_size(meant: int | None, started: int) -> None:
    if meant is not None and meant != started:
        raise UserError(
            f"--world-size {meant}: {started} rank{'s were' if started > 1 else ' was'} started; start {meant} "
            f"(torchrun --nproc-per-node {meant}), or give --world-size {started} or none: the model is the same"
        )


def _check_elastic(config: Config, started: int) -> None:
    allowed = config.resilience.elastic_ranks
    if allowed is not None and not allowed[0] <= started <= allowed[1]:
        few = started < allowed[0]
        raise UserError(
            f"--elastic {config.resilience.elastic}: {started} rank{'s were' if started > 1 else ' was'} started; "
            + (f"wait until {allowed[0]} are there" if few else f"start at most {allowed[1]}")
            + ", or give wider bounds"
        )


def _with_saved_vocabulary(config: Config) -> tuple[Config, Tokenizer | None, list[str]]:
    """As :func:`megaforge.data.run_tokenizer.with_run_tokenizer`, and a run that continues without a ``--vocab-size``
    keeps its checkpoint's where that is larger than the tokenizer's: presets once had their own."""
    found, tokenizer, notes = with_run_tokenizer(config)
    loaded = [name for name in (config.checkpoint.load, config.checkpoint.pretrained_checkpoint) if name is not None]
    if not loaded or config.model.vocab_size is not None or tokenizer is None:
        return found, tokenizer, notes
    directory = next((name for name in loaded if newest_meta(Path(name))), loaded[0])
    saved = _saved_vocabulary(Path(directory))
    if saved is None or saved <= tokenizer.vocab_size:
        return found, tokenizer, notes
    model = dataclasses.replace(config.model, vocab_size=saved)
    note = vocabulary_cost(model, tokenizer.vocab_size)
    kept = f"--vocab-size {saved}, as in the checkpoints of {directory}"
    return dataclasses.replace(config, model=model), tokenizer, [f"{kept} ({note})" if note else kept]


def _saved_vocabulary(directory: Path) -> int | None:
    """``--vocab-size`` of the newest checkpoint; None where there is none to read, which is for loading to say."""
    found = newest_meta(directory)
    try:
        size = None if found is None else found[1]["config"]["model"]["vocab_size"]
    except (KeyError, TypeError):
        return None
    return size if isinstance(size, int) else None

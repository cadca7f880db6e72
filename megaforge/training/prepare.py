"""Everything that can be wrong with a run and be seen before torch is imported."""

from __future__ import annotations

from megaforge.config.check_layout import Layout, check_layout
from megaforge.config.config import Config
from megaforge.config.launcher import discover_launch, say_once
from megaforge.data.blend import parse_data_path, parse_split
from megaforge.data.indexed_dataset import check_files
from megaforge.data.run_tokenizer import with_run_tokenizer
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from megaforge.models.pipeline_shape import check_pipeline


def prepare(config: Config) -> tuple[Config, Layout, Tokenizer | None]:
    """Checks the run against its ranks and files; the vocabulary size is filled in.

    Raises:
        UserError: the same on every rank, which makes it safe to leave.
    """
    launch = discover_launch()
    if not config.data.data_path:
        raise UserError("--data-path is missing; give the prefix of a dataset, such as corpus/train_text_document")
    if config.training.early_stopping_patience and not config.training.eval_iters:
        raise UserError(
            f"--early-stopping-patience {config.training.early_stopping_patience} judges evaluations, and there are "
            "none: set --eval-iters and --eval-interval"
        )
    parse_split(config.data.split)
    for _, prefix in parse_data_path(config.data.data_path):
        check_files(prefix)
    config, tokenizer, notes = with_run_tokenizer(config)
    layout = check_layout(config, launch.world_size)
    config.model.padded_vocab_size()
    check_pipeline(config.model, config.parallel, layout.micro_batches)
    for note in (*notes, *layout.notes):
        say_once(note)
    return config, layout, tokenizer

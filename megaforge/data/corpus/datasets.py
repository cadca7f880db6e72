"""Kept documents to datasets: tokenised by the same workers as ``tools/preprocess_data.py``, one dataset a bucket."""

from __future__ import annotations

from pathlib import Path

from megaforge.data.corpus.job import Job
from megaforge.data.corpus.recipe import Recipe
from megaforge.data.corpus.totals import Total
from megaforge.data.preprocess.plan import PreprocessSettings
from megaforge.data.tokenizer import guess_tokenizer_type, load_tokenizer
from megaforge.errors import UserError


def tokenizer_of(recipe: Recipe) -> tuple[str, str] | None:
    """(type, model) of the recipe's tokenizer, its model as a path where it is one."""
    shard = recipe.shard
    if shard.tokenizer_model is None:
        return None
    near = recipe.scope.file(shard.tokenizer_model)
    model = str(near) if near.exists() else shard.tokenizer_model
    return shard.tokenizer_type or guess_tokenizer_type(model), model


def check_tokenizer(recipe: Recipe) -> None:
    """
    Raises:
        UserError: the tokenizer cannot be read, or has no token to end documents with.
    """
    named = tokenizer_of(recipe)
    if named is None:
        return
    try:
        tokenizer = load_tokenizer(*named, recipe.shard.eod_token)
    except UserError as error:
        raise UserError(f"{recipe.label}: shard.tokenizer_model: {error}") from error
    if recipe.shard.append_eod and tokenizer.eod is None:
        raise UserError(
            f"{recipe.label}: shard.append_eod: {recipe.shard.tokenizer_model} names no end-of-document token; name "
            "one with eod_token"
        )


def dataset_files(job: Job, name: str) -> list[Path]:
    """The documents of a dataset, in order of the partitions."""
    return sorted((job.work.path / "documents" / name).glob("*.arrow"))


def dataset_prefix(output: Path, name: str) -> Path:
    """What ``--data-path`` takes for a dataset."""
    return output / "datasets" / f"{name}_text_document"


def make_datasets(job: Job, total: Total, workers: int) -> None:
    """Writes every dataset; all ranks call this."""
    from megaforge.data.preprocess.driver import preprocess

    named, shard = tokenizer_of(job.recipe), job.recipe.shard
    for name in total.datasets if named is not None else ():
        assert named is not None
        settings = PreprocessSettings(
            inputs=tuple(str(path) for path in dataset_files(job, name)),
            output_prefix=str(job.output / "datasets" / name),
            tokenizer_type=named[0],
            tokenizer_model=named[1],
            eod_token=shard.eod_token,
            append_eod=shard.append_eod,
            workers=workers,
        )
        preprocess(settings)

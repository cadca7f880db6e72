"""Whether ``--evaluate-at-end`` can be done: said before the run, which may take weeks."""

from __future__ import annotations

from megaforge.config.config import Config
from megaforge.errors import UserError
from megaforge.registry import POSITION_EMBEDDINGS
from megaforge.tasks.example import Count
from megaforge.tasks.lm_eval_file import check_task, is_lm_evals
from megaforge.tasks.task_file import read_task


def why_not(config: Config, has_tokenizer: bool) -> str | None:
    """Why the tasks of a preset are not asked; None where they are, or there are none."""
    if not config.evaluation.evaluate_at_end:
        return None
    if not config.checkpoint.save:
        return "--evaluate-at-end: nothing is saved (--save), so that no task is asked at the end"
    if not has_tokenizer or config.data.tokenizer_type == "NullTokenizer":
        return "--evaluate-at-end: there is no tokenizer of texts, so that no task is asked at the end"
    return None


def check_tasks(config: Config, count: Count) -> None:
    """Makes an example of each task.

    Args:
        count: tokens of a text.

    Raises:
        UserError: an unknown task, a bad file, a metric that is not installed, or a length that holds no example.
    """
    flags = config.evaluation
    lengths = flags.evaluate_at_end_lengths or (config.data.seq_length,)
    longest = POSITION_EMBEDDINGS.get(config.model.position_embedding_type).longest(config.model)
    for name in flags.evaluate_at_end:
        if is_lm_evals(name):
            check_task(name)
            continue
        task = read_task(name)
        for length in (0,) if task.task is None else task.lengths or lengths:
            if longest is not None and length > longest:
                raise UserError(
                    f"--evaluate-at-end {name}: {length} tokens, and the model has positions for {longest} "
                    "(--max-position-embeddings); give shorter --evaluate-at-end-lengths"
                )
            try:
                task.examples_of(length, 1, count)
            except UserError as error:
                raise UserError(f"--evaluate-at-end: {error} (--evaluate-at-end-lengths)") from error

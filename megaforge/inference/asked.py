"""Several tasks, ours and lm-eval's, put to one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megaforge.config.launcher import print_rank_0
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from megaforge.inference.answer_cache import AnswerCache
from megaforge.inference.leading import Ask, led
from megaforge.inference.lm_eval_backend import results as lm_eval_results
from megaforge.inference.requests import Answerer
from megaforge.inference.restore import TrainedModel
from megaforge.inference.task_run import FURTHER, Result, TaskRun
from megaforge.inference.tool_calls import ToolCalls
from megaforge.tasks.lm_eval_file import is_lm_evals
from megaforge.tasks.task_file import read_task

EXAMPLES = 50
Answered = tuple[list[Result], list[dict[str, Any]]]  # and each example with what was written


@dataclass(frozen=True)
class Asked:
    """What is asked.

    Attributes:
        tasks: names and files.
        lengths: tokens of examples that are made, where a task does not say; none: as in training.
        examples: of each length, where a task does not say; None: 50, and all of lm-eval's.
        max_length: tokens that a sequence may have; None: what examples need, at least as many as in training.
        batch_size: sequences computed at once.
        tools: what answers the model while it writes.
    """

    tasks: Sequence[str]
    lengths: Sequence[int] = ()
    examples: int | None = None
    max_length: int | None = None
    batch_size: int = 8
    tools: ToolCalls | None = None

    def lengths_for(self, trained: TrainedModel) -> tuple[int, ...]:
        """Of tasks that do not say."""
        return tuple(self.lengths or (trained.config.data.seq_length,))

    def room(self, trained: TrainedModel) -> int:
        """Tokens of a sequence, with some for answers that are longer than right ones.

        Raises:
            UserError: the model has positions for fewer than examples have tokens.
        """
        if self.max_length is not None:
            return self.max_length
        own = [length for task in self.tasks if not is_lm_evals(task) for length in read_task(task).lengths]
        longest, most = trained.model.longest, max(*self.lengths_for(trained), *own, 0)
        wanted = max(trained.config.data.seq_length, most) + FURTHER
        if longest is not None and most > longest:
            raise UserError(
                f"--lengths {most}: the model has positions for {longest} tokens (--max-position-embeddings); give no "
                "more"
            )
        return wanted if longest is None else min(wanted, longest)


def tasks_answered(
    asked: Asked, trained: TrainedModel, tokenizer: Tokenizer, cache: AnswerCache | None = None
) -> Answered | None:
    """The results of all tasks, on the first rank; None on others. Collective.

    Args:
        cache: of the first rank.

    Raises:
        UserError: a task cannot be asked.
    """
    max_length = asked.room(trained)
    answerer = Answerer(trained, tokenizer, max_length, asked.batch_size, tools=asked.tools)

    def work(ask: Ask) -> Answered:
        run = TaskRun(ask, tokenizer, asked.lengths_for(trained), asked.examples or EXAMPLES)
        results: list[Result] = []
        samples: list[dict[str, Any]] = []
        for name in asked.tasks:
            if is_lm_evals(name):
                more, written = lm_eval_results(name, ask, tokenizer, max_length, asked.examples)
            else:
                more, written = run.results(read_task(name))
            results, samples = results + more, samples + written
        if answerer.cut.requests:
            print_rank_0(answerer.cut.line(max_length))
        if asked.tools is not None:
            print_rank_0(asked.tools.line())
        return results, samples

    return led(answerer, work, cache)

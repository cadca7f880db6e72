"""``--evaluate-at-end``: a complete run asks its saved model what the tasks say, on the ranks that trained it."""

from __future__ import annotations

import json
from pathlib import Path

from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.durable import replacing
from megaforge.errors import UserError
from megaforge.inference.asked import Asked, tasks_answered
from megaforge.inference.restore import load_trained_model
from megaforge.inference.task_command import table
from megaforge.tasks.at_end import why_not

FILE = "evaluation.json"


def evaluate_at_end(config: Config) -> None:
    """Answers the tasks, prints the table, and writes ``evaluation.json`` beside the checkpoints. Collective.

    The model is loaded at the run's tp and pp, whole otherwise: ranks of cp, ep and dp are replicas. What goes wrong
    is said; the training is complete in any case.
    """
    flags, save = config.evaluation, config.checkpoint.save
    if not flags.evaluate_at_end or save is None or why_not(config, True) is not None:
        return
    parallel = config.parallel
    try:
        trained = load_trained_model(
            save,
            tp=parallel.tensor_model_parallel_size,
            pp=parallel.pipeline_model_parallel_size,
            device=config.training.device,
        )
        asked = Asked(
            flags.evaluate_at_end,
            flags.evaluate_at_end_lengths,
            flags.evaluate_at_end_examples,
        )
        found = tasks_answered(asked, trained, trained.load_tokenizer())
    except UserError as error:
        print_rank_0(f"--evaluate-at-end: not done: {error}")
        return
    if found is not None:
        results, _ = found
        facts = {"checkpoint": str(trained.path), "iteration": trained.meta.get("iteration")}
        with replacing(Path(save) / FILE) as part:
            part.write_text(json.dumps(facts | {"results": [vars(one) for one in results]}, indent=1) + "\n", "utf-8")
        print_rank_0("\n".join(table(results)))

"""What a model would write, shown at each evaluation of a run: ``--generate-prompts``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from megaforge.monitor.samples import SAMPLES_FILE, WrittenText, append_sample
from megaforge.parallel.context import ParallelContext
from megaforge.training.callbacks import Callback, Place
from megaforge.training.metrics import EvaluationMetrics
from megaforge.training.trainer import Trainer, evaluating

logger = logging.getLogger(__name__)

Shows = Callable[[int, str, str], None]


def asked_for(config: Config, tokenizer: Tokenizer | None, ctx: ParallelContext) -> SampleGenerator | None:
    """What ``--generate-prompts`` asks for: the first rank prints the texts, and keeps them in ``--save``."""
    flags, save = config.generation, config.checkpoint.save
    if not flags.generate_prompts or tokenizer is None:
        return None
    directory = Path(save) if save is not None and ctx.is_first_rank else None
    return SampleGenerator(tokenizer, flags.generate_prompts, flags.generate_tokens, partial(_printed, directory))


def _printed(directory: Path | None, iteration: int, prompt: str, text: str) -> None:
    print_rank_0(f"sample after {iteration}: {prompt!r} -> {text!r}")
    if directory is None:
        return
    try:
        append_sample(directory, WrittenText(iteration, prompt, text))
    except OSError as error:
        logger.warning("%s: a sample could not be kept: %s", directory / SAMPLES_FILE, error)


class SampleGenerator(Callback):
    """Continues prompts by the likeliest tokens whenever the model is evaluated; all ranks of tp compute them.

    Attributes:
        texts: of the newest evaluation, by prompt.
    """

    place = Place.SHOW

    def __init__(
        self, tokenizer: Tokenizer, prompts: Sequence[str], tokens: int = 32, show: Shows | None = None
    ) -> None:
        """
        Args:
            tokens: at most so many of each; a text ends with its end of document.
            show: is told (iteration, prompt, text) on every rank; None: rank 0 prints them.
        """
        self.tokenizer, self.prompts, self.tokens = tokenizer, tuple(prompts), tokens
        self.show: Shows = partial(_printed, None) if show is None else show
        self.texts: dict[str, str] = {}

    def on_train_start(self, trainer: Trainer) -> None:
        """
        Raises:
            UserError: the model is cut into stages or its sequences into chunks: one rank has to have whole ones.
        """
        if trainer.engine.plan.num_stages > 1 or trainer.ctx.cp.size > 1:
            raise UserError("generator: samples are for --pp 1 and --cp 1; use tools/generate.py on the checkpoints")

    def on_evaluate(self, trainer: Trainer, metrics: EvaluationMetrics) -> None:
        for prompt in self.prompts:
            self.texts[prompt] = self._continued(trainer, prompt)
            self.show(metrics.iteration, prompt, self.texts[prompt])

    @torch.no_grad()
    def _continued(self, trainer: Trainer, prompt: str) -> str:
        [model], given = trainer.model.chunks, self.tokenizer.encode(prompt)
        found: list[int] = []
        with evaluating(trainer.model):
            state, tokens = model.new_state(), torch.tensor([given], device=trainer.ctx.device)
            while len(found) < self.tokens:
                scores = model.logits(tokens, state=state, last_only=True)[0, -1]
                found.append(int(scores[: self.tokenizer.vocab_size].argmax()))
                if found[-1] == self.tokenizer.eod:
                    break
                tokens = tokens.new_tensor([[found[-1]]])
        return self.tokenizer.decode([one for one in found if one != self.tokenizer.eod])

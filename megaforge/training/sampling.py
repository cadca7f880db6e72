"""What a model would write, shown at each evaluation of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megaforge.config.launcher import print_rank_0
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from megaforge.training.callbacks import Callback, Place
from megaforge.training.metrics import EvaluationMetrics
from megaforge.training.trainer import Trainer, evaluating

Shows = Callable[[int, str, str], None]


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
        self.tokenizer, self.prompts, self.tokens, self.show = tokenizer, tuple(prompts), tokens, show
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
            if self.show is not None:
                self.show(metrics.iteration, prompt, self.texts[prompt])
            else:
                print_rank_0(f"sample after {metrics.iteration}: {prompt!r} -> {self.texts[prompt]!r}")

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

"""Whether stage B leaves the core's language modelling as it was: perplexity of stage A's validation text.

It is measured before stage B's first step, of the model without adapters, and behind the last one, with adapters as
they are trained and without them; where the run pauses (``--exit-interval``), behind that step too. A run that was
asked to end, by a signal or by the clock, does not measure, for whoever asked may not wait; where nothing but this was
left to do, the next start does. The text is that which stage A's own evaluations read: the same samples at any layout
and batch size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megaforge.config.checkpoint_source import newest_meta
from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.config.schema import config_from_dict
from megaforge.data.data_source import SampleView, source_kind
from megaforge.data.run_tokenizer import with_run_tokenizer
from megaforge.errors import UserError
from megaforge.parallel.agree import together
from megaforge.reasoning.reference import without_adapters
from megaforge.training.callbacks import Callback, Place

if TYPE_CHECKING:
    from megaforge.training.metrics import StepMetrics
    from megaforge.training.trainer import Trainer

LIMIT = 0.01  # by which perplexity may grow, adapters reset


class FirstSamples(SampleView):
    """The first ``most`` samples of ``view``."""

    def __init__(self, view: SampleView, most: int) -> None:
        self._view = view
        self._most = min(most, len(view)) if isinstance(view, Sized) else most
        self.eod_mask_loss = view.eod_mask_loss

    def __len__(self) -> int:
        return self._most

    def sequence_length(self, k: int) -> int:
        return self._view.sequence_length(k)

    def fill(self, k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> int:
        return self._view.fill(k, tokens, marks) if k < self._most else self._padding(tokens)

    @staticmethod
    def _padding(tokens: npt.NDArray[np.int64]) -> int:
        tokens.fill(0)
        return 0

    def weigh(self, k: int, counts: npt.NDArray[np.float32]) -> None:
        if k < self._most:
            self._view.weigh(k, counts)


class CoreText(Callback):
    """
    Attributes:
        before, reset, trained: perplexities before stage B; after it, adapters reset; and with them. None: not known.
        measured: the iteration after which the latter two were measured; 0: none.
    """

    place = Place.BEFORE
    state_name = "core_text"

    def __init__(self, trainer: Trainer) -> None:
        self.before: float | None = None
        self.reset: float | None = None
        self.trained: float | None = None
        self.measured = 0
        self._text: FirstSamples | None = None
        self._where = ""

    def on_train_start(self, trainer: Trainer) -> None:
        if trainer.interrupted or (trainer.finished and self.measured == trainer.iteration):
            return
        try:
            self._text = together(trainer.ctx, lambda: self._open(trainer.config))
        except UserError as error:
            print_rank_0(f"the core's text is not measured: {error}")
        if self._text is None:
            return
        trainer.add(_AfterJudging(self))
        if trainer.finished:
            self._measure_after(trainer)
        elif not trainer.iteration and _resets(trainer.config):
            self._measure_before(trainer)

    def _measure_before(self, trainer: Trainer) -> None:
        with without_adapters(trainer.model):
            self.before = self._measure(trainer)
        if math.isnan(self.before):
            print_rank_0(f"the core's text is not measured: there is nothing to predict in {self._where}")
            self._text = self.before = None
        else:
            print_rank_0(f"{self._where}: perplexity {self.before:.5g} before stage B")

    def _open(self, config: Config) -> FirstSamples | None:
        """What stage A's evaluations read, the same on every rank; None: nobody asks for it.

        Raises:
            UserError: it is not there.
        """
        flags = config.core_text
        begin, core, size = _core(config)
        training = core.training
        most = training.eval_iters if flags.core_eval_iters is None else flags.core_eval_iters
        if not most:
            if flags.core_eval_iters is None:
                raise UserError(
                    f"the run of {begin} measured nothing (--eval-iters 0); --core-eval-iters N measures it"
                )
            return None
        data = dataclasses.replace(
            core.data,
            data_path=flags.core_data_path or core.data.data_path,
            tokenizer_model=config.data.tokenizer_model or core.data.tokenizer_model,
        )
        core = dataclasses.replace(core, data=data)
        core, tokenizer, _ = with_run_tokenizer(core)
        view = source_kind(core.data).open(core, tokenizer).validation("valid")
        self._where = f"the core's validation text ({' '.join(core.data.data_path) or 'mock data'})"
        return FirstSamples(view, most * (training.eval_global_batch_size or size))

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self._text is not None and trainer.finished and trainer.interrupted:
            print_rank_0(
                f"{self._where} is not measured, as the run was asked to end ({trainer.stop_reason}); the same line "
                "goes on, and measures it at its end"
            )
        elif self.measure_at_end(trainer):
            found = {"_before": self.before, "_reset": self.reset, "": self.trained}
            known = {f"core_perplexity{name}": value for name, value in found.items() if value is not None}
            metrics.extra.update(known)

    def measure_at_end(self, trainer: Trainer) -> bool:
        """Measures where the run ends and it is not measured yet; says whether. Collective."""
        due = trainer.finished and not trainer.interrupted and self.measured != trainer.iteration
        if due and self._text is not None:
            self._measure_after(trainer)
        return due and self._text is not None

    def _measure_after(self, trainer: Trainer) -> None:
        self.trained, self.reset, self.measured = self._measure(trainer), None, trainer.iteration
        if trainer.config.model.peft is None:
            self.reset = self.trained
        elif _resets(trainer.config):
            with without_adapters(trainer.model):
                self.reset = self._measure(trainer)
        print_rank_0(self._said(trainer))

    def _measure(self, trainer: Trainer) -> float:
        """Perplexity; nan where no label counts. Collective."""
        assert self._text is not None
        sums = trainer.predictions(self._text).values
        return math.exp(sums["loss"] / sums["labels"]) if sums["labels"] else math.nan

    def _said(self, trainer: Trainer) -> str:
        when = "stage B" if trainer.complete else f"{trainer.iteration} steps of stage B"
        text = f"{self._where}: perplexity {self.trained:.5g} after {when}, with adapters"
        if self.reset is None:
            return f"{text}; what it is without them is not known, for they do not stand beside the weights"
        text += f"; {self.reset:.5g} with adapters reset"
        if self.before is None:
            return f"{text}; before stage B it was not measured"
        grown = self.reset / self.before - 1
        verdict = "within" if grown <= LIMIT else "NOT within"
        return f"{text}, {grown:+.2%} beside the {self.before:.5g} before stage B, {verdict} {LIMIT:.0%}"

    def state(self) -> dict[str, Any]:
        return {"before": self.before, "reset": self.reset, "trained": self.trained, "measured": self.measured}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.before, self.reset, self.trained = state["before"], state["reset"], state["trained"]
        self.measured = state.get("measured", 0)  # of a run that was begun before it was kept


class _AfterJudging(Callback):
    """Measures where the step's evaluation ended the run (``--early-stopping-patience``): its record is written, and
    the checkpoint is not."""

    place = Place.JUDGE

    def __init__(self, text: CoreText) -> None:
        self._text = text

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self._text.measure_at_end(trainer)


def _core(config: Config) -> tuple[str, Config, int]:
    """Where the core is that stage B began with, its run's configuration, and its global batch's samples. A run of
    stage B that goes on, or that begins with another one, goes back to it.

    Raises:
        UserError: nothing says what it was trained on.
    """
    begin, seen = config.checkpoint.pretrained_checkpoint, set[str | None]()
    while begin not in seen:
        seen.add(begin)
        found = None if begin is None else newest_meta(Path(begin))
        if begin is None or found is None or not isinstance(found[1].get("config"), Mapping):
            break
        core = config_from_dict(found[1]["config"])
        if core.stages.stage != "b":
            return begin, core, int(found[1].get("global_batch_size", core.training.full_batch_size or 1))
        begin = core.checkpoint.pretrained_checkpoint
    raise UserError(f"{begin} does not say what stage A was trained on")


def _resets(config: Config) -> bool:
    """Whether the model without adapters is at hand."""
    method = config.model.peft_method
    return method is None or method.low_rank or config.model.peft == "plastic"

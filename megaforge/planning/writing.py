"""What ``--objective rlvr`` takes beside its steps: answers are written, from recurrent states and caches, and what was
written is scored by the policy and by its reference, in passes of the trained model without gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from megaforge.config.config import Config
from megaforge.config.rl_partners import has_reference, keeps_first_weights
from megaforge.inference.generation import ROOM
from megaforge.models.flops import matmul_elements
from megaforge.planning.answers import Answers, answers_of
from megaforge.planning.communication import bandwidth
from megaforge.planning.continuing import Continuing, Texts, continuing
from megaforge.planning.gpus import Efficiency, Gpu
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.rounds import Rounds
from megaforge.planning.stages import ModelParts, StagePart, stage_parameters
from megaforge.planning.time import stage_times

_NUMBERS = 55  # bytes of a token of what is learnt from: Batch's own tensors, and what megaforge.reasoning.rlvr adds
_SCORES = 3  # copies of the newest scores: of the step before, and those that are drawn from


@dataclass(frozen=True)
class Writing(Rounds):
    """Rounds of answers."""

    doing, without = "writing", "no reference"
    answers: Answers
    epochs: int
    has_reference: bool
    keeps_weights: bool = False

    def rows(self, samples: int, length: int) -> int:
        return self.answers.rows(samples, length)

    def _side_by_side(self, layout: PlannedLayout) -> int:
        """Texts that a rank writes at once, at most."""
        return max(self.answers.batches(layout.global_batch_size // layout.dp))

    def texts(self, layout: PlannedLayout) -> Texts:
        """What is read at once, and remembered."""
        answers = self.answers
        together, pieces = answers.pieces
        rows = min(together, answers.prompts(self._side_by_side(layout), answers.turns - 1))
        places = min(answers.longest, answers.prompt + ROOM)
        return Texts(rows, ceil(answers.prompt / pieces), places, answers.longest)

    def _blocks(self, parts: ModelParts, layout: PlannedLayout, stage: StagePart) -> list[tuple[Continuing, int]]:
        texts = self.texts(layout)
        return [(continuing(parts, layout, index, texts), count) for index, count in parts.alike(stage.blocks).items()]

    def state_bytes(self, parts: ModelParts, layout: PlannedLayout, own: Sequence[StagePart]) -> float:
        """What a rank with the stages ``own`` remembers of the texts that it writes side by side."""
        each = sum(count * cost.state for stage in own for cost, count in self._blocks(parts, layout, stage))
        return self._side_by_side(layout) * each

    def device_bytes(self, parts: ModelParts, layout: PlannedLayout, own: Sequence[StagePart]) -> float:
        """Where a text ends, the memory of the others is copied: it is there twice for a while."""
        reading = max(cost.reading for stage in own for cost, _ in self._blocks(parts, layout, stage))
        scores = 0.0
        if own[-1].last:
            scores = _SCORES * self._side_by_side(layout) * parts.cfg.padded_vocab_size() * layout.dtype.itemsize
        return 2 * self.state_bytes(parts, layout, own) + max(reading, scores)

    def host_bytes(self, parts: ModelParts, layout: PlannedLayout) -> dict[str, float]:
        tokens = layout.micro_batches * layout.rows * layout.sequence_length
        return {"what is learnt from": float(_NUMBERS * tokens)}

    def seconds(
        self, parts: ModelParts, layout: PlannedLayout, stages: Sequence[StagePart], gpu: Gpu, efficiency: Efficiency
    ) -> tuple[float, float]:
        """Every text ends with its first token, or none before it must and all are written again as often as they may
        be. A batch of texts goes through the stages one after the other."""
        answers, least, most = self.answers, 0.0, 0.0
        read = self._reading_seconds(parts, layout, stages, gpu, efficiency)
        rows, pieces = self.texts(layout).rows, answers.pieces[1]
        for texts in answers.batches(layout.global_batch_size // layout.dp):
            step = sum(self._step_seconds(parts, layout, stage, texts, gpu, efficiency) for stage in stages)
            for turn in range(answers.turns):
                least += read * pieces * ceil(texts / answers.group / rows)
                most += read * pieces * ceil(answers.prompts(texts, turn) / rows) + step * answers.steps(turn)
        return least, answers.tries * most

    def _reading_seconds(
        self, parts: ModelParts, layout: PlannedLayout, stages: Sequence[StagePart], gpu: Gpu, efficiency: Efficiency
    ) -> float:
        """Of as many prompts as are read together, a piece of each."""
        texts = self.texts(layout)
        read = dataclasses.replace(
            layout.unsplit,
            rounds=None,
            micro_batch_size=texts.rows,
            global_batch_size=texts.rows * layout.dp,
            sequence_length=texts.piece,
            sequence_parallel=False,
            recompute="none",
            offload=False,
            compress=False,
            sequence_checkpoint=None,
        )
        return sum(time.forward for time in stage_times(parts, read, stages, gpu, efficiency))

    def _step_seconds(
        self,
        parts: ModelParts,
        layout: PlannedLayout,
        stage: StagePart,
        texts: int,
        gpu: Gpu,
        efficiency: Efficiency,
    ) -> float:
        """Of one token of so many texts in a stage: weights that any of them meets and what is remembered of all are
        read, or products take longer; and what is sent. Kernels' launches do not count."""
        ctx = layout.context()
        read = products = sent = 0.0
        for item, count in stage_parameters(parts, [StagePart(stage.blocks, False, stage.last)]):
            spec, size = item.spec, count * prod(item.spec.local_shape(ctx)) * item.element_size
            sharers = layout.ep if spec.expert_dim is not None else 1  # whose texts meet the same experts
            read += size * min(1.0, spec.active_share * texts * sharers)
            shards = 1 if spec.shard_dim is None else layout.tp
            products += 2 * texts * count * matmul_elements([spec], parts.cfg) / shards
        for cost, count in self._blocks(parts, layout, stage):
            read += count * texts * cost.state
            for axis, way in cost.step.items():
                sent += count * way * texts / self.texts(layout).rows / bandwidth(layout, axis, gpu, efficiency)
        if not stage.last:
            crossing = texts * parts.cfg.hidden_size * layout.dtype.itemsize
            sent += crossing / bandwidth(layout, "pp", gpu, efficiency)
        moved = read / (gpu.memory_bandwidth * efficiency.memory)
        return max(moved, products / (gpu.matmul * efficiency.matmul)) + sent

    def described(self, layout: PlannedLayout) -> str:
        answers = self.answers
        turns = f" in {answers.turns} turns" if answers.turns > 1 else ""
        return (
            f"answers{turns}: at most {answers.longest} tokens of prompt and answer (a word of a task is one), "
            f"{self._side_by_side(layout)} side by side on a rank; a micro-batch of {layout.micro_batch_size} is "
            f"{layout.rows} rows of {layout.sequence_length} at most"
        )

    def between(self) -> str:
        answers = self.answers
        written = sum(answers.steps(turn) + 1 for turn in range(answers.turns))
        again = f", {answers.tries} times" if answers.tries > 1 else ""
        return f"{answers.turns} to {written} tokens of each{again}"


def writing_of(config: Config) -> Writing:
    """The rounds of ``--objective rlvr``.

    Raises:
        UserError: the task has no example of this size.
    """
    return Writing(answers_of(config), config.rl.rl_epochs, has_reference(config), keeps_first_weights(config))

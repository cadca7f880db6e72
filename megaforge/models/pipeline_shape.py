"""Whether and how a model is cut into the stages that the flags ask for. Needs no torch: it is checked first."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.check_layout import Layout
from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import blocks_of, pipeline_cuts
from megaforge.config.run_config import ParallelConfig
from megaforge.errors import UserError
from megaforge.parallel.pipeline.actions import Schedule
from megaforge.parallel.pipeline.partition import partition_layers
from megaforge.parallel.pipeline.schedules import ScheduleRule, build_schedule, check_schedule
from megaforge.registry import SCHEDULES


@dataclass(frozen=True)
class PipelinePlan:
    """How the model is cut and run.

    Attributes:
        name: the schedule, as in ``--pipeline-schedule``.
        pp, vpp: pipeline ranks, and stages on each.
        layers: the blocks of every stage.
        schedule: for the micro-batches of a global batch.
    """

    name: str
    pp: int
    vpp: int
    layers: tuple[range, ...]
    schedule: Schedule

    @property
    def num_stages(self) -> int:
        return self.pp * self.vpp

    def with_micro_batches(self, count: int) -> Schedule:
        """The schedule for another number of micro-batches.

        Raises:
            UserError: it is not defined for that number.
        """
        if count == self.schedule.num_microbatches:
            return self.schedule
        return build_schedule(self.name, pp=self.pp, vpp=self.vpp, microbatches=count)

    def at_least(self, count: int) -> int:
        """The least number of micro-batches, ``count`` or more, that the schedule is defined for."""
        rule: ScheduleRule = SCHEDULES.get(self.name)
        return -(-count // self.pp) * self.pp if rule.whole_rounds else count

    def describe(self) -> str:
        """For the log: ``pp 2 (interleaved, vpp 2)``."""
        return f"pp {self.pp} ({self.name}" + (f", vpp {self.vpp})" if self.vpp > 1 else ")")


def check_pipeline(cfg: ModelConfig, parallel: ParallelConfig, layout: Layout, evaluated: int | None = None) -> None:
    """Checks blocks, stages and schedule against each other, at every batch size of the run.

    Args:
        evaluated: sequences of a batch of evaluations, where it has another size.

    Raises:
        UserError: as :func:`megaforge.models.stages.plan_pipeline` would.
    """
    name, vpp = pipeline_shape(cfg, parallel)
    pp = parallel.pipeline_model_parallel_size
    sizes = [*layout.batches.sizes, *([] if evaluated is None else [evaluated])]
    for size in sizes:
        micro_batches = size * layout.micro_batches // layout.batches.size
        try:
            check_schedule(name, pp=pp, vpp=vpp, microbatches=micro_batches)
        except UserError as error:
            if size == layout.batches.size:
                raise
            if size == evaluated:
                raise UserError(f"--eval-global-batch-size {size}: {error}") from error
            ramp = " ".join(map(str, layout.batches.rampup or (f"{a}:{b}" for a, b in layout.batches.steps)))
            raise UserError(f"{layout.batches.flag} {ramp}, at {size} sequences a batch: {error}") from error
    check_stages(cfg, pp * vpp)


def pipeline_shape(cfg: ModelConfig, parallel: ParallelConfig) -> tuple[str, int]:
    """(schedule, stages on each pipeline rank) that the flags ask for.

    Raises:
        UserError: ``--num-layers-per-virtual-pipeline-stage`` does not divide the blocks.
    """
    vpp = _stages_per_rank(parallel, len(blocks_of(cfg)))
    name = parallel.pipeline_schedule or ("1f1b" if vpp == 1 else "interleaved")
    return name, vpp


def _stages_per_rank(parallel: ParallelConfig, num_layers: int) -> int:
    pp, each = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    if each is None:
        rule = SCHEDULES.get(parallel.pipeline_schedule or "1f1b")
        return parallel.virtual_pipeline_model_parallel_size or int(rule.least_chunks)
    if num_layers % (pp * each):
        sizes = [str(size) for size in range(1, num_layers + 1) if num_layers % (pp * size) == 0]
        valid = f"valid: {', '.join(sizes)}" if sizes else f"use --vpp, or a --pp that divides {num_layers}"
        raise UserError(
            f"--num-layers-per-virtual-pipeline-stage {each}: the model's {num_layers} blocks are not divisible by "
            f"--pp {pp} times it; {valid}"
        )
    return num_layers // (pp * each)


def check_stages(cfg: ModelConfig, num_stages: int) -> None:
    """Checks the number of stages against the blocks and the cuts of the pattern.

    Raises:
        UserError: more stages than blocks, or cuts that make another number of stages or an empty one.
    """
    count = len(blocks_of(cfg))
    if num_stages > count:
        raise UserError(
            f"--pp times --vpp is {num_stages} stages, but the model has only {count} blocks; "
            f"use at most {count} stages"
        )
    cuts = pipeline_cuts(cfg)
    if num_stages > 1 and cuts:
        _ = partition_layers([1.0] * count, num_stages, cuts)

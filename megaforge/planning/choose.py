"""The layout chosen for a run: the fastest that the ranks at hand have room for, beside what the user fixed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

from megaforge.config.check_layout import has_experts
from megaforge.config.config import Config
from megaforge.config.layout_settings import CHOSEN
from megaforge.errors import UserError
from megaforge.planning.gpus import ROOM, Gpu
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.search import Found, divisors, search

_CP, _ZERO = "parallel.context_parallel_size", "parallel.zero_stage"
LONGEST_CONTEXT = 8  # ranks that share a sequence, at most


@dataclass(frozen=True)
class Choice:
    """A chosen layout.

    Attributes:
        config: the run's, with the layout's settings.
        found: the layout, its fullest rank and its step.
        why: one line for people.
    """

    config: Config
    found: Found
    why: str

    @property
    def flags(self) -> str:
        """The layout as one would type it."""
        return self.found.layout.describe()


def choose_layout(
    config: Config,
    world_size: int,
    gpu: Gpu,
    kept: Collection[str] = (),
    share: float = ROOM,
    fits: Callable[[Config], bool] = lambda config: True,
) -> Choice:
    """The fastest layout of ``world_size`` ranks whose fullest rank needs at most ``share`` of the memory of ``gpu``.
    The same arguments give the same layout. The global batch stays the configuration's: what is learned does not
    depend on the choice.

    Where nothing fits, sequences are shared out (``--cp``), then gradients (``--zero 2``), unless these are ``kept``.

    Args:
        config: with its vocabulary size and its global batch size.
        kept: keys of settings, of :data:`CHOSEN`, whose values in ``config`` hold.
        fits: whether a layout's settings go with the run's others
            (:func:`megaforge.config.partners.check_partners`).

    Raises:
        UserError: there is no global batch size, no layout has room, or what is kept is impossible there.
    """
    if config.training.full_batch_size is None:
        raise UserError(
            "--layout auto: without --global-batch-size the layout would decide how large a batch is, and so what is "
            f"learned; add --global-batch-size N, such as {world_size}"
        )
    for cp, zero in _attempts(config, world_size, kept):
        parallel = dataclasses.replace(config.parallel, context_parallel_size=cp, zero_stage=zero)
        pinned = {*kept, _CP} | ({_ZERO} if zero == 2 else set())
        tried = dataclasses.replace(config, parallel=parallel)
        goes = partial(_goes, config, fits)
        for found in search(tried, world_size, gpu, share=share, count=1, kept=pinned, allowed=goes):
            return Choice(with_layout(config, found.layout), found, _why(found, gpu, kept, share))
    raise UserError(_nothing_fits(config, world_size, gpu, kept, share))


def _attempts(config: Config, world_size: int, kept: Collection[str]) -> Iterator[tuple[int, int]]:
    """(cp, ZeRO's stage) to search with, one after the other."""
    parallel = config.parallel
    sizes = [parallel.context_parallel_size] if _CP in kept else divisors(world_size, LONGEST_CONTEXT)
    stages = [parallel.zero_stage if _ZERO in kept else 1]
    if _ZERO not in kept and world_size > 1 and parallel.grad_compression == "none":
        stages.append(2)
    for zero, cp in product(stages, sizes):
        yield cp, zero


def _goes(config: Config, fits: Callable[[Config], bool], layout: PlannedLayout) -> bool:
    return fits(with_layout(config, layout))


def with_layout(config: Config, layout: PlannedLayout) -> Config:
    """``config`` at ``layout``."""
    given, piped = config.parallel, layout.pp > 1
    by_blocks = given.num_layers_per_virtual_pipeline_stage is not None
    parallel = dataclasses.replace(
        given,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sequence_parallel,
        context_parallel_size=layout.cp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if piped and not by_blocks else None,
        pipeline_schedule=layout.schedule_name if piped else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp if has_experts(config.model) else None,
        zero_stage=layout.zero,
        recompute=layout.recompute,
    )
    training = dataclasses.replace(config.training, micro_batch_size=layout.micro_batch_size)
    return dataclasses.replace(config, parallel=parallel, training=training)


def _why(found: Found, gpu: Gpu, kept: Collection[str], share: float) -> str:
    layout, time, memory = found.layout, found.time, found.memory.total
    beside = f", with {_flags(kept)} as given," if kept else ","
    return (
        f"--layout auto: {layout.describe()} (dp {layout.dp}): of the layouts of {layout.world_size} x {gpu.name} "
        f"within {share:.0%} of {gpu.memory / 1e9:.3g} GB{beside} it has the shortest predicted step, "
        f"{time.total:.3g} s; its fullest rank needs {memory / 1e9:.3g} GB ({memory / gpu.memory:.0%})"
    )


def _flags(kept: Collection[str]) -> str:
    return ", ".join(f"--{key.partition('.')[2].replace('_', '-')}" for key in CHOSEN if key in kept)


def _nothing_fits(config: Config, world_size: int, gpu: Gpu, kept: Collection[str], share: float) -> str:
    beside = f" beside {_flags(kept)}" if kept else ""
    roomy = search(config, world_size, dataclasses.replace(gpu, memory=1e30), share=1.0, count=1, kept=kept)
    head = f"--layout auto: {config.name} on {world_size} x {gpu.name}: no layout{beside} "
    if not roomy:
        return (
            f"{head}is valid for a global batch of {config.training.full_batch_size}; give another number of ranks"
            + (", or leave these flags out" if kept else ", or another --global-batch-size")
        )
    needed = roomy[0].memory.total / 1e9
    return (
        f"{head}stays within {share:.0%} of {gpu.memory / 1e9:.3g} GB (the fastest needs {needed:.3g} GB a rank); "
        "start more ranks, or add --bf16, --cpu-offload-activations (GPUs) or a shorter --seq-length"
    )

"""``--dry-run``: the job's own code for any number of ranks on one machine, on the meta device over a fake process
group: nothing is allocated, computed or sent."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from megaforge.config.check_layout import check_layout, with_tokenizer_vocab
from megaforge.config.config import Config
from megaforge.data.loader import GlobalBatchLoader
from megaforge.data.tokenizer import load_tokenizer
from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel
from megaforge.optim import build_optimizer
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.data_parallel import GradientReducer
from megaforge.parallel.distributed import discover_launch
from megaforge.parallel.param_spec import Box, named_specs
from megaforge.parallel.zero import shard_parameters
from megaforge.planning.layout import PlannedLayout
from megaforge.planning.memory import StateBytes, peak_activations, stage_activations, state_bytes
from megaforge.planning.plan_command import planned_layout
from megaforge.planning.report import gigabytes, table
from megaforge.planning.stage_run import run_stage
from megaforge.planning.stages import ModelParts, StagePart, cut_stages, model_parts, stage_parameters
from megaforge.training.state import compute_dtype


@dataclass(frozen=True)
class DryRank:
    """What one rank of the job holds and needs.

    Attributes:
        rank: in the world.
        stands_for: pipeline ranks with the same shapes, this one's first.
        state: bytes of what was registered with the model, the gradient reducer and the optimizer.
        planned: what the planner says.
        activations: most bytes alive between forward and backward passes, as measured.
        planned_activations: what the planner says.
        temporaries: most bytes that a backward pass needs besides.
    """

    rank: int
    stands_for: tuple[int, ...]
    stages: tuple[StagePart, ...]
    state: StateBytes
    planned: StateBytes
    activations: float
    planned_activations: float
    temporaries: float


def dry_run(config: Config) -> None:
    """Checks the job that ``config`` describes and prints what its ranks hold.

    Raises:
        UserError: as the job itself would.
    """
    started = time.perf_counter()
    if config.data.tokenizer_model is not None:
        tokenizer = load_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model)
        config = with_tokenizer_vocab(config, tokenizer.vocab_size)
    world_size = config.dry_run.dry_run_world_size or discover_launch().world_size
    check_layout(config, world_size)
    layout = planned_layout(config, world_size, dtype=compute_dtype(config.training))
    ranks = try_ranks(config, layout)
    print(report(config, layout, ranks))
    print(f"dry run of {world_size} ranks: {time.perf_counter() - started:.1f} s")


def try_ranks(config: Config, layout: PlannedLayout) -> list[DryRank]:
    """Builds the ranks that ``--dry-run-ranks`` names and compares them with the plan.

    Raises:
        UserError: there is no such rank.
        RuntimeError: parameters or samples are not shared out exactly once, or the plan is wrong.
    """
    parts = model_parts(config.model, layout.dtype)
    stages = cut_stages(parts, layout)
    check_sharding(parts, layout)
    check_samples(layout)
    chosen = representatives(parts, layout, stages, config.dry_run.dry_run_ranks)
    ranks = [_try_rank(config, parts, layout, stages, rank, alike) for rank, alike in chosen.items()]
    for rank in ranks:
        if not _agree(rank.state, rank.planned, layout):
            raise RuntimeError(f"rank {rank.rank} registered {rank.state}, the planner says {rank.planned}")
    return ranks


def _agree(real: StateBytes, planned: StateBytes, layout: PlannedLayout) -> bool:
    """Exactly; where ZeRO cuts buckets without regard to the parameters in them, to a percent."""
    if not layout.zero:
        return real == planned
    return real.elements == planned.elements and all(
        math.isclose(getattr(real, name), getattr(planned, name), rel_tol=0.01)
        for name in ("parameters", "gradients", "optimizer")
    )


def representatives(
    parts: ModelParts, layout: PlannedLayout, stages: Sequence[StagePart], wanted: str
) -> dict[int, tuple[int, ...]]:
    """World ranks to build -> the pipeline ranks each stands for.

    Shards are equal, so all ranks of a pipeline rank have the same shapes. So have pipeline ranks whose stages have
    equally many blocks of every kind and the same ends; the first of them has the most micro-batches in flight under
    1F1B, and its activations are reported.
    """
    schedule = layout.schedule
    own = {rank: [stages[stage] for stage in schedule.stages_of(rank)] for rank in range(layout.pp)}
    if wanted.isdigit():
        if int(wanted) >= layout.world_size:
            raise UserError(f"--dry-run-ranks {wanted}: the job has ranks 0 to {layout.world_size - 1}")
        return {int(wanted): (int(wanted) // layout.stage_ranks,)}
    if wanted == "stage":
        return {rank * layout.stage_ranks: (rank,) for rank in range(layout.pp)}
    alike: dict[object, list[int]] = {}
    for rank, held in own.items():
        key = tuple((s.first, s.last, tuple(sorted(parts.alike(s.blocks).items()))) for s in held)
        alike.setdefault(key, []).append(rank)
    return {ranks[0] * layout.stage_ranks: tuple(ranks) for ranks in alike.values()}


def check_sharding(parts: ModelParts, layout: PlannedLayout) -> None:
    """Checks that the ranks of a pipeline stage hold every element of every parameter, each counted once.

    Raises:
        RuntimeError: naming the parameter.
    """
    contexts = [layout.context(rank) for rank in range(layout.stage_ranks)]
    everything = [StagePart(range(len(parts.blocks)), True, True)]
    for held, _ in stage_parameters(parts, everything):
        boxes: set[Box] = set()
        count = 0
        for ctx in contexts:
            if held.spec.is_first_copy(ctx):
                pieces = held.spec.pieces(ctx)
                boxes.update(piece.global_box for piece in pieces)
                count += sum(math.prod(piece.shape) for piece in pieces)
        distinct = sum(math.prod(stop - start for start, stop in box) for box in boxes)
        if not count == distinct == held.spec.numel:
            raise RuntimeError(f"{held.spec.name}: its shards hold {count} elements, {distinct} of them distinct")


class _Samples:
    """Samples of one token that note which of them were read."""

    stage_starts: tuple[int, ...] = ()
    eod_mask_loss = False

    def __init__(self, count: int) -> None:
        self.count = count
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def sequence_length(self, sample: int) -> int:
        return 1

    def fill(self, sample: int, tokens: object, marks: object) -> int:
        self.read.append(sample)
        return 1


def check_samples(layout: PlannedLayout) -> None:
    """Checks that the data-parallel ranks read every sample of a global batch once, in equally many micro-batches.

    Raises:
        RuntimeError: they do not.
    """
    samples = _Samples(layout.global_batch_size)
    for rank in range(layout.dp):
        sizes = (layout.global_batch_size, layout.micro_batch_size, rank, layout.dp)
        for micro_batches in GlobalBatchLoader(samples, *sizes):  # type: ignore[arg-type]
            if len(micro_batches) != layout.micro_batches:
                raise RuntimeError(f"dp rank {rank} reads {len(micro_batches)} micro-batches")
    if sorted(samples.read) != list(range(layout.global_batch_size)):
        raise RuntimeError("the data-parallel ranks do not read every sample of a global batch exactly once")


@contextmanager
def _fake_ranks(rank: int, world_size: int) -> Iterator[None]:
    """A process group in which this process is ``rank`` and the others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _try_rank(
    config: Config,
    parts: ModelParts,
    layout: PlannedLayout,
    stages: Sequence[StagePart],
    rank: int,
    alike: tuple[int, ...],
) -> DryRank:
    sizes = {"tp": layout.tp, "cp": layout.cp, "pp": layout.pp, "ep": layout.ep, "etp": layout.etp}
    with _fake_ranks(rank, layout.world_size):
        ctx = ParallelContext.create(device="meta", **sizes)
        model = HybridModel(config.model, ctx, sequence_parallel=layout.sequence_parallel, dtype=layout.dtype)
        own = {number: stages[number] for number in layout.schedule.stages_of(ctx.pp.rank)}
        state = _registered(config, ctx, _modules(model, list(own.values())))
        measured = {number: run_stage(model, stage, layout) for number, stage in own.items()}
    kept = [float(measured[n].kept) if n in measured else 0.0 for n in range(len(stages))]
    planned_kept = [stage_activations(parts, layout, own[n]) if n in own else 0.0 for n in range(len(stages))]
    return DryRank(
        rank,
        alike,
        tuple(own.values()),
        state,
        state_bytes(stage_parameters(parts, list(own.values())), ctx, layout),
        peak_activations(layout.schedule, ctx.pp.rank, kept)[0],
        peak_activations(layout.schedule, ctx.pp.rank, planned_kept)[0],
        max(float(one.peak - one.kept) for one in measured.values()),
    )


def _modules(model: HybridModel, stages: Sequence[StagePart]) -> nn.ModuleList:
    """The modules of these stages."""
    modules: list[nn.Module] = []
    for stage in stages:
        modules += [model.embedding, model.embedding_norm] if stage.first else []
        modules += [model.layers[index] for index in stage.blocks]
        modules += [model.final_norm, model.head] if stage.last else []
    return nn.ModuleList(modules)


def _registered(config: Config, ctx: ParallelContext, modules: nn.Module) -> StateBytes:
    """Bytes that the model, the gradient reducer and the optimizer hold after registering the parameters."""
    shards = shard_parameters(config.parallel, modules, ctx)
    freed = config.parallel.zero_stage == 2
    bucket_size = config.parallel.ddp_bucket_size
    reducer = GradientReducer(modules, ctx, bucket_size=bucket_size, overlap=False, shards=shards, free_buffers=freed)
    optimizer = build_optimizer(config.optimizer, modules, ctx, shards)
    parameters = [parameter for _, parameter in named_specs(modules)]
    masters = [tensor for _, _, tensor in optimizer.weight_entries()]
    # A wide parameter is its own master: the same storage, counted with the parameters.
    storages = {parameter.untyped_storage()._cdata for parameter in parameters}
    extra = [tensor for tensor in masters if tensor.untyped_storage()._cdata not in storages]
    extra += [tensor for _, _, tensor in optimizer.moment_entries()]
    return StateBytes(
        parameters=sum(p.numel() * p.element_size() for p in parameters),
        gradients=sum(
            bucket.main_dtype.itemsize * (bucket.slice_size if freed else sum(p.numel() for p in bucket.parameters))
            for bucket in reducer.buckets
        ),
        optimizer=sum(t.numel() * t.element_size() for t in extra),
        elements=sum(p.numel() for p in parameters),
    )


def report(config: Config, layout: PlannedLayout, ranks: Sequence[DryRank]) -> str:
    """The table that a dry run prints."""
    head = ("rank", "pp ranks alike", "blocks", "elements", "parameters", "gradients", "optimizer")
    rows: list[tuple[str, ...]] = [(*head, "activations", "planned", "error", "temporaries", "GB")]
    for one in ranks:
        blocks = " ".join(f"{stage.blocks.start}-{stage.blocks.stop - 1}" for stage in one.stages)
        state = one.state
        sizes = (state.parameters, state.gradients, state.optimizer, one.activations, one.planned_activations)
        total = sum(sizes[:4]) + one.temporaries
        error = f"{one.planned_activations / one.activations - 1:+.1%}" if one.activations else "-"
        row = (f"{one.rank}", ",".join(map(str, one.stands_for)), blocks, f"{state.elements:,}")
        rows.append(row + tuple(map(gigabytes, sizes)) + (error, gigabytes(one.temporaries), gigabytes(total)))
    return "\n".join(
        [
            f"{config.name} on {layout.world_size} ranks: {layout.describe()} (dp {layout.dp})",
            f"checked: layout; every parameter's shards over the {layout.stage_ranks} ranks of a stage; every sample "
            f"of a global batch of {layout.global_batch_size} on one of {layout.dp} dp ranks; bytes equal the plan's",
            "",
            table(rows),
        ]
    )

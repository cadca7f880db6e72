"""``--dry-run``: the job's own code for any number of ranks on one machine, on the meta device over a fake process
group: nothing is allocated, computed or sent."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaforge.config.batch_schedule import BatchSchedule
from megaforge.config.config import Config
from megaforge.config.teacher import teacher_model
from megaforge.data.data_source import SampleView
from megaforge.data.loader import GlobalBatchLoader
from megaforge.data.run_tokenizer import with_run_tokenizer
from megaforge.errors import UserError
from megaforge.models.parameter_count import count_parameters, total
from megaforge.models.pipeline_shape import PipelinePlan
from megaforge.models.prepared_run import check_run
from megaforge.models.stages import make_stage_tensors
from megaforge.optim import Optimizer, bucket_policy
from megaforge.optim.gradient_filter import make_filter
from megaforge.parallel.context import AXES, ParallelContext
from megaforge.parallel.distributed import discover_launch
from megaforge.parallel.param_spec import Box, main_grad_of, named_specs
from megaforge.parallel.zero import shard_parameters
from megaforge.planning.costs import stage_cost
from megaforge.planning.gpus import GPUS, ROOM, verdict
from megaforge.planning.layout import LIBRARIES, PlannedLayout
from megaforge.planning.memory import peak_activations
from megaforge.planning.plan_command import planned_layout
from megaforge.planning.report import gigabytes
from megaforge.planning.stage_run import run_stage
from megaforge.planning.stages import ModelParts, StagePart, cut_stages, model_parts, stage_parameters
from megaforge.planning.state_bytes import StateBytes, fullest_rank, state_bytes
from megaforge.planning.table import table
from megaforge.planning.teacher import teacher_bytes, teacher_pass
from megaforge.training.distillation import build_teacher
from megaforge.training.forward_backward import make_reducer
from megaforge.training.other_weights import OtherWeights
from megaforge.training.setup import build_model_chunks, make_context


@dataclass(frozen=True)
class DryRank:
    """What one rank of the job holds and needs, or the fullest of several with the same shapes.

    Attributes:
        rank: in the world, the one that was built.
        stands_for: pipeline ranks with the same shapes, this one's first.
        stages: of the rank that was built.
        state: bytes of what was registered with the model, the gradient reducer and the optimizer.
        planned: what the planner says.
        activations: most bytes alive between forward and backward passes, as measured.
        planned_activations: what the planner says.
        temporaries: most bytes that a backward pass needs besides; of a teacher's forward pass, by the plan, where it
            needs more; with what the losses of rounds need, by the plan.
        teacher: bytes of the weights of ``--distill-from``'s model.
        making: bytes that making a round needs by the plan, instead of activations and temporaries.
    """

    rank: int
    stands_for: tuple[int, ...]
    stages: tuple[StagePart, ...]
    state: StateBytes
    planned: StateBytes
    activations: float
    planned_activations: float
    temporaries: float
    teacher: int = 0
    making: float = 0.0

    @property
    def total(self) -> float:
        """Bytes at the worst moment, those of libraries assumed."""
        step = max(self.activations + self.temporaries, self.making)
        return self.state.total + step + self.teacher + LIBRARIES


def dry_run(config: Config, choose: Callable[[Config, int], tuple[Config, list[str]]] | None = None) -> None:
    """Checks the job that ``config`` describes and prints what its ranks hold.

    Args:
        choose: gives the configuration its layout on so many ranks, and what to note of it.

    Raises:
        UserError: as the job itself would.
    """
    started = time.perf_counter()
    config, _, notes = with_run_tokenizer(config)
    started_ranks = discover_launch().world_size
    world_size = config.dry_run.dry_run_world_size or (started_ranks if started_ranks > 1 else fewest_ranks(config))
    if choose is not None:
        config, more = choose(config, world_size)
        notes = [*notes, *more]
    layout, ranks = try_ranks(config, world_size)
    _, untold = teacher_model(config)
    for note in check_run(config, world_size, notes=[*notes, *([untold] if untold else [])]).notes:
        print(note)
    print(report(config, layout, ranks))
    print(verdicts(ranks))
    print(f"dry run of {world_size} ranks: {time.perf_counter() - started:.1f} s")


def fewest_ranks(config: Config) -> int:
    """The smallest number of ranks that the layout of ``config`` fills, with data parallelism only as far as the
    experts need it."""
    parallel = config.parallel
    replica = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    experts = parallel.expert_model_parallel_size * (parallel.expert_tensor_parallel_size or 1)
    return math.lcm(replica, experts) * parallel.pipeline_model_parallel_size


def verdicts(ranks: Sequence[DryRank]) -> str:
    """Whether the fullest rank has room on each accelerator that the planner knows."""
    fullest = max(ranks, key=lambda rank: rank.total)
    lines = [f"the fullest rank, {fullest.rank}, needs {gigabytes(fullest.total)} GB:"]
    for gpu in GPUS.values():
        share = fullest.total / gpu.memory
        lines.append(f"  {verdict(share)} on {gpu.name}: {share:.0%} of {gpu.memory / 1e9:g} GB")
    if fullest.total > ROOM * min(gpu.memory for gpu in GPUS.values()):
        lines.append("to need less: more ranks; --tp, --pp, --ep; --zero 1; --recompute selective, moe or full; --bf16")
    return "\n".join(lines)


def try_ranks(config: Config, world_size: int) -> tuple[PlannedLayout, list[DryRank]]:
    """Checks the whole job, builds the ranks that ``--dry-run-ranks`` names and compares them with the plan.

    Raises:
        UserError: as the job itself would, or there is no such rank.
        RuntimeError: ranks, parameters or samples are not split exactly once, or the plan is wrong.
    """
    plan = check_run(config, world_size).plan
    layout = planned_layout(config, world_size)
    parts = model_parts(config.model, layout.dtype)
    stages = cut_stages(parts, layout)
    check_ranks(layout)
    check_sharding(parts, layout)
    check_samples(layout)
    chosen = representatives(parts, layout, stages, config.dry_run.dry_run_ranks)
    ranks = [_try_rank(config, plan, parts, layout, rank, alike) for rank, alike in chosen.items()]
    for rank in ranks:
        if rank.state != rank.planned:
            raise RuntimeError(f"rank {rank.rank} registered {rank.state}, the planner says {rank.planned}")
    return layout, ranks


def representatives(
    parts: ModelParts, layout: PlannedLayout, stages: Sequence[StagePart], wanted: str
) -> dict[int, tuple[int, ...]]:
    """World ranks to build -> the pipeline ranks each stands for.

    Ranks of a pipeline rank have the same shapes and differ in what of the optimizer they keep; the fullest is taken.
    Pipeline ranks whose stages have equally many blocks of every kind and the same ends differ in how many
    micro-batches are in flight.
    """
    schedule = layout.schedule
    own = {rank: [stages[stage] for stage in schedule.stages_of(rank)] for rank in range(layout.pp)}
    if wanted.isdigit():
        if int(wanted) >= layout.world_size:
            raise UserError(f"--dry-run-ranks {wanted}: the job has ranks 0 to {layout.world_size - 1}")
        return {int(wanted): (int(wanted) // layout.stage_ranks,)}
    if wanted == "stage":
        return {fullest_rank(parts, own[rank], layout, rank): (rank,) for rank in range(layout.pp)}
    alike: dict[object, list[int]] = {}
    for rank, held in own.items():
        key = tuple((s.first, s.last, tuple(sorted(parts.alike(s.blocks).items()))) for s in held)
        alike.setdefault(key, []).append(rank)
    return {fullest_rank(parts, own[ranks[0]], layout, ranks[0]): tuple(ranks) for ranks in alike.values()}


def check_ranks(layout: PlannedLayout) -> None:
    """Checks that every rank of the job has its own place among the dense layers, and among the experts.

    Raises:
        RuntimeError: two ranks share a place.
    """
    contexts = [layout.context(rank) for rank in range(layout.world_size)]
    for names in (("pp", "dp", "cp", "tp"), ("pp", "edp", "ep", "etp"), ("pp", "dp_cp", "tp")):
        places = sorted(tuple(ctx.axis(name).rank for name in names) for ctx in contexts)
        if places != list(product(*(range(contexts[0].axis(name).size) for name in names))):
            raise RuntimeError(f"the {layout.world_size} ranks do not fill {' x '.join(names)} once each")


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


class _Samples(SampleView):
    """Samples of one token that note which of them were read."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def sequence_length(self, k: int) -> int:
        return 1

    def fill(self, k: int, tokens: object, marks: object) -> int:
        self.read.append(k)
        return 1


def check_samples(layout: PlannedLayout) -> None:
    """Checks that the data-parallel ranks read every sample of a global batch once, in equally many micro-batches.

    Raises:
        RuntimeError: they do not.
    """
    samples = _Samples(layout.global_batch_size)
    for rank in range(layout.dp):
        sizes = (BatchSchedule(layout.global_batch_size), layout.micro_batch_size, rank, layout.dp)
        for micro_batches in GlobalBatchLoader(samples, *sizes):
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


def _serve_meta(ctx: ParallelContext) -> None:
    """Lets the fake groups send tensors of the meta device from rank to rank, as rings do."""
    groups = {id(axis.group): axis.group for axis in map(ctx.axis, AXES) if axis.group is not None}
    for group in groups.values():
        fake = group._get_backend(torch.device("cpu"))
        group._register_backend(torch.device("meta"), dist.ProcessGroup.BackendType.CUSTOM, fake)


def _try_rank(
    config: Config, plan: PipelinePlan, parts: ModelParts, layout: PlannedLayout, rank: int, alike: tuple[int, ...]
) -> DryRank:
    stages = cut_stages(parts, layout)
    with _fake_ranks(rank, layout.world_size):
        ctx = make_context(config, "meta")
        _serve_meta(ctx)
        model = build_model_chunks(config, ctx, plan)
        shards = shard_parameters(config.parallel, model.chunks, ctx, bucket_policy(config.optimizer))
        reducer = make_reducer(config.parallel, model, ctx, shards)
        optimizer = Optimizer(config.optimizer, model, ctx, shards)
        kept = make_filter(config.optimizer, optimizer.main.trained)
        beside = [OtherWeights(optimizer.main).tensors for _ in range(layout.weight_copies)]
        state = held_bytes(model, optimizer, [] if kept is None else [kept.kept], *beside)
        taught = _teacher_bytes(config, layout, ctx)
        payload = make_stage_tensors(model, plan, layout.rows, layout.sequence_length, layout.dtype)
        trained = [parameter for _, parameter in named_specs(model) if parameter.requires_grad]
        buffers = [main_grad_of(parameter) for parameter in trained]
        reducer.zero_grad()
        measured = []
        for number, chunk in enumerate(model.chunks):
            reducer.set_last_microbatch(True, number)
            measured.append(run_stage(chunk, layout, payload, known=buffers))
        reducer.finish_grad_sync()
    own, rounds = [stages[stage] for stage in layout.schedule.stages_of(ctx.pp.rank)], layout.rounds
    return DryRank(
        rank,
        alike,
        tuple(own),
        state,
        state_bytes(parts, own, layout, ctx),
        _peak(layout, alike, [(one.kept, max(0, one.between - one.kept)) for one in measured]),
        _peak(layout, alike, [(cost.kept, cost.waiting) for cost in (stage_cost(parts, layout, one) for one in own)]),
        max(teacher_pass(layout), *(float(one.peak - max(one.kept, one.between)) for one in measured))
        + (rounds.step_bytes(parts, layout) if rounds is not None and own[-1].last else 0.0),
        taught,
        0.0 if rounds is None else rounds.device_bytes(parts, layout, own),
    )


def _teacher_bytes(config: Config, layout: PlannedLayout, ctx: ParallelContext) -> int:
    """Of the weights that the teacher registers on this rank.

    Raises:
        RuntimeError: the planner says otherwise.
    """
    if layout.teacher is None:
        return 0
    teacher = build_teacher(config, layout.teacher, ctx)
    size, planned = sum(parameter.nbytes for parameter in teacher.parameters()), teacher_bytes(layout)
    if size != planned:
        raise RuntimeError(f"the teacher has {size} bytes on rank {ctx.world.rank}, the planner says {planned}")
    return size


def _peak(layout: PlannedLayout, pipeline_ranks: Iterable[int], chunks: Sequence[tuple[float, float]]) -> float:
    """Most bytes of activations alive at once on any of these ranks, each of whose chunks keeps some for its backward
    pass and leaves some more between the halves of one."""

    def on(rank: int) -> float:
        kept, again = [0.0] * (layout.pp * layout.vpp), [0.0] * (layout.pp * layout.vpp)
        for stage, sizes in zip(layout.schedule.stages_of(rank), chunks, strict=True):
            kept[stage], again[stage] = sizes
        return peak_activations(layout.schedule, rank, kept, again)[0]

    return max(map(on, pipeline_ranks))


def held_bytes(model: nn.Module, optimizer: Optimizer, *more: Iterable[Tensor]) -> StateBytes:
    """Bytes of memory in which the model, its gradients, the optimizer and ``more`` tensors lie, gaps included; the
    optimizer has its state."""
    named = [parameter for _, parameter in named_specs(model)]
    sums = [main_grad_of(parameter) for parameter in named if parameter.requires_grad]
    # A wide parameter is its own master: the same memory, counted with the parameters.
    seen: set[int] = set()
    parameters, gradients = _bytes(named, seen), _bytes(sums, seen)
    parameters += sum(p.numel() for spec, p in named_specs(model) if spec.quantized)  # their codes
    kept = _bytes((tensor for _, _, tensor in optimizer.entries()), seen)
    kept += sum(_bytes(tensors, seen) for tensors in more)
    host = optimizer.host_bytes
    return StateBytes(parameters, gradients, kept - host, sum(p.numel() for p in named), host)


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Of memory that is not among what was ``seen``, which it then is."""
    size = 0
    for storage in (tensor.untyped_storage() for tensor in tensors):
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            size += storage.nbytes()
    return size


def report(config: Config, layout: PlannedLayout, ranks: Sequence[DryRank]) -> str:
    """The table that a dry run prints."""
    head = ("rank", "pp ranks alike", "blocks", "elements", "parameters", "gradients", "optimizer")
    rows: list[tuple[str, ...]] = [(*head, "activations", "planned", "error", "temporaries", "GB")]
    for one in ranks:
        blocks = " ".join(f"{stage.blocks.start}-{stage.blocks.stop - 1}" for stage in one.stages)
        state = one.state
        sizes = (state.parameters, state.gradients, state.optimizer, one.activations, one.planned_activations)
        error = f"{one.planned_activations / one.activations - 1:+.1%}" if one.activations else "-"
        row = (f"{one.rank}", ",".join(map(str, one.stands_for)), blocks, f"{state.elements:,}")
        rows.append(row + tuple(map(gigabytes, sizes)) + (error, gigabytes(one.temporaries), gigabytes(one.total)))
    return "\n".join(
        [
            f"{config.name} on {layout.world_size} ranks: {layout.describe()} (dp {layout.dp})",
            f"{total(count_parameters(config.model)).stored:,} parameters",
            f"checked: layout; every rank's place; every parameter's shards over the {layout.stage_ranks} ranks of a "
            f"stage; every sample of a global batch of {layout.global_batch_size} on one of {layout.dp} dp ranks; "
            "bytes equal the plan's",
            "",
            table(rows),
            *([f"the teacher's weights, in GB: {gigabytes(ranks[0].teacher)} a rank"] * bool(layout.teacher)),
            *_making(layout, ranks),
            f"GB: at the worst moment, {LIBRARIES / 1e9:g} GB assumed for CUDA, cuBLAS and NCCL",
        ]
    )


def _making(layout: PlannedLayout, ranks: Sequence[DryRank]) -> list[str]:
    if layout.rounds is None:
        return []
    most = max(rank.making for rank in ranks)
    return [f"{layout.rounds.doing} before a step, by the plan: {gigabytes(most)} GB a rank at most"]

"""The layout of a planned run: every axis and what else decides memory and time, resolved from a configuration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import torch

from megaforge.config.config import Config
from megaforge.config.model_config import ModelConfig
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.config.teacher import teacher_model
from megaforge.models.pipeline_shape import pipeline_shape
from megaforge.models.prepared_run import check_run
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import compute_dtype
from megaforge.parallel.pipeline.actions import Schedule
from megaforge.parallel.pipeline.schedules import build_schedule
from megaforge.planning.rounds import Rounds, rounds_of
from megaforge.quant.converter import weight_scheme

LIBRARIES = 2e9  # CUDA context, cuBLAS workspaces, NCCL's channels: assumed, it differs by driver and number of groups
CPU_LIBRARIES = 4e8  # Python and torch: 0.36 GB of a process that trains a tiny model, torch 2.13


@dataclass(frozen=True)
class PlannedLayout:
    """Sizes of all axes, the batch, and what trades memory for time.

    Attributes:
        vpp: pipeline stages on each pipeline rank.
        etp: tensor parallelism of experts.
        zero: 0, 1 (optimizer state sharded) or 2 (gradients too).
        recompute: what the backward pass computes again, as ``--recompute``.
        offload: whether activations are kept in host memory, as ``--cpu-offload-activations``.
        compress: whether they are kept in 8 bits, as ``--compress-activations``.
        sequence_checkpoint: tokens between two kept states of a recurrence, as ``--sequence-checkpoint``.
        dtype: of parameters and activations.
        wkv_backend: which implementation of WKV-7 keeps what it keeps, as ``--wkv-backend``.
        device_type: whose kernels keep what they keep; ``meta``: plain torch.
        optimizer: which update rule keeps how much.
        teacher: the model of ``--distill-from``, which stands beside the trained one; None without, or where its
            checkpoint is not here.
        libraries: bytes assumed for the device's libraries.
        rounds: what the model makes for itself before it learns from it; None: nothing.
        code_bits: bits of a quantized weight that ZeRO gathers as a code (``--zero-quantized-gather``); 0: as it is.
    """

    world_size: int
    tp: int = 1
    cp: int = 1
    cp_comm_type: str = "allgather"
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False
    schedule_name: str = "1f1b"
    zero: int = 0
    recompute: str = "none"
    offload: bool = False
    compress: bool = False
    sequence_checkpoint: int | None = None
    micro_batch_size: int = 1
    global_batch_size: int = 1
    sequence_length: int = 1024
    bucket_size: int = 25_000_000
    overlap: bool = True
    dtype: torch.dtype = torch.bfloat16
    device_type: str = "meta"
    wkv_backend: str = "auto"
    optimizer: OptimizerConfig = OptimizerConfig()
    code_bits: int = 0
    teacher: ModelConfig | None = None
    rounds: Rounds | None = None
    libraries: float = LIBRARIES

    @property
    def stage_ranks(self) -> int:
        """Ranks that hold one pipeline stage: tp x cp x dp."""
        return self.world_size // self.pp

    @property
    def dp(self) -> int:
        """Ranks with different samples."""
        return self.stage_ranks // (self.tp * self.cp)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a global batch on each rank."""
        return self.global_batch_size // (self.micro_batch_size * self.dp)

    @property
    def rows(self) -> int:
        """Sequences of a micro-batch: its samples, or at most those that what was made of them fills."""
        samples = self.micro_batch_size
        return samples if self.rounds is None else self.rounds.rows(samples, self.sequence_length)

    @property
    def weight_copies(self) -> int:
        """Copies of the weights that the run keeps as it does masters: their average, and those that it began with."""
        return bool(self.optimizer.ema_decay) + (self.rounds is not None and self.rounds.keeps_weights)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that a rank sees inside the tensor-parallel region."""
        return self.rows * self.sequence_length // self.cp

    @property
    def wide_size(self) -> int:
        """Bytes of what is kept in fp32 (fp64 for fp64 models)."""
        return max(4, self.dtype.itemsize)

    @property
    def schedule(self) -> Schedule:
        """The pipeline schedule; one rank's is 1F1B."""
        return _schedule(self.schedule_name, self.pp, self.vpp, self.micro_batches)

    @property
    def splits_backward(self) -> bool:
        """Whether the schedule computes gradients of weights apart from those of inputs."""
        return self.pp > 1 and _schedule(self.schedule_name, self.pp, self.vpp, 2 * self.pp).splits_backward

    @property
    def unsplit(self) -> PlannedLayout:
        """The same under 1F1B, for what the schedule does not change: what a stage computes and sends."""
        return dataclasses.replace(self, schedule_name="1f1b", vpp=1) if self.splits_backward else self

    def context(self, rank: int = 0) -> ParallelContext:
        """Where ``rank`` stands, on the meta device."""
        sizes = {"tp": self.tp, "cp": self.cp, "pp": self.pp, "ep": self.ep, "etp": self.etp}
        return ParallelContext.of_rank(rank, self.world_size, device="meta", **sizes)

    def describe(self) -> str:
        """In flags, as one would type them."""
        words = [f"--tp {self.tp}", "--sp" if self.sequence_parallel else "", f"--cp {self.cp}" if self.cp > 1 else ""]
        words.append(f"--cp-comm-type {self.cp_comm_type}" if self.cp > 1 and self.cp_comm_type != "allgather" else "")
        words.append(f"--pp {self.pp}" if self.pp > 1 else "")
        words.append(f"--vpp {self.vpp}" if self.vpp > 1 else "")
        words.append(f"--pipeline-schedule {self.schedule_name}" if self.pp > 1 else "")
        words.append(f"--ep {self.ep}" if self.ep > 1 else "")
        words.append(f"--etp {self.etp}" if self.etp != self.tp else "")
        words.append(f"--zero {self.zero}" if self.zero else "")
        words.append("--zero-quantized-gather" if self.zero and self.code_bits else "")
        words.append(f"--recompute {self.recompute}" if self.recompute != "none" else "")
        words.append("--cpu-offload-activations" if self.offload else "")
        words.append("--compress-activations" if self.compress else "")
        words.append("" if self.sequence_checkpoint is None else f"--sequence-checkpoint {self.sequence_checkpoint}")
        words.append(f"--micro-batch-size {self.micro_batch_size}")
        return " ".join(word for word in words if word)


@lru_cache(maxsize=64)
def _schedule(name: str, pp: int, vpp: int, microbatches: int) -> Schedule:
    return build_schedule(name, pp=pp, vpp=vpp, microbatches=microbatches)


def layout_of(config: Config, world_size: int) -> PlannedLayout:
    """The layout that ``config`` describes on ``world_size`` ranks, by the training script's own checks.

    Raises:
        UserError: as training would.
    """
    parallel = config.parallel
    checked = check_run(config, world_size).layout
    schedule_name, vpp = pipeline_shape(config.model, parallel)
    return PlannedLayout(
        world_size=world_size,
        tp=checked.tp,
        cp=checked.cp,
        cp_comm_type=parallel.cp_comm_type,
        pp=parallel.pipeline_model_parallel_size,
        vpp=vpp,
        ep=parallel.expert_model_parallel_size,
        etp=checked.etp,
        sequence_parallel=parallel.sequence_parallel and checked.tp > 1,
        schedule_name=schedule_name,
        zero=parallel.zero_stage,
        recompute=parallel.recompute,
        offload=parallel.cpu_offload_activations,
        compress=parallel.compress_activations,
        sequence_checkpoint=parallel.sequence_checkpoint,
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=checked.batches.size,
        sequence_length=config.data.seq_length,
        bucket_size=parallel.ddp_bucket_size,
        overlap=parallel.overlap_grad_reduce,
        dtype=compute_dtype(config.training),
        wkv_backend=config.training.wkv_backend,
        optimizer=config.optimizer,
        code_bits=gathered_bits(config),
        teacher=teacher_model(config)[0],
        rounds=rounds_of(config),
        libraries=CPU_LIBRARIES if config.training.device == "cpu" else LIBRARIES,
    )


def gathered_bits(config: Config) -> int:
    """:attr:`PlannedLayout.code_bits`."""
    scheme = weight_scheme(config.model)
    return 0 if scheme is None or not config.parallel.zero_quantized_gather else scheme.bits

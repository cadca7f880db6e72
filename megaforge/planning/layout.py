"""The layout of a planned run: every axis and what else decides memory and time, resolved from a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from megaforge.config.config import Config
from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.models.pattern import blocks_of
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.pipeline.actions import Schedule
from megaforge.parallel.pipeline.schedules import build_schedule

RECOMPUTE = ("none", "selective", "moe", "full")


@dataclass(frozen=True)
class PlannedLayout:
    """Sizes of all axes, the batch, and what trades memory for time.

    Attributes:
        vpp: pipeline stages on each pipeline rank.
        etp: tensor parallelism of experts.
        zero: 0, 1 (optimizer state shared out) or 2 (gradients too).
        recompute: what the backward pass computes again. ``selective``: mixers, each from the residual stream before
            it; ``moe``: mixture-of-experts FFNs, likewise; ``full``: whole blocks, from the residual stream before
            each; ``none``: nothing.
        dtype: of parameters and activations.
    """

    world_size: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False
    schedule_name: str = "1f1b"
    zero: int = 0
    recompute: str = "none"
    micro_batch_size: int = 1
    global_batch_size: int = 1
    sequence_length: int = 1024
    bucket_size: int = 25_000_000
    overlap: bool = True
    dtype: torch.dtype = torch.bfloat16

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
    def tokens(self) -> int:
        """Tokens of a micro-batch that a rank sees inside the tensor-parallel region."""
        return self.micro_batch_size * self.sequence_length // self.cp

    @property
    def residual_tokens(self) -> int:
        """Tokens of a micro-batch on a rank's residual stream."""
        return self.tokens // (self.tp if self.sequence_parallel else 1)

    @property
    def shares_tokens(self) -> bool:
        """Whether tp ranks route different tokens to the experts; not where experts are laid out like dense layers."""
        return self.tp > 1 and not (self.ep == 1 and self.etp == self.tp)

    @property
    def element_size(self) -> int:
        """Bytes of a parameter or activation."""
        return self.dtype.itemsize

    @property
    def wide_size(self) -> int:
        """Bytes of what is kept in fp32 (fp64 for fp64 models)."""
        return max(4, self.dtype.itemsize)

    @property
    def schedule(self) -> Schedule:
        """The pipeline schedule; one rank's is 1F1B."""
        return _schedule(self.schedule_name, self.pp, self.vpp, self.micro_batches)

    def context(self, rank: int = 0) -> ParallelContext:
        """Where ``rank`` stands, on the meta device."""
        sizes = {"tp": self.tp, "cp": self.cp, "pp": self.pp, "ep": self.ep, "etp": self.etp}
        return ParallelContext.of_rank(rank, self.world_size, device="meta", **sizes)

    def describe(self) -> str:
        """In flags, as one would type them."""
        words = [f"--tp {self.tp}", "--sp" if self.sequence_parallel else "", f"--cp {self.cp}" if self.cp > 1 else ""]
        words.append(f"--pp {self.pp}" if self.pp > 1 else "")
        words.append(f"--vpp {self.vpp}" if self.vpp > 1 else "")
        words.append(f"--pipeline-schedule {self.schedule_name}" if self.pp > 1 else "")
        words.append(f"--ep {self.ep}" if self.ep > 1 else "")
        words.append(f"--etp {self.etp}" if self.etp != self.tp else "")
        words.append(f"--zero {self.zero}" if self.zero else "")
        words.append(f"--recompute {self.recompute}" if self.recompute != "none" else "")
        words.append(f"--micro-batch-size {self.micro_batch_size}")
        return " ".join(word for word in words if word)


@lru_cache(maxsize=64)
def _schedule(name: str, pp: int, vpp: int, microbatches: int) -> Schedule:
    return build_schedule(name, pp=pp, vpp=vpp, microbatches=microbatches)


def roomy_etp(tp: int, ep: int, stage_ranks: int) -> int:
    """The default tensor parallelism of experts: ``tp``, or its largest divisor that leaves room for ``ep``.

    0 where none does.
    """
    return next((etp for etp in range(tp, 0, -1) if tp % etp == 0 and stage_ranks % (etp * ep) == 0), 0)


def check_sizes(cfg: ModelConfig, layout: PlannedLayout) -> None:
    """Checks that ``layout`` can hold the model and the batch.

    Raises:
        UserError: naming the flag, its value and one that would work.
    """
    kinds = blocks_of(cfg)
    sizes = {
        "--tp": (layout.tp, _over_tp(cfg, layout)),
        "--etp": (layout.etp, {f"--ffn-hidden-size {cfg.ffn_size}": cfg.ffn_size}),
        "--ep": (layout.ep, {f"--num-experts {cfg.num_experts}": cfg.num_experts}),
        "--cp": (layout.cp, {f"--seq-length {layout.sequence_length}": layout.sequence_length}),
    }
    for flag, (size, parts) in sizes.items():
        for label, value in parts.items():
            if size < 1 or value % size:
                near = [str(n) for n in range(1, value + 1) if value % n == 0][:8]
                raise UserError(f"{flag} {size} does not divide {label}; use {flag} {', '.join(near)}")
    product = layout.tp * layout.cp * layout.pp
    if layout.world_size % product or layout.world_size < product:
        raise UserError(f"--tp x --cp x --pp is {product}, which does not divide {layout.world_size} ranks")
    if layout.stage_ranks % (layout.ep * layout.etp):
        fits = roomy_etp(layout.tp, layout.ep, layout.stage_ranks)
        raise UserError(
            f"--ep {layout.ep} x --etp {layout.etp} does not divide the {layout.stage_ranks} ranks of a pipeline stage"
            + (f"; use --etp {fits}" if fits else f"; use a divisor of {layout.stage_ranks} as --ep")
        )
    if layout.pp * layout.vpp > len(kinds):
        raise UserError(
            f"--pp {layout.pp} x --vpp {layout.vpp} are more stages than the model's {len(kinds)} blocks; "
            f"use --pp {len(kinds) // layout.vpp} or fewer"
        )
    step = layout.micro_batch_size * layout.dp
    if layout.global_batch_size % step or layout.global_batch_size < step:
        near_batch = max(1, round(layout.global_batch_size / step)) * step
        raise UserError(
            f"--global-batch-size {layout.global_batch_size} does not divide by --micro-batch-size "
            f"{layout.micro_batch_size} x dp {layout.dp}; use --global-batch-size {near_batch}"
        )
    if layout.recompute not in RECOMPUTE:
        raise UserError(f"--recompute {layout.recompute} is unknown; choose {', '.join(RECOMPUTE)}")


def _over_tp(cfg: ModelConfig, layout: PlannedLayout) -> dict[str, int]:
    mixers = {kind.mixer for kind in blocks_of(cfg)}
    parts = {f"the padded vocabulary of {cfg.padded_vocab_size()}": cfg.padded_vocab_size()}
    if "attention" in mixers:
        parts[f"--num-attention-heads {cfg.num_attention_heads}"] = cfg.num_attention_heads
        parts[f"--num-query-groups {cfg.query_groups}"] = cfg.query_groups
    if "rwkv7" in mixers:
        heads = cfg.hidden_size // cfg.rwkv_head_size
        parts[f"the {heads} RWKV heads"] = heads
    if any(kind.ffn == "dense" for kind in blocks_of(cfg)):
        parts[f"--ffn-hidden-size {cfg.ffn_size}"] = cfg.ffn_size
    if layout.sequence_parallel:
        parts[f"--seq-length {layout.sequence_length} / --cp {layout.cp}"] = layout.sequence_length // layout.cp
    return parts


def layout_of(config: Config, world_size: int, dtype: torch.dtype, **overrides: int | str | None) -> PlannedLayout:
    """The layout that ``config`` describes on ``world_size`` ranks, checked.

    Args:
        overrides: values of flags that stand in no section of ``config``: vpp, etp, zero, recompute, schedule_name.

    Raises:
        UserError: see :func:`check_sizes`.
    """
    parallel, given = config.parallel, {name: value for name, value in overrides.items() if value is not None}
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pp, ep = parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size
    if world_size < 1 or world_size % (tp * cp * pp):
        raise UserError(f"--tp {tp} x --cp {cp} x --pp {pp} does not divide {world_size} ranks")
    stage_ranks = world_size // pp
    vpp = int(given.get("vpp", 1))
    etp = int(given.get("etp", roomy_etp(tp, ep, stage_ranks) or tp))
    micro = config.training.micro_batch_size
    layout = PlannedLayout(
        world_size=world_size,
        tp=tp,
        cp=cp,
        pp=pp,
        vpp=vpp,
        ep=ep,
        etp=etp,
        sequence_parallel=parallel.sequence_parallel and tp > 1,
        schedule_name=str(given.get("schedule_name", "1f1b" if vpp == 1 else "interleaved")),
        zero=int(given.get("zero", 0)),
        recompute=str(given.get("recompute", "none")),
        micro_batch_size=micro,
        global_batch_size=config.training.global_batch_size or micro * stage_ranks // (tp * cp),
        sequence_length=config.data.seq_length,
        bucket_size=parallel.ddp_bucket_size,
        overlap=parallel.overlap_grad_reduce,
        dtype=dtype,
    )
    check_sizes(config.model, layout)
    return layout

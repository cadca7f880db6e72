"""Checks of the sections against each other and against the number of ranks, before any process group exists."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist

from megaforge.config.config import Config
from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError


@dataclass(frozen=True)
class Layout:
    """What follows from a configuration and a number of ranks.

    Attributes:
        world_size, tp, dp: ranks, and their tensor- and data-parallel sizes.
        global_batch_size: sequences of one optimizer step.
        micro_batches: micro-batches a rank computes in one optimizer step.
        notes: what is legal but may surprise; rank 0 prints each once.
    """

    world_size: int
    tp: int
    dp: int
    global_batch_size: int
    micro_batches: int
    notes: tuple[str, ...]


def with_tokenizer_vocab(config: Config, tokenizer_vocab_size: int) -> Config:
    """``config`` whose vocabulary size is set: the tokenizer's, unless it was given.

    Raises:
        UserError: the given vocabulary is smaller than the tokenizer's.
    """
    given = config.model.vocab_size
    if given is None:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer_vocab_size))
    if given < tokenizer_vocab_size:
        raise UserError(
            f"--vocab-size {given}: the tokenizer has {tokenizer_vocab_size} entries; "
            f"use --vocab-size {tokenizer_vocab_size} or more, or --vocab-size none to take the tokenizer's"
        )
    return config


def check_layout(config: Config, world_size: int) -> Layout:
    """Checks that ``config`` can run on ``world_size`` ranks.

    The vocabulary's divisibility is checked once ``config.model.vocab_size`` is known.

    Raises:
        UserError: naming the flag, its value and one that would work.
    """
    parallel = config.parallel
    for flag, size, what in (
        ("--cp", parallel.context_parallel_size, "context parallelism"),
        ("--ep", parallel.expert_model_parallel_size, "expert parallelism"),
    ):
        if size > 1:
            raise UserError(f"{flag} {size}: {what} is not implemented yet; use {flag} 1")
    tp = parallel.tensor_model_parallel_size
    if world_size % tp:
        raise UserError(
            f"--tp {tp} does not divide the {world_size} ranks that were started; "
            f"use --tp {_working_tp(config, world_size)}, or start {tp} ranks"
        )
    for label, value in _split_over_tp(config):
        if value % tp:
            raise UserError(f"--tp {tp} does not divide {label}; use --tp {_working_tp(config, world_size)}")
    _check_pipeline(config, world_size)
    _check_lengths(config)
    _check_backend(config)
    _check_schedule(config)
    dp = world_size // (tp * parallel.pipeline_model_parallel_size)
    global_batch_size = _global_batch_size(config, dp)
    micro_batches = global_batch_size // (config.training.micro_batch_size * dp)
    return Layout(world_size, tp, dp, global_batch_size, micro_batches, tuple(_notes(config)))


def mixer_kinds(model: ModelConfig) -> frozenset[str]:
    """Which mixers the model has: ``R`` for RWKV-7, ``*`` for attention."""
    if model.hybrid_layer_pattern is not None:
        return frozenset("R*") & frozenset(model.hybrid_layer_pattern)
    if model.layer_schedule in ("attention", "rwkv"):
        return frozenset("*" if model.layer_schedule == "attention" else "R")
    attention_blocks = round(model.num_layers * model.transformer_pct / 100)
    present = {"*": attention_blocks > 0, "R": attention_blocks < model.num_layers}
    return frozenset(kind for kind, there in present.items() if there)


def _split_over_tp(config: Config) -> list[tuple[str, int]]:
    """(how to name it, size) of everything that tensor parallelism cuts."""
    model, kinds = config.model, mixer_kinds(config.model)
    sizes = []
    if "*" in kinds:
        sizes.append((f"--num-attention-heads {model.num_attention_heads}", model.num_attention_heads))
        sizes.append((f"--num-query-groups {model.query_groups}", model.query_groups))
    if "R" in kinds:
        heads, head_size = model.hidden_size // model.rwkv_head_size, model.rwkv_head_size
        sizes.append(
            (f"the {heads} RWKV heads (--hidden-size {model.hidden_size} / --rwkv-head-size {head_size})", heads)
        )
    sizes.append((f"--ffn-hidden-size {model.ffn_size}", model.ffn_size))
    if model.vocab_size is not None:
        padded = model.padded_vocab_size()
        multiple = f"--make-vocab-size-divisible-by {model.make_vocab_size_divisible_by}"
        sizes.append((f"the vocabulary of {model.vocab_size} padded to {padded} ({multiple})", padded))
    if config.parallel.sequence_parallel:
        sizes.append((f"--seq-length {config.data.seq_length}, which --sequence-parallel cuts", config.data.seq_length))
    return sizes


def _working_tp(config: Config, world_size: int) -> str:
    """The tensor-parallel sizes that would work, as words."""
    sizes = [value for _, value in _split_over_tp(config)]
    return _either(size for size in range(1, world_size + 1) if not any(n % size for n in (world_size, *sizes)))


def _either(values: Iterable[int]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _check_pipeline(config: Config, world_size: int) -> None:
    """pp divides the ranks that tp leaves; :func:`megaforge.models.stages.plan_pipeline` checks stages and schedule."""
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    rest = world_size // tp
    if rest % pp:
        working = _either(size for size in range(1, rest + 1) if rest % size == 0)
        raise UserError(
            f"--pp {pp} does not divide the {rest} ranks that --tp {tp} leaves of the {world_size} that were started; "
            f"use --pp {working}"
        )


def _check_lengths(config: Config) -> None:
    longest = config.model.max_position_embeddings
    if longest is not None and config.data.seq_length > longest:
        raise UserError(
            f"--seq-length {config.data.seq_length} exceeds --max-position-embeddings {longest}; "
            f"use --seq-length {longest} or raise --max-position-embeddings"
        )


def _check_backend(config: Config) -> None:
    backend, device = config.parallel.distributed_backend, config.training.device
    if backend == "mpi" and not dist.is_mpi_available():
        raise UserError(
            "--distributed-backend mpi: this torch was built without MPI; use --distributed-backend auto "
            "(mpirun may still start the ranks), or a torch built with MPI"
        )
    if backend == "nccl" and device == "cpu":
        raise UserError("--distributed-backend nccl does not serve --device cpu; use --distributed-backend gloo")
    if backend == "nccl" and not dist.is_nccl_available():
        raise UserError("--distributed-backend nccl: this torch was built without NCCL; use --distributed-backend gloo")


def _check_schedule(config: Config) -> None:
    final = config.optimizer.lr_wsd_decay_iters
    decay_iters = config.optimizer.lr_decay_iters or config.training.train_iters
    if config.optimizer.lr_decay_style == "WSD" and final is not None and final > decay_iters > 0:
        raise UserError(
            f"--lr-wsd-decay-iters {final} exceeds the schedule's {decay_iters} iterations "
            f"(--lr-decay-iters, or --train-iters); use --lr-wsd-decay-iters {decay_iters} or fewer"
        )


def _global_batch_size(config: Config, dp: int) -> int:
    micro = config.training.micro_batch_size
    given = config.training.global_batch_size
    if given is None:
        return micro * dp
    step = micro * dp
    if given % step:
        below = given // step * step
        working = _either(size for size in (below, below + step) if size > 0)
        smaller = next((size for size in range(micro - 1, 0, -1) if given % (size * dp) == 0), None)
        raise UserError(
            f"--global-batch-size {given} does not divide by --micro-batch-size {micro} x dp {dp} = {step}; "
            f"use --global-batch-size {working}" + (f", or --micro-batch-size {smaller}" if smaller else "")
        )
    return given


def _notes(config: Config) -> list[str]:
    notes = []
    if config.parallel.cpu_offload_activations and config.training.device == "cpu":
        notes.append("--cpu-offload-activations has nothing to move on --device cpu: it changes nothing")
    if config.parallel.sequence_parallel and config.parallel.tensor_model_parallel_size == 1:
        notes.append("--sequence-parallel has nothing to share at --tp 1: it changes nothing")
    decay_iters = config.optimizer.lr_decay_iters or config.training.train_iters
    if 0 < decay_iters < config.optimizer.lr_warmup_iters:
        notes.append(
            f"--lr-warmup-iters {config.optimizer.lr_warmup_iters} exceeds the schedule's {decay_iters} iterations: "
            "the run ends before --lr is reached"
        )
    return notes

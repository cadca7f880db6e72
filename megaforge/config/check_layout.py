"""Checks of the sections against each other and against the number of ranks, before any process group exists."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megaforge.config.balancing import check_balancing
from megaforge.config.batch_schedule import BatchSchedule, in_samples
from megaforge.config.check_depth import check_depth
from megaforge.config.config import Config
from megaforge.config.fields import divisors, either
from megaforge.config.layer_kind import LayerKind
from megaforge.config.lr_shapes import RateShape
from megaforge.config.micro_batch_config import AUTO
from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import kinds_of
from megaforge.errors import UserError
from megaforge.registry import LR_SCHEDULES


@dataclass(frozen=True)
class Layout:
    """What follows from a configuration and a number of ranks.

    Attributes:
        world_size, tp, cp, dp: ranks, and their tensor-, context- and data-parallel sizes.
        etp: ranks that share each expert's matrices.
        batches: sequences of each optimizer step.
        micro_batches: micro-batches a rank computes in one optimizer step, where the batch has its full size.
        notes: what is legal but may surprise; rank 0 prints each once.
    """

    world_size: int
    tp: int
    cp: int
    dp: int
    etp: int
    batches: BatchSchedule
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


def vocabulary_cost(model: ModelConfig, tokenizer_vocab_size: int) -> str | None:
    """What a ``--vocab-size`` above the tokenizer's costs, or None where nothing is wasted.

    Fewer rows than the padding adds anyway are not worth a word.
    """
    if model.vocab_size is None or model.vocab_size <= tokenizer_vocab_size:
        return None
    fitting = dataclasses.replace(model, vocab_size=tokenizer_vocab_size).padded_vocab_size()
    rows = model.padded_vocab_size() - fitting
    if rows <= 0:
        return None
    matrices = 2 if model.untie_embeddings_and_output_weights else 1
    return (
        f"--vocab-size {model.vocab_size}: the tokenizer has {tokenizer_vocab_size:,} entries, so {rows:,} rows of the "
        f"embedding{' and of the output head' if matrices == 2 else ''} ({rows * model.hidden_size * matrices:,} "
        "parameters) stand for no token; --vocab-size none takes the tokenizer's"
    )


def check_layout(config: Config, world_size: int) -> Layout:
    """Checks that ``config`` can run on ``world_size`` ranks.

    The vocabulary's divisibility is checked once ``config.model.vocab_size`` is known.

    Raises:
        UserError: naming the flag, its value and one that would work.
    """
    parallel = config.parallel
    tp = parallel.tensor_model_parallel_size
    if world_size % tp:
        raise UserError(
            f"--tp {tp} does not divide the {world_size} ranks that were started; "
            f"use --tp {_working_tp(config, world_size)}, or start {tp} ranks"
        )
    for label, value in _split_over_tp(config, world_size):
        if value % tp:
            raise UserError(f"--tp {tp} does not divide {label}; use --tp {_working_tp(config, world_size)}")
    _check_axes(config)
    _check_pipeline(config, world_size)
    _check_context(config, world_size)
    _check_experts(config, world_size)
    check_depth(config)
    _check_lengths(config)
    _check_backend(config)
    _check_length(config)
    _check_gradients(config)
    cp = parallel.context_parallel_size
    dp = world_size // (tp * parallel.pipeline_model_parallel_size * cp)
    steps = in_samples(config.training.batch_steps, config.data.seq_length)
    batches = BatchSchedule(_global_batch_size(config, dp), config.training.rampup_batch_size, steps=steps)
    _check_evaluation(config, dp)
    micro_batches = batches.size // (config.training.micro_batch_size * dp)
    etp = parallel.expert_tensor_size(world_size)
    notes = (*_notes(config, world_size, dp * cp), *check_balancing(config, dp, etp, micro_batches))
    return Layout(world_size, tp, cp, dp, etp, batches, micro_batches, notes)


def expert_kinds(model: ModelConfig) -> list[LayerKind]:
    """The model's kinds of layer that are laid out over ep."""
    return [kind for kind in kinds_of(model) if kind.has_experts]


def has_experts(model: ModelConfig) -> bool:
    """Whether any layer of the model is laid out over ep."""
    return bool(expert_kinds(model))


def common_experts(model: ModelConfig) -> int:
    """What divides the number of experts of each kind of layer that has some; 1 without."""
    return math.gcd(*(kind.experts(model)[1] for kind in expert_kinds(model))) or 1


def _check_axes(config: Config) -> None:
    """A user's layer may be for whole sequences or whole widths."""
    sizes = {"tp": config.parallel.tensor_model_parallel_size, "cp": config.parallel.context_parallel_size}
    for kind in kinds_of(config.model):
        for axis, size in sizes.items():
            if size > 1 and axis not in kind.axes:
                raise UserError(f"--{axis} {size}: the model has a {kind.title}, which cannot be split; use --{axis} 1")


def _check_experts(config: Config, world_size: int) -> None:
    """Experts fold the ranks of a pipeline stage, tp x cp x dp of them, into etp x ep x edp."""
    parallel, model = config.parallel, config.model
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_size(world_size)
    given = parallel.expert_tensor_parallel_size is not None
    if not has_experts(model):
        if ep > 1 or given:
            flag = f"--ep {ep}" if ep > 1 else f"--etp {etp}"
            raise UserError(f"{flag} splits experts, and this model has none; leave it out, or use --ffn moe")
        return
    ranks = world_size // parallel.pipeline_model_parallel_size
    widths = dict(kind.expert_width(model) for kind in expert_kinds(model))
    fitting_etp = divisors(math.gcd(ranks, *widths.values()))
    if etp not in fitting_etp:
        label = min(widths, key=lambda label: widths[label] % etp == 0)
        raise UserError(
            f"--etp {etp} does not divide both {label} and the {ranks} ranks of a pipeline stage; "
            f"use --etp {either(fitting_etp)}"
        )
    numbers = dict(kind.experts(model) for kind in expert_kinds(model))
    fitting_ep = divisors(math.gcd(ranks // etp, common_experts(model)))
    if ep not in fitting_ep:
        left = f"the {ranks // etp} ranks that --etp {etp} leaves of the {ranks}" if given else f"the {ranks} ranks"
        flag = min(numbers, key=lambda flag: numbers[flag] % ep == 0)
        raise UserError(
            f"--ep {ep} does not divide both {flag} {numbers[flag]} and {left} of a pipeline stage; "
            f"use --ep {either(fitting_ep)}"
        )


def _split_over_tp(config: Config, world_size: int) -> list[tuple[str, int]]:
    """(how to name it, size) of everything that tensor parallelism cuts on ``world_size`` ranks."""
    model, parallel = config.model, config.parallel
    sizes = [size for kind in kinds_of(model) for size in kind.split_over_tp(config, world_size)]
    if model.vocab_size is not None:
        padded = model.padded_vocab_size()
        multiple = f"--make-vocab-size-divisible-by {model.make_vocab_size_divisible_by}"
        sizes.append((f"the vocabulary of {model.vocab_size} padded to {padded} ({multiple})", padded))
    if parallel.sequence_parallel and parallel.context_parallel_size == 1:
        sizes.append((f"--seq-length {config.data.seq_length}, which --sequence-parallel cuts", config.data.seq_length))
    return sizes


def _working_tp(config: Config, world_size: int) -> str:
    """The tensor-parallel sizes that would work, as words."""
    sizes = [value for _, value in _split_over_tp(config, world_size)]
    return either(size for size in range(1, world_size + 1) if not any(n % size for n in (world_size, *sizes)))


def _check_context(config: Config, world_size: int) -> None:
    """cp divides the ranks that tp and pp leave, and the sequence divides into its chunks."""
    parallel, length = config.parallel, config.data.seq_length
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if cp == 1:
        return
    pp = parallel.pipeline_model_parallel_size
    ranks = world_size // (tp * pp)
    inner = tp if parallel.sequence_parallel else 1
    working = [
        size for size in range(1, ranks + 1) if ranks % size == 0 and (size == 1 or not length % (2 * size * inner))
    ]
    if ranks % cp:
        others = f"--tp {tp} and --pp {pp} leave" if pp > 1 else f"--tp {tp} leaves"
        raise UserError(
            f"--cp {cp} does not divide the {ranks} ranks that {others} of the {world_size} that were started; "
            f"use --cp {either(working)}"
        )
    unit = parallel.seq_len_divisor
    if length % unit:
        why = (
            f"2 x cp x tp = {unit} (--sequence-parallel cuts each chunk over --tp {tp})"
            if inner > 1
            else f"2 x cp = {unit}"
        )
        lengths = [size for size in (length // unit * unit, (length // unit + 1) * unit) if size]
        raise UserError(
            f"--seq-length {length} is not divisible by {why}: --cp {cp} cuts each sequence into {2 * cp} chunks; "
            f"use --seq-length {either(lengths)}, or --cp {either(working)}"
        )


def _check_pipeline(config: Config, world_size: int) -> None:
    """pp divides the ranks that tp leaves; :func:`megaforge.models.stages.plan_pipeline` checks stages and schedule."""
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    rest = world_size // tp
    if rest % pp:
        working = either(divisors(rest))
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
    if backend == "nccl" and device == "cpu":
        raise UserError("--distributed-backend nccl does not serve --device cpu; use --distributed-backend gloo")


def _check_length(config: Config) -> None:
    """What a run counts in epochs needs data that have them; its schedule is checked once it is counted
    (:mod:`megaforge.training.lengths`)."""
    epochs = [flag for flag in config.length.given if flag.endswith("-epochs")]
    if config.data.mock_data and epochs:
        raise UserError(
            f"{epochs[0]} {config.length.given[epochs[0]]:g}: --mock-data has no end, so there is no epoch; count in "
            "iterations (--train-iters) or samples (--train-samples)"
        )
    if not config.length.needs_data:
        check_schedule(config)


def check_schedule(config: Config) -> None:
    """Checks the learning-rate schedule's lengths, in iterations, against each other and the run.

    Raises:
        UserError: naming the flag, its value and one that would work.
    """
    shape: RateShape = LR_SCHEDULES.get(config.optimizer.lr_decay_style)
    warmup, end = config.optimizer.lr_warmup_iters, config.optimizer.lr_decay_iters
    over = end is not None and end <= warmup < config.training.train_iters
    if over and "lr_decay_iters" in shape.reads:
        raise UserError(
            f"--lr-decay-iters {end}: the decay is over when the warm-up of --lr-warmup-iters {warmup} ends, and the "
            "rate would fall to --min-lr in one step; make the one longer or the other shorter"
        )
    final = config.optimizer.lr_wsd_decay_iters
    decay_iters = config.optimizer.lr_decay_iters or config.training.train_iters
    if "lr_wsd_decay_iters" in shape.reads and final is not None and final > decay_iters > 0:
        raise UserError(
            f"--lr-wsd-decay-iters {final} exceeds the schedule's {decay_iters} iterations "
            f"(--lr-decay-iters, or --train-iters); use --lr-wsd-decay-iters {decay_iters} or fewer"
        )
    if "lr_restart_iters" in shape.reads and config.optimizer.lr_restart_iters is None:
        raise UserError(
            f"--lr-decay-style {config.optimizer.lr_decay_style}: it does not say how long a cycle is; add "
            f"--lr-restart-iters, such as {max(1, decay_iters // 4)}"
        )


def _check_gradients(config: Config) -> None:
    """How gradients are sharded and sent must fit each other and the precision."""
    parallel, training = config.parallel, config.training
    zero, kind = parallel.zero_stage, parallel.grad_compression
    if kind == "none":
        if parallel.grad_reduce_in_bf16 and training.fp64:
            raise UserError("--grad-reduce-in-bf16 would undo --fp64; drop one of the two")
        return
    if parallel.grad_reduce_in_bf16:
        raise UserError(f"--grad-reduce-in-bf16 and --grad-compression {kind} exclude each other; drop one of the two")
    if zero == 2:
        raise UserError(f"--grad-compression {kind} needs whole gradients, which --zero 2 does not keep; use --zero 1")
    if training.fp16:
        raise UserError(
            f"--grad-compression {kind} carries losses over to steps with another --fp16 loss scale; use --bf16"
        )
    if training.fp64 and kind == "bf16":
        raise UserError("--grad-compression bf16 would undo --fp64; drop one of the two")


def _global_batch_size(config: Config, dp: int) -> int:
    micro = config.training.micro_batch_size
    if micro == AUTO:
        raise UserError(
            "--micro-batch-size auto: is for runs, and for plan.py memory of one layout; give a number here"
        )
    given = config.training.full_batch_size
    if given is None:
        return micro * dp
    step = micro * dp
    for _, size in config.training.batch_steps:
        if size % step:
            raise UserError(
                f"--step-batch-size-schedule {' '.join(config.training.step_batch_size_schedule)}: a batch of {size} "
                f"is not divisible by --micro-batch-size {micro} x dp {dp} = {step}; use multiples of {step}"
            )
    if given % step:
        below = given // step * step
        working = either(size for size in (below, below + step) if size > 0)
        smaller = next((size for size in range(micro - 1, 0, -1) if given % (size * dp) == 0), None)
        raise UserError(
            f"--global-batch-size {given} is not divisible by --micro-batch-size {micro} x dp {dp} = {step}; "
            f"use --global-batch-size {working}" + (f", or --micro-batch-size {smaller}" if smaller else "")
        )
    ramp = config.training.rampup_batch_size
    if any(size % step for size in ramp[:2]):
        raise UserError(
            f"--rampup-batch-size {' '.join(map(str, ramp))}: its START and INCREMENT are not both divisible by "
            f"--micro-batch-size {micro} x dp {dp} = {step}; use multiples of {step}"
        )
    return given


def _check_evaluation(config: Config, dp: int) -> None:
    given, step = config.training.eval_global_batch_size, config.training.micro_batch_size * dp
    if given is not None and given % step:
        below = given // step * step
        working = either(size for size in (below, below + step) if size > 0)
        raise UserError(
            f"--eval-global-batch-size {given} is not divisible by --micro-batch-size "
            f"{config.training.micro_batch_size} x dp {dp} = {step}; use --eval-global-batch-size {working}"
        )


def _notes(config: Config, world_size: int, replicas: int) -> list[str]:
    notes = []
    parallel = config.parallel
    tp, etp = parallel.tensor_model_parallel_size, parallel.expert_tensor_size(world_size)
    if parallel.expert_tensor_parallel_size is None and etp < tp and has_experts(config.model):
        notes.append(
            f"--etp {etp}, as none was given: the largest divisor of --tp {tp} that leaves room for "
            f"--ep {parallel.expert_model_parallel_size} among the "
            f"{world_size // parallel.pipeline_model_parallel_size} ranks of a pipeline stage"
        )
    if parallel.context_parallel_size > 1 and parallel.cp_comm_type == "p2p" and config.model.attention_dropout:
        notes.append("--attention-dropout gathers keys and values, as --cp-comm-type allgather, in place of p2p")
    if parallel.cpu_offload_activations and config.training.device == "cpu":
        notes.append("--cpu-offload-activations has nothing to move on --device cpu: it changes nothing")
    if parallel.zero_stage and replicas == 1:
        notes.append(f"--zero {parallel.zero_stage} has nothing to shard at dp 1: it saves nothing")
    if parallel.grad_compression != "none":
        notes.append(
            f"--grad-compression {parallel.grad_compression}: what is learned now depends on the number of "
            "data-parallel ranks"
            + (", and at dp 1 nothing is sent" if replicas == 1 else "; --load starts without the losses kept so far")
        )
    if parallel.grad_reduce_in_bf16 and replicas > 1:
        notes.append(
            "--grad-reduce-in-bf16: gradients are rounded before they are summed, so what is learned now depends a "
            "little on the number of data-parallel ranks"
        )
    if config.parallel.sequence_parallel and config.parallel.tensor_model_parallel_size == 1:
        notes.append("--sequence-parallel has nothing to share at --tp 1: it changes nothing")
    if not config.length.needs_data:
        notes += warmup_notes(config)
    return notes


def warmup_notes(config: Config) -> list[str]:
    """What to tell of a warm-up that is longer than the run."""
    warmup, whole = config.optimizer.lr_warmup_iters, config.training.train_iters
    if not 0 < whole < warmup:
        return []
    return [f"--lr-warmup-iters {warmup} exceeds --train-iters {whole}: the run ends before --lr is reached"]

"""From a configuration to a trainer that is ready to train: what every pretraining entry script does."""

from __future__ import annotations

import datetime
import os
from functools import partial
from math import ceil

import torch
import torch.distributed as dist

from megaforge.checkpoint.background import BackgroundSave
from megaforge.checkpoint.directory import Retention
from megaforge.checkpoint.replica import replica_of
from megaforge.config.config import Config
from megaforge.config.launcher import restarts_may_hang
from megaforge.config.lr_shapes import RateShape
from megaforge.config.schema import config_to_dict
from megaforge.data.augment.source import augmented
from megaforge.data.data_source import DataSource, source_kind
from megaforge.data.skipped import SkippedSamples
from megaforge.data.tokenizer import Tokenizer
from megaforge.device import keep_host_memory, resolve_device, set_gpu_environment
from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel
from megaforge.models.pipeline_shape import PipelinePlan
from megaforge.models.prepared_run import PreparedRun
from megaforge.models.stages import ModelChunks, build_model
from megaforge.monitor.sinks import JsonlSink, MetricSink
from megaforge.monitor.trackers import MlflowSink, TensorBoardSink, WandbSink
from megaforge.optim import Optimizer, UpdateRule, bucket_policy
from megaforge.optim.groups import check_groups
from megaforge.optim.optimizer import rule_of
from megaforge.parallel.agree import exchange, from_first_rank, together
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.distributed import check_backend, discover_launch, initialize, print_rank_0
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import compute_dtype, make_layer_context
from megaforge.parallel.zero import shard_parameters
from megaforge.registry import CALLBACKS, LR_SCHEDULES, OBJECTIVES, UPDATE_RULES
from megaforge.training.alerting import tell_others
from megaforge.training.auditing import check_loaded
from megaforge.training.balance_batch import BalanceBatch
from megaforge.training.calibration import Calibration
from megaforge.training.callbacks import (
    Callback,
    Checkpointing,
    EarlyStopping,
    Evaluation,
    ExitInterval,
    MetricsWriter,
)
from megaforge.training.checkpointing import agreed_key, check_save_directory, in_memory, load_run, tokenizer_identity
from megaforge.training.clip_search import ClipSearch
from megaforge.training.compiled import compile_blocks
from megaforge.training.compliance_stage import ComplianceStage
from megaforge.training.console import ConsoleLog
from megaforge.training.decoupled_lr import DecoupledRate
from megaforge.training.digests import Digests
from megaforge.training.ema import WeightAverage
from megaforge.training.engine import Engine
from megaforge.training.fault_steps import FaultSteps
from megaforge.training.final_test import FinalTest
from megaforge.training.intervals import Interval
from megaforge.training.lengths import Progress, check_end, described, in_iterations, interval
from megaforge.training.lr_on_spike import ReduceOnSpike
from megaforge.training.machine_room import MachineRoom
from megaforge.training.manual_gc import ManualCollection
from megaforge.training.memory_limit import Advice, MemoryLimit
from megaforge.training.norms import Norms
from megaforge.training.numerics import choose_matmul_precision
from megaforge.training.penalties import Penalties
from megaforge.training.phase6_output import Phase6Output
from megaforge.training.plateau_boost import PlateauBoost
from megaforge.training.profiling import Profile
from megaforge.training.qk_clip import QKClip
from megaforge.training.quantization import Quantization
from megaforge.training.rank_budget import RankBudget
from megaforge.training.rank_choice import with_chosen_ranks
from megaforge.training.receipt import Receipt
from megaforge.training.run_events import RunEvents, of_checkpoint, open_events
from megaforge.training.sampling import asked_for
from megaforge.training.save_lock import HeldLock
from megaforge.training.second_stage import SecondStage
from megaforge.training.skip_train import SkipTrain
from megaforge.training.snapshots import Snapshots, snapshot_store
from megaforge.training.speed import Speed
from megaforge.training.spike_rollback import SpikeRollback, follow_skips
from megaforge.training.stragglers import Stragglers
from megaforge.training.trainer import Trainer
from megaforge.training.weight_decay import GrowingDecay


def initialize_distributed(config: Config) -> ParallelContext:
    """This rank's device and its place among the others; joins the process group if there are others."""
    parallel = config.parallel
    _ = keep_host_memory()
    if config.training.device != "cpu":  # before anything starts CUDA
        set_gpu_environment(one_queue=parallel.overlap_tp_comm and parallel.tensor_model_parallel_size > 1)
    device = resolve_device(config.training.device, discover_launch().local_rank)
    set_numerics(config, device)
    note = few_cores(device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), len(os.sched_getaffinity(0)))
    for warning in (note, restarts_may_hang()):
        if warning is not None:
            print_rank_0(warning)
    check_backend(config.parallel.distributed_backend)
    _ = initialize(device, parallel.distributed_backend, parallel.distributed_timeout_minutes)
    return make_context(config, device)


def few_cores(device: torch.device, ranks: int, cores: int) -> str | None:
    """A warning where ``ranks`` that feed GPUs share ``cores``, fewer than two a rank: one starts kernels, one reads
    data. Nobody expects that of CPU ranks."""
    if device.type == "cpu" or cores >= 2 * ranks:
        return None
    return (
        f"{ranks} rank{'s' * (ranks > 1)} on a GPU may use {cores} core{'s' * (cores > 1)} of this machine, and will "
        "wait for them; under Slurm export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK before srun (run_scripts/slurm "
        "does), and elsewhere look at the launcher's binding"
    )


def make_context(config: Config, device: torch.device | str) -> ParallelContext:
    """This rank's place in the layout of ``config``, among the ranks of the default process group. Collective."""
    parallel = config.parallel
    return ParallelContext.create(
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_size(dist.get_world_size() if dist.is_initialized() else 1),
        cp=parallel.context_parallel_size,
        device=device,
        timeout=datetime.timedelta(minutes=parallel.distributed_timeout_minutes),
    )


def set_numerics(config: Config, device: torch.device) -> None:
    """Seeds, deterministic algorithms and matmul precision of the process."""
    torch.manual_seed(config.training.seed)
    _ = choose_matmul_precision(config.training.float32_matmul_precision, device)
    if config.training.disable_bf16_reduced_precision_matmul:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first cuBLAS handle is made
        torch.use_deterministic_algorithms(True)
        # Filling every new tensor with NaN finds reads of uninitialised memory, and costs a pass over it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def build_trainer(run: PreparedRun, ctx: ParallelContext, advice: Advice | None = None) -> Trainer:
    """The model, its optimizer and its data, fresh or continued from ``--load``. Collective. ``advice``: for a
    run that is short of memory (:class:`megaforge.training.memory_limit.MemoryLimit`).

    Raises:
        UserError: on every rank: bad data, no place to save, or a checkpoint that cannot be continued.
    """
    run = with_chosen_ranks(run, ctx, build_trainer)
    config, tokenizer = run.config, run.tokenizer
    data = SkippedSamples(together(ctx, lambda: _open_data(config, tokenizer)))
    progress = Progress(data, run.layout.batches)
    config = in_iterations(config, progress)
    together(ctx, lambda: check_save_directory(config.checkpoint) if ctx.is_first_rank else None)
    lock = HeldLock.take(config.checkpoint, ctx)
    model = build_model_chunks(config, ctx, run.plan)
    if config.training.compile:
        together(ctx, lambda: compile_blocks(model))
        print_rank_0("--compile: blocks are compiled when they first run; the first steps take longer")
    initialize_parameters(model, ctx, config.training.seed)
    shards = shard_parameters(config.parallel, model.chunks, ctx, bucket_policy(config.optimizer))
    optimizer = Optimizer(config.optimizer, model, ctx, shards)
    _check_rule(config.optimizer.optimizer, optimizer, ctx)
    check_groups(
        config.optimizer, [main.spec for main in optimizer.main.trained], partial(rule_of, config.optimizer), ctx
    )
    trainer = Trainer(
        config,
        Engine(config, ctx, model, optimizer, run.plan),
        data,
        tokenizer=None if tokenizer is None else tokenizer_identity(tokenizer),
        batches=run.layout.batches,
        callbacks=_callbacks(config, progress, advice),
    )
    trainer.events = open_events(trainer)
    trainer.add(RunEvents(config.logging.log_interval))
    trainer.add(lock)
    _prepare_saves(trainer)
    if config.optimizer.ema_decay:
        trainer.add(WeightAverage(config.optimizer, optimizer.main))
    if trainer.config.model.peft == "adalora":
        trainer.add(RankBudget(trainer))
    shape: RateShape = LR_SCHEDULES.get(config.optimizer.lr_decay_style)
    asked = getattr(OBJECTIVES.get(config.training.objective), "callbacks", ())
    for name in dict.fromkeys((*shape.callbacks, *asked, *config.stages.callbacks, *config.training.callbacks)):
        trainer.add(CALLBACKS.get(name)(trainer))
    _load(trainer)
    check_end(trainer.config.training.train_iters, trainer.progress)
    if hasattr(trainer.objective, "prepare"):
        trainer.objective.prepare(trainer.config, model, ctx, trainer.tokenizer)
    if (samples := asked_for(config, tokenizer, ctx)) is not None:
        trainer.add(samples)
    for line in described(trainer.config, data, trainer.progress):
        print_rank_0(line)
    goes_on = config.checkpoint.load is not None and not config.checkpoint.finetune and not config.training.skip_train
    from_iteration = trainer.iteration if goes_on else None
    sinks = together(ctx, lambda: _sinks(config, from_iteration) if ctx.is_first_rank else [])
    together(ctx, lambda: tell_others(trainer, sinks) if ctx.is_first_rank else None)
    trainer.add(MetricsWriter(sinks))
    return trainer


def _prepare_saves(trainer: Trainer) -> None:
    """What encrypts checkpoints, writes them while steps go on, copies them, and keeps snapshots in memory."""
    config, ctx = trainer.config, trainer.ctx
    if config.checkpoint.encrypt_checkpoints:
        trainer.key = agreed_key(ctx)
    trainer.replica = together(ctx, lambda: replica_of(config.checkpoint.save_replica))
    if (replica := trainer.replica) is not None:
        from_first_rank(ctx, replica.check)
    if config.checkpoint.async_save and config.checkpoint.save is not None:
        trainer.background = BackgroundSave(ctx, config.parallel.distributed_timeout_minutes, events=trainer.events)
    trainer.snapshots = snapshot_store(config, ctx)


def _load(trainer: Trainer) -> None:
    """Fills ``trainer`` from ``--load``, where there is something; tells from where."""
    flags, path = trainer.config.checkpoint, None
    if flags.load is not None or flags.pretrained_checkpoint is not None:
        with trainer.events.timed("load") as told:
            path = load_run(trainer)
            check_loaded(trainer, path)
            told.update(step=trainer.iteration, **of_checkpoint(trainer, path))
            if path is not None:
                weights_only = flags.finetune or trainer.iteration == 0  # the latter: --pretrained-checkpoint
                told.update(directory=os.path.abspath(path.parent), weights_only=weights_only)
                told.update(tier="memory" if in_memory(trainer, path) else "durable")
        anew = f"--load {flags.load}: nothing was saved there yet, so the run starts anew"
        print_rank_0(f"loading {path}" if path else anew)
    if trainer.snapshots is not None:
        trainer.add(Snapshots.of(trainer, trainer.snapshots, path))
    follow_skips(trainer)


def _check_rule(name: str, optimizer: Optimizer, ctx: ParallelContext) -> None:
    """
    Raises:
        UserError: on every rank: the update rule takes nothing of this model.
    """
    rule: type[UpdateRule] = UPDATE_RULES.get(name)
    takes = {rule.takes(main.spec) for main in optimizer.main.trained}
    if set().union(*exchange(ctx, takes)) == {False}:
        raise UserError(
            f"--optimizer {name}: it takes no parameter of this model, and leaves all to --optimizer {rule.others}; "
            "write that, or look at what --converters do"
        )


def build_model_chunks(config: Config, ctx: ParallelContext, plan: PipelinePlan) -> HybridModel | ModelChunks:
    """This rank's stages of the model, not yet initialised."""
    layer = make_layer_context(
        config.model,
        ctx,
        sequence_parallel=config.parallel.sequence_parallel,
        dtype=compute_dtype(config.training),
        cp_comm_type=config.parallel.cp_comm_type,
        overlap_tp_comm=config.parallel.overlap_tp_comm,
        recompute=config.parallel.recompute,
        backends=config.training.backends,
        sequence_checkpoint=config.parallel.sequence_checkpoint,
    )
    return build_model(layer, plan)


def _open_data(config: Config, tokenizer: Tokenizer | None) -> DataSource:
    data = augmented(source_kind(config.data).open(config, tokenizer), config, tokenizer)
    for notice in data.notices:
        print_rank_0(notice)
    if config.data.eod_mask_loss and not data.eod_mask_loss:
        raise UserError(
            f"--eod-mask-loss: the source of --data-path {' '.join(config.data.data_path)} does not do that"
        )
    watched = config.training.early_stopping_metric
    if config.training.eval_iters and watched == "bits_per_byte" and data.bytes_per_token("valid") is None:
        raise UserError(
            "--early-stopping-metric bits_per_byte: a dataset without its .json description knows no bytes; "
            "use --early-stopping-metric loss"
        )
    return data


# Those that change how weights are updated, in their order; each knows from the flags whether it is asked for.
_OF_UPDATES = (
    SecondStage,
    Quantization,
    Calibration,
    ClipSearch,
    PlateauBoost,
    ReduceOnSpike,
    QKClip,
    GrowingDecay,
    DecoupledRate,
)
# What is seen, and when the run ends.
_OTHERS = (
    *(Norms, Penalties, Digests, ManualCollection, FinalTest, SkipTrain, FaultSteps),
    *(Stragglers, MachineRoom, BalanceBatch, SpikeRollback),
)


def _callbacks(config: Config, progress: Progress, advice: Advice | None) -> list[Callback]:
    training, checkpoint, data = config.training, config.checkpoint, progress.data
    leaving = interval(config, data, "training.exit_interval")
    speed = Speed(config.logging.log_interval)
    memory = MemoryLimit(config.parallel.memory_limit, config.logging.log_interval, advice)
    callbacks: list[Callback] = [speed, memory]
    if leaving:
        epochs = config.length.exit_interval_epochs
        flag = f"--exit-interval {leaving.iterations}" if epochs is None else f"--exit-interval-epochs {epochs:g}"
        callbacks.append(ExitInterval(leaving, flag))
    callbacks += [asked for kind in (*_OF_UPDATES, *_OTHERS) if (asked := kind.of(config)) is not None]
    callbacks.append(ConsoleLog(config.logging.log_interval, speed))
    if training.eval_iters:
        callbacks.append(Evaluation(interval(config, data, "training.eval_interval")))
        callbacks.append(EarlyStopping(training.early_stopping_metric, training.early_stopping_patience))
    if checkpoint.save is not None:
        callbacks.append(Checkpointing(save_interval(config, progress), Retention.of(checkpoint)))
    stage = ComplianceStage.of(config)
    if (output := Phase6Output.of(config, stage)) is not None:
        callbacks += [output] if stage is None else [stage, output]
    if (receipt := Receipt.of(config)) is not None:
        callbacks.append(receipt)
    if config.logging.profile:
        callbacks.append(Profile(config.logging))
    return callbacks


def save_interval(config: Config, progress: Progress) -> Interval:
    """When checkpoints are due: ``--save-interval``, or ten times in the run. Where they are kept by their evaluation,
    at a multiple of its interval, so that they have one."""
    if config.checkpoint.save_interval is not None or config.length.save_interval_epochs is not None:
        return interval(config, progress.data, "checkpoint.save_interval")
    tenth = max(1, -(-config.training.train_iters // 10))
    evaluation = interval(config, progress.data, "training.eval_interval")
    if not (config.checkpoint.keep_best and config.training.eval_iters and evaluation):
        return Interval(tenth)
    if evaluation.tokens:
        return Interval(tokens=ceil(progress.at(tenth)[0] / evaluation.tokens) * evaluation.tokens)
    return Interval(ceil(tenth / evaluation.iterations) * evaluation.iterations)


def _sinks(config: Config, iteration: int | None) -> list[MetricSink]:
    """The sinks that the flags of the logging section name, to go on after ``iteration`` (None: a new run)."""
    logging, sinks = config.logging, list[MetricSink]()
    described = config_to_dict(config)
    if logging.metrics_file is not None:
        sinks.append(JsonlSink(logging.metrics_file, iteration))
    if logging.tensorboard_dir is not None:
        sinks.append(TensorBoardSink(logging.tensorboard_dir, iteration, described))
    if logging.wandb_project is not None:
        where = (logging.wandb_save_dir, logging.wandb_entity)
        sinks.append(WandbSink(logging.wandb_project, logging.run_name, described, *where))
    if logging.mlflow_experiment is not None:
        sinks.append(MlflowSink(logging.mlflow_experiment, logging.run_name, described))
    for notice in (getattr(sink, "notice", None) for sink in sinks):
        if notice is not None:
            print_rank_0(notice)
    return sinks

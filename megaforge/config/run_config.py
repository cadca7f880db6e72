"""How a model is trained: layout, data, loop, checkpoints, logs. One dataclass a component."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.activation_config import ActivationConfig
from megaforge.config.backend_config import BackendConfig
from megaforge.config.batch_schedule import parse_steps
from megaforge.config.expert_logging_config import ExpertLoggingConfig
from megaforge.config.fields import flag
from megaforge.config.reading_config import ReadingConfig
from megaforge.errors import UserError
from megaforge.registry import CALLBACKS, DEVICES, LOSS_TERMS, OBJECTIVES, SCHEDULES


def default_expert_tensor_parallel_size(tp: int, ep: int, stage_ranks: int) -> int:
    """The tensor parallelism of experts that nobody chose: the largest divisor of ``tp`` that leaves room for ``ep``
    among the ranks of a pipeline stage; 1 where none does."""
    return next((etp for etp in range(tp, 0, -1) if tp % etp == 0 and stage_ranks % (etp * ep) == 0), 1)


@dataclass(frozen=True)
class ParallelConfig(ActivationConfig):
    """The layout: it changes nothing but speed."""

    tensor_model_parallel_size: int = flag(1, "ranks that share each matrix", aliases=("--tp",), least=1, most=1 << 20)
    pipeline_model_parallel_size: int = flag(1, "pipeline stages", aliases=("--pp",), least=1, most=1 << 20)
    virtual_pipeline_model_parallel_size: int | None = flag(
        None,
        "stages on each pipeline rank (default: the fewest of the schedule, 2 for interleaved and zb-v, else 1)",
        aliases=("--vpp",),
        least=1,
        most=100_000,
    )
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None,
        "blocks of a stage, another way to say --vpp: blocks / pp / this",
        least=1,
        most=100_000,
    )
    pipeline_schedule: str | None = flag(
        None,
        "order of forward and backward passes (default: 1f1b, or interleaved with --vpp above 1)",
        choices=SCHEDULES,
    )
    context_parallel_size: int = flag(1, "ranks that share each sequence", aliases=("--cp",), least=1, most=1 << 20)
    cp_comm_type: str = flag(
        "allgather",
        "how attention gets other --cp ranks' keys and values: all at once, or in a ring (p2p) that never holds all",
        choices=("allgather", "p2p"),
    )
    expert_model_parallel_size: int = flag(1, "ranks that share the experts", aliases=("--ep",), least=1, most=1 << 20)
    expert_tensor_parallel_size: int | None = flag(
        None,
        "ranks that share each expert's matrices (default: the largest divisor of --tp that leaves room for --ep among "
        "the ranks of a pipeline stage)",
        aliases=("--etp",),
        least=1,
        most=1 << 20,
    )
    sequence_parallel: bool = flag(
        False, "shard norms and the residual stream over the sequence within tp", aliases=("--sp",)
    )
    recompute: str = flag(
        "none",
        "what is computed again in the backward pass instead of kept: full: every block; selective: attention's and "
        "RWKV-7's mixing of tokens; moe: the mixture-of-experts FFNs",
        choices=("none", "full", "selective", "moe"),
    )
    cpu_offload_activations: bool = flag(
        False, "keep what the backward pass needs in host memory (GPUs; slow, and it fits what nothing else fits)"
    )
    overlap_grad_reduce: bool = flag(True, "reduce gradient buckets while the backward pass still runs")
    overlap_tp_comm: bool = flag(
        True, "reduce gradients over tp ranks while weight gradients are computed (not with zero-bubble schedules)"
    )
    ddp_bucket_size: int = flag(25_000_000, "elements of a gradient bucket", least=1)
    zero_stage: int = flag(
        0,
        "what is sharded over data-parallel ranks: 1 masters and moments of the optimizer, 2 gradients too, reduced "
        "after every micro-batch",
        choices=(0, 1, 2),
        aliases=("--zero",),
    )
    zero_quantized_gather: bool = flag(
        False,
        "with --zero and --quantize-weights, gather packed codes of updated matrices (ternary: 2 bits) in place of "
        "weights",
    )
    overlap_param_gather: bool = flag(True, "with --zero, gather updated parameters while the next forward pass runs")
    grad_reduce_in_bf16: bool = flag(False, "sum gradients over data-parallel ranks in bfloat16 instead of fp32")
    grad_compression: str = flag(
        "none",
        "what data-parallel ranks send of gradients, losses made up for in the next step; other than none, the layout "
        "changes what is learned",
        choices=("none", "bf16", "powersgd"),
    )
    grad_compression_rank: int = flag(4, "rank of the factors of --grad-compression powersgd", least=1)
    distributed_backend: str = flag(
        "auto", "process-group backend; auto is nccl on GPUs and gloo on CPUs", choices=("auto", "gloo", "nccl", "mpi")
    )
    world_size: int | None = flag(
        None, "ranks that this configuration is meant for; a run of any other number is refused", least=1, most=1 << 24
    )
    layout: str = flag(
        "given",
        "auto: the fastest layout that the ranks at hand have room for is chosen, beside what is given of it",
        choices=("given", "auto"),
    )
    machine: str | None = flag(
        None,
        "with --layout auto or --micro-batch-size auto: the device to plan for, in place of the one found: a name of "
        "plan.py memory --gpu, or a file of plan.py detect",
        metavar="NAME|FILE",
    )
    memory_limit: float = flag(
        0.9,
        "share of a rank's memory that --layout auto or --micro-batch-size auto fill at most; above it a run warns",
        above=0,
        most=1,
    )
    distributed_timeout_minutes: float = flag(
        30.0, "minutes after which a collective that does not end aborts the run", above=0
    )

    @property
    def seq_len_divisor(self) -> int:
        """What ``--seq-length`` must be divisible by: cp ranks share a sequence in 2 cp equal chunks, and
        ``--sequence-parallel`` cuts what a rank holds over tp."""
        chunks = 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1
        return chunks * (self.tensor_model_parallel_size if self.sequence_parallel else 1)

    def expert_tensor_size(self, world_size: int) -> int:
        """``--etp`` on ``world_size`` ranks: as given, or :func:`default_expert_tensor_parallel_size`."""
        if self.expert_tensor_parallel_size is not None:
            return self.expert_tensor_parallel_size
        stage_ranks = world_size // self.pipeline_model_parallel_size
        return default_expert_tensor_parallel_size(
            self.tensor_model_parallel_size, self.expert_model_parallel_size, stage_ranks
        )

    def validate(self) -> None:
        if None not in (self.virtual_pipeline_model_parallel_size, self.num_layers_per_virtual_pipeline_stage):
            raise UserError(
                f"--num-layers-per-virtual-pipeline-stage {self.num_layers_per_virtual_pipeline_stage} and "
                f"--vpp {self.virtual_pipeline_model_parallel_size} say the same thing twice; give one of them"
            )


@dataclass(frozen=True)
class DataConfig(ReadingConfig):
    """What is read, and how documents become samples."""

    data_path: tuple[str, ...] = flag(
        (),
        "dataset prefix, or weight prefix weight prefix ... for a blend; synthetic is --mock-data; stream:FILES "
        "tokenises text as it is read; NAME://... reads a source of --extensions",
        metavar="PREFIX",
    )
    mock_data: bool = flag(False, "random tokens instead of --data-path, to measure speed without a corpus")
    split: str = flag("99,1,0", "train,validation,test shares of every source's documents")
    split_order: str = flag(
        "shuffled",
        "which documents these are: drawn by their numbers, the same for every --seed, or contiguous ranges as in "
        "Megatron",
        choices=("shuffled", "sequential"),
    )
    verify_data: bool = flag(False, "compare whole dataset files with the SHA-256 in their .json before training")
    tokenizer_type: str | None = flag(
        None,
        "what --tokenizer-model holds (default: told from it)",
        choices=("HuggingFaceTokenizer", "SentencePieceTokenizer", "TikTokenizer", "NullTokenizer"),
    )
    tokenizer_model: str | None = flag(
        None,
        "tokenizer.json, SentencePiece or tiktoken file, a directory with one, a model's name in Hugging Face's local "
        "cache, or the vocabulary size of a NullTokenizer",
    )
    vocab_file: str | None = flag(None, "instead of --tokenizer-model: vocab.json of a BPE tokenizer", metavar="FILE")
    merge_file: str | None = flag(None, "with --vocab-file: its merges.txt", metavar="FILE")
    seq_length: int = flag(1024, "tokens of a sample", least=1, most=1 << 31)
    data_lanes: int = flag(
        32,
        "streams each source's documents are dealt out to and read from in turn, so that a batch mixes documents",
        least=1,
        most=1 << 20,
    )
    eod_mask_loss: bool = flag(False, "give no loss to predicting the first token of a document")
    num_workers: int = flag(1, "threads that read samples ahead; 0 reads in the training thread", least=0, most=1024)
    train_data_path: tuple[str, ...] = flag(
        (), "instead of --data-path and --split: datasets that are for training as a whole", metavar="PREFIX"
    )
    valid_data_path: tuple[str, ...] = flag(
        (), "with --train-data-path: the datasets that evaluations read, each by its size", metavar="PREFIX"
    )
    test_data_path: tuple[str, ...] = flag(
        (), "with --train-data-path: those that --eval-test reads, each by its size", metavar="PREFIX"
    )
    data_args_path: str | None = flag(None, "file that holds the words of --data-path", metavar="FILE")
    per_split_data_args_path: str | None = flag(
        None, 'JSON file with the words of all three: {"train": [...], "valid": [...], "test": [...]}', metavar="FILE"
    )

    def validate(self) -> None:
        super().validate()
        if self.mock_data and self.data_path:
            raise UserError(
                f"--mock-data and --data-path {' '.join(self.data_path)} exclude each other; leave out one of them"
            )
        if self.mock_data and self.verify_data:
            raise UserError("--verify-data: --mock-data reads no files, so there is nothing to verify; leave it out")


@dataclass(frozen=True)
class TrainingConfig(BackendConfig):
    """The loop: how long, how large a batch, in which precision, on what."""

    global_batch_size: int | None = flag(
        None, "sequences of one optimizer step (default: micro batch x dp)", least=1, most=1 << 24
    )
    rampup_batch_size: tuple[int, ...] = flag(
        (),
        "START INCREMENT SAMPLES: begin with global batches of START sequences and grow them by INCREMENT, in equal "
        "parts of the first SAMPLES, to --global-batch-size",
        metavar="N",
        least=1,
    )
    train_iters: int = flag(100, "optimizer steps of the run, of whatever batch size", least=0)
    exit_interval: int = flag(
        0, "save and leave after each iteration divisible by this; 0: run to --train-iters", least=0
    )
    exit_duration_in_mins: float | None = flag(
        None,
        "save and leave, with status 0 (--requeue-exit-code), after the step in which the run is this many minutes old",
        above=0,
    )
    seed: int = flag(1234, "seed of initial weights and of the data order", least=0)
    bf16: bool = flag(False, "compute in bfloat16; master weights stay in fp32")
    fp16: bool = flag(False, "compute in float16 with dynamic loss scaling; master weights stay in fp32")
    fp64: bool = flag(False, "compute in float64 (for parity checks)")
    device: str = flag("auto", "where to compute; cuda stands for AMD's GPUs too", choices=DEVICES)
    float32_matmul_precision: str = flag(
        "auto",
        "torch's matmul precision; auto takes 'medium' on a CPU where a self-check shows it exact to 1e-6",
        choices=("auto", "highest", "high", "medium"),
    )
    extensions: tuple[str, ...] = flag(
        (),
        "Python files or modules to import first; each registers parts of its own, such as a layer or an optimizer",
        metavar="FILE.py|MODULE",
    )
    objective: str = flag("next_token", "what is minimised", choices=OBJECTIVES)
    loss_terms: tuple[str, ...] = flag((), "terms to add to the loss, by name", choices=LOSS_TERMS, metavar="NAME")
    callbacks: tuple[str, ...] = flag((), "callbacks to add to the run, by name", choices=CALLBACKS, metavar="NAME")
    deterministic: bool = flag(True, "torch's deterministic algorithms")
    compile: bool = flag(
        False, "torch.compile what blocks do between their products and kernels; the first steps take longer"
    )
    eval_interval: int = flag(0, "iterations between evaluations; 0: only at the end when --eval-iters is set", least=0)
    eval_iters: int = flag(0, "global batches of one evaluation; 0: no evaluation", least=0)
    eval_global_batch_size: int | None = flag(
        None, "sequences of a global batch of evaluations (default: --global-batch-size)", least=1, most=1 << 24
    )
    eval_test: bool = flag(False, "once the run is complete, evaluate the test documents (--split's third share), too")
    early_stopping_patience: int = flag(
        0,
        "evaluations without a better --early-stopping-metric before the run ends; 0: never",
        least=0,
    )
    early_stopping_metric: str = flag(
        "loss", "what early stopping and --keep-best watch", choices=("loss", "perplexity", "bits_per_byte", "accuracy")
    )

    step_batch_size_schedule: tuple[str, ...] = flag(
        (),
        "TOKENS:SIZE TOKENS:SIZE ...: global batches of so many sequences from so many training tokens on (2.4B:320; "
        "K, M, B and T are thousands, millions, ...), the first from 0",
        metavar="T:B",
    )
    skip_train: bool = flag(False, "evaluate what --load holds, and end without a step")
    manual_gc: bool = flag(
        False, "collect Python's garbage on all ranks together, at the start and as below, not wherever it happens"
    )
    manual_gc_interval: int = flag(0, "with --manual-gc: iterations between collections; 0: none", least=0)
    manual_gc_eval: bool = flag(True, "with --manual-gc: collect after each evaluation, too")
    disable_bf16_reduced_precision_matmul: bool = flag(
        False, "GPUs: add up the parts of a bf16 product in fp32 (torch's allow_bf16_reduced_precision_reduction)"
    )

    @property
    def batch_steps(self) -> tuple[tuple[int, int], ...]:
        """(tokens, sequences) of ``--step-batch-size-schedule``: from when on batches are of which size."""
        return parse_steps(self.step_batch_size_schedule)

    @property
    def full_batch_size(self) -> int | None:
        """Sequences of a global batch where it grows no more; None: as the layout has it."""
        steps = self.batch_steps
        return steps[-1][1] if steps else self.global_batch_size

    def validate(self) -> None:
        if self.rampup_batch_size:
            self._check_rampup()
        if self.step_batch_size_schedule:
            self._check_steps()
        if self.bf16 + self.fp16 + self.fp64 > 1:
            raise UserError("--bf16, --fp16 and --fp64 exclude each other; choose one")
        self.check_backends(self.device, self.fp64)

    def _check_steps(self) -> None:
        given, full = f"--step-batch-size-schedule {' '.join(self.step_batch_size_schedule)}", self.full_batch_size
        if self.rampup_batch_size:
            raise UserError(f"{given} and --rampup-batch-size exclude each other; leave out one of them")
        if self.global_batch_size not in (None, full):
            raise UserError(
                f"{given}: its last size is {full}, and --global-batch-size is {self.global_batch_size}; leave that out"
            )

    def _check_rampup(self) -> None:
        given, end = f"--rampup-batch-size {' '.join(map(str, self.rampup_batch_size))}", self.global_batch_size
        if len(self.rampup_batch_size) != 3:
            raise UserError(f"{given}: give three numbers, START INCREMENT SAMPLES, such as 32 32 100000")
        start, increment, _ = self.rampup_batch_size
        if end is None:
            raise UserError(f"{given}: --global-batch-size is missing, the size at which the ramp ends")
        if start >= end or (end - start) % increment:
            raise UserError(
                f"{given}: steps of {increment} from {start} on do not lead to --global-batch-size {end}; use a START "
                "below it and an INCREMENT that divides the difference"
            )


@dataclass(frozen=True)
class LoggingConfig(ExpertLoggingConfig):
    """What the run says about itself, and where."""

    log_interval: int = flag(10, "iterations between console lines", least=1)
    metrics_file: str | None = flag(
        None,
        "JSONL: one object a step and one an evaluation, appended to what earlier runs wrote there",
        metavar="FILE",
    )
    tensorboard_dir: str | None = flag(None, "TensorBoard event files", metavar="DIR")
    wandb_project: str | None = flag(None, "Weights & Biases project (needs the extra 'track')")
    mlflow_experiment: str | None = flag(None, "MLflow experiment (needs the extra 'track')")
    run_name: str | None = flag(None, "name of the run in trackers")
    log_level: str = flag(
        "info",
        "how much the run says: from warning on, no line for its iterations",
        choices=("debug", "info", "warning", "error"),
        aliases=("--logging-level",),
    )
    log_file: str | None = flag(
        None, "append what rank 0 says, with times; with {rank} in its name every rank has one", metavar="FILE"
    )
    profile: bool = flag(False, "profile some steps: a trace, and a table of operators")
    profile_step_start: int = flag(10, "profile the steps after this iteration", least=0)
    profile_step_end: int = flag(12, "the last iteration to profile", least=1)
    profile_ranks: tuple[int, ...] = flag((0,), "ranks to profile", least=0)
    profile_dir: str = flag("profile", "where --profile writes", metavar="DIR")
    log_params_norm: bool = flag(False, "record the norm of all trained weights after each step")
    log_num_zeros_in_grad: bool = flag(False, "record how many elements of each step's gradient are 0")
    digest_interval: int = flag(
        0,
        "every N iterations write digests of weights, gradients and blocks' outputs, for tools/compare_runs.py",
        least=0,
    )
    digest_file: str | None = flag(None, "where digests go (default: digests.jsonl in --save)", metavar="FILE")
    wandb_save_dir: str | None = flag(None, "with --wandb-project: where its files are kept", metavar="DIR")
    wandb_entity: str | None = flag(None, "with --wandb-project: the user or team that the run belongs to")

    def validate(self) -> None:
        if self.profile_step_end <= self.profile_step_start:
            raise UserError(
                f"--profile-step-end {self.profile_step_end}: must be above --profile-step-start "
                f"{self.profile_step_start}"
            )
        if not self.profile_ranks:
            raise UserError("--profile-ranks: give at least one rank, such as 0")

"""The layout changes nothing but speed: a training run at any layout, compared with the same run on one rank.

Everything is the trainer's own: model, data order, reduction, clipping, optimizer. Noise on all weights keeps every
gradient busy, documents are packed, and the labels that count are uneven over samples, so that every normalisation
shows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from megaforge.data.indexed_dataset import IndexedDatasetWriter, optimal_dtype
from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel
from megaforge.models.parameter_count import declared_parameters
from megaforge.models.prepared_run import check_run
from megaforge.models.stages import ModelChunks
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import optimizer_shard
from megaforge.parallel.init_rules import Normal
from megaforge.parallel.layer_context import compute_dtype, make_layer_context
from megaforge.parallel.param_spec import main_grad_of, named_specs
from megaforge.training.callbacks import Callback
from megaforge.training.metrics import StepMetrics
from megaforge.training.setup import build_trainer, make_context
from megaforge.training.trainer import Trainer
from megaforge.verification.parity_layouts import ParityLayout

KINDS = ("loss", "gradient", "norm", "router", "weights")
TOLERANCE = {"fp64": 1e-10, "fp32": 2e-5}
STEPS, GLOBAL_BATCH, VOCABULARY = 5, 8, 512
RUN = 8  # tokens of one kind in a row
# Enough to make every gradient count, not so much that rounding in fp32 grows beyond the tolerance in five steps.
NOISE = Normal(0.05)
_NUMBERS = ("loss", "norm", "load balance", "z-loss")  # in front of the tokens of each expert


def write_documents(prefix: str, vocabulary: int, runs: bool = False) -> str:
    """A small dataset of short documents and long ones, the same wherever it is written; returns ``prefix``.

    With ``runs`` every second long document is made of runs of one token: alike keys and alike choices of experts show
    what no random text does. In fp32 some gradients of such text are nothing but rounding, at any layout.
    """
    rng = np.random.default_rng(7)
    with IndexedDatasetWriter(prefix, optimal_dtype(vocabulary)) as writer:
        for number in range(200):
            length = int(rng.integers(1, 6) if number // 4 % 2 else rng.integers(10, 60))
            # A counter with noise can be learned, so the loss moves.
            counter = (np.arange(length) + rng.integers(0, vocabulary)) * 3 + rng.integers(0, 2, length)
            repeats = runs and number // 4 % 2 == 0 and number % 2 == 0
            writer.add_document((np.repeat(counter, RUN)[:length] if repeats else counter) % vocabulary)
    return prefix


def parity_config(
    data_path: str, dtype: str, layout: ParityLayout | None, flags: Sequence[str] = (), name: str = "parity"
) -> Config:
    """The run to compare: a few steps of the configuration ``name`` with ``flags`` on top, laid out by ``layout``;
    None is the reference on one rank.

    Raises:
        UserError: a flag is wrong, or ``layout`` cannot carry this model; needs no process group.
    """
    micro_batch = GLOBAL_BATCH if layout is None else GLOBAL_BATCH // 2
    batch = ("--global-batch-size", str(GLOBAL_BATCH), "--micro-batch-size", str(micro_batch))
    packed = ("--eod-mask-loss", "--data-lanes", "1", "--num-workers", "0")
    exact = ("--float32-matmul-precision", "highest", *(("--fp64",) if dtype == "fp64" else ()))
    run = ("--train-iters", str(STEPS), "--eval-iters", "0", "--data-path", data_path, "--split", "100,0,0")
    place = () if layout is None else layout.flags
    argv = ["--config", name, *batch, *packed, *exact, *flags, *run, *place]
    config = parse_config(argv, prog="parity").config
    if config.model.vocab_size is None:
        config = parse_config([*argv, "--vocab-size", str(VOCABULARY)], prog="parity").config
    if config.checkpoint.save or config.checkpoint.load or compute_dtype(config.training).itemsize < 4:
        raise UserError("parity compares fresh runs in fp32 or fp64: leave out --save, --load, --bf16 and --fp16")
    check_run(config, 1 if layout is None else layout.ranks)
    return config


@dataclass
class Record:
    """What a run did. In a run on one rank every tensor is whole; at a layout it is what the rank holds.

    Attributes:
        numbers: float64 [steps, n]: loss, gradient norm, load-balance loss, z-loss, and the tokens of each expert in
            each layer.
        gradients: of each step, clipped, by parameter.
        weights: at the end, by parameter; the routers' state too.
    """

    numbers: list[list[float]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


class Recorder(Callback):
    """Fills a :class:`Record`."""

    def __init__(self) -> None:
        self.record = Record()

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        experts = [count for layer in trainer.tokens_per_expert.tolist() for count in layer]
        losses = [metrics.extra[name] if experts else 0.0 for name in ("load_balance_loss", "z_loss")]
        self.record.numbers.append([metrics.loss, metrics.grad_norm, *losses, *experts])
        trained = [(spec.name, p) for spec, p in named_specs(trainer.model) if p.requires_grad]
        self.record.gradients.append({name: main_grad_of(p).clone() for name, p in trained})


def train(config: Config, ctx: ParallelContext) -> tuple[HybridModel | ModelChunks, Record]:
    """The whole run on this rank. Collective."""
    trainer = build_trainer(check_run(config, ctx.world.size), ctx)
    _add_noise(trainer.model, ctx, config.training.seed)
    recorder = Recorder()
    trainer.callbacks[:] = [recorder]
    trainer.train()
    recorder.record.weights = {spec.name: p.detach() for spec, p in named_specs(trainer.model)}
    return trainer.model, recorder.record


@torch.no_grad()
def _add_noise(model: HybridModel | ModelChunks, ctx: ParallelContext, seed: int) -> None:
    """The same global noise at every layout. Parameters this wide are their own masters, so it reaches those too."""
    for spec, parameter in named_specs(model):
        for piece in spec.pieces(ctx):
            noise = NOISE.fill(seed, f"noise of {spec.name}", spec.shape, piece.global_box)
            piece.local_view(parameter).add_(noise.to(parameter))


@functools.lru_cache(maxsize=2)
def one_rank(config: Config, device: torch.device) -> Record:
    """The reference."""
    return train(config, ParallelContext.single(device))[1]


@dataclass(frozen=True)
class Comparison:
    """How far a rank, or all ranks of a layout together, are from the reference.

    Attributes:
        worst: by kind, the largest relative difference and where it is: of a number over the reference's, of a tensor
            in the norm, over the norm of the reference's whole tensor; the worst of all steps.
        held: the parameters of which there was a part.
    """

    worst: dict[str, tuple[float, str]]
    held: frozenset[str]

    def agrees(self, dtype: str) -> bool:
        return all(error <= TOLERANCE[dtype] for error, _ in self.worst.values())


def compare(config: Config, reference_config: Config, device: torch.device) -> Comparison:
    """Trains at the layout of ``config`` and compares this rank's numbers, and its part of every tensor, with the
    reference, which rank 0 computes. Collective over the default process group, if there is one."""
    ctx = make_context(config, device)
    reference = _spread(one_rank(reference_config, device) if ctx.is_first_rank else None, reference_config, ctx)
    model, found = train(config, ctx)
    worst = dict.fromkeys(KINDS, (0.0, ""))

    def take(kind: str, error: float, where: str) -> None:
        if not error <= worst[kind][0]:
            worst[kind] = (math.inf if math.isnan(error) else error, where)

    for step, (ours, theirs) in enumerate(zip(found.numbers, reference.numbers, strict=True), 1):
        named = zip(("loss", "norm", "router", "router"), _NUMBERS, ours, theirs, strict=False)
        for kind, what, one, other in named:
            take(kind, _relative(abs(one - other), abs(other)), f"{what} of step {step}")
        experts, expected = torch.tensor(ours[len(_NUMBERS) :]), torch.tensor(theirs[len(_NUMBERS) :])
        moved = float((experts - expected).abs().sum())
        take("router", _relative(moved, float(expected.sum())), f"tokens per expert of step {step}")
        for name, error in _differences(model, ctx, found.gradients[step - 1], reference.gradients[step - 1]):
            take("gradient", error, f"{name}, step {step}")
    for name, error in _differences(model, ctx, found.weights, reference.weights):
        take("weights", error, name)
    return Comparison(worst, frozenset(found.weights))


def _differences(
    model: HybridModel | ModelChunks, ctx: ParallelContext, found: dict[str, Tensor], expected: dict[str, Tensor]
) -> Iterator[tuple[str, float]]:
    """(name, relative difference) of what this rank holds of each tensor: all of its shard, or a share of that."""
    for spec, parameter in named_specs(model):
        if spec.name not in found:
            continue
        local, whole = found[spec.name], expected[spec.name].double()
        held = spec if local.shape == parameter.shape else optimizer_shard(parameter)
        squares = 0.0
        for piece in held.pieces(ctx):
            theirs = whole[tuple(slice(start, stop) for start, stop in piece.global_box)]
            squares += float((piece.local_view(local).double() - theirs).square().sum())
        yield spec.name, _relative(math.sqrt(squares), float(whole.norm()))


def _relative(difference: float, size: float) -> float:
    return difference / size if size else math.inf if difference else 0.0


def _spread(record: Record | None, config: Config, ctx: ParallelContext) -> Record:
    """Rank 0's record on every rank."""
    model = HybridModel(make_layer_context(config.model, ParallelContext.single("meta")))
    declared = [(spec.name, spec.shape, p.requires_grad) for spec, p in named_specs(model)]
    trained = [(name, shape) for name, shape, trains in declared if trains]
    layout = [*(trained * STEPS), *((name, shape) for name, shape, _ in declared)]
    count = len(_NUMBERS) + model.num_moe_layers * model.most_experts
    if record is None:
        numbers = torch.empty((STEPS, count), dtype=torch.float64, device=ctx.device)
        size = sum(math.prod(shape) for _, shape in layout)
        flat = torch.empty(size, dtype=compute_dtype(config.training), device=ctx.device)
    else:
        numbers = torch.tensor(record.numbers, dtype=torch.float64, device=ctx.device)
        ordered = [*(step[name] for step in record.gradients for name, _ in trained)]
        flat = torch.cat([tensor.reshape(-1) for tensor in [*ordered, *(record.weights[n] for n, _, _ in declared)]])
    if ctx.world.group is not None:
        dist.broadcast(numbers, 0, group=ctx.world.group)
        dist.broadcast(flat, 0, group=ctx.world.group)
    pieces = iter(flat.split([math.prod(shape) for _, shape in layout]))
    gradients = [{name: next(pieces).view(shape) for name, shape in trained} for _ in range(STEPS)]
    return Record(numbers.tolist(), gradients, {name: next(pieces).view(shape) for name, shape, _ in declared})


def combined(comparisons: Iterable[Comparison], config: Config) -> Comparison:
    """The worst of all ranks. A parameter that no rank holds differs without bound."""
    parts = list(comparisons)
    worst = {kind: max((part.worst[kind] for part in parts), key=lambda pair: pair[0]) for kind in KINDS}
    held = frozenset().union(*(part.held for part in parts))
    missing = [name for name in declared_parameters(config.model) if name not in held]
    if missing:
        worst["weights"] = (math.inf, f"{missing[0]} is on no rank")
    return Comparison(worst, held)

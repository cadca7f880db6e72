"""ZeRO changes nothing: every stage at every dp, ep and tp against one rank that shares nothing out.

Compared on every rank: losses, gradient norms, the rank's part of every gradient, and of weights, masters and moments
after three steps. Sizes are odd, so that slices cut through parameters and buckets end in padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaforge.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from megaforge.config.model_config import ModelConfig
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.optim import Optimizer, bucket_policy, clip_gradients
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.data_parallel import GradientReducer
from megaforge.parallel.flat_shard import FlatShard, optimizer_shard
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.init_rules import Normal
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megaforge.parallel.mappings import (
    gather_from_sequence_parallel,
    reduce_from_tensor_parallel,
    reduce_scatter_to_sequence_parallel,
)
from megaforge.parallel.param_spec import ParamSpec, make_parameter, name_parameters, named_specs
from megaforge.parallel.zero import ShardedParameters
from megaforge.registry import load_extensions
from tests.nn.support import perturb

TOY = Path(__file__).parents[1] / "toys" / "centred_descent.py"  # its update needs whole matrices

BATCH, STEPS, LEARNING_RATE = 4, 3, 1e-2
HIDDEN, INNER, EXPERTS, WIDTH = 7, 10, 4, 6


class Experts(nn.Module):
    """A stack of experts, split over ep and etp: each ep rank computes its own for the tokens of all of them."""

    def __init__(self, ctx: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.ctx = ctx
        up = ParamSpec("experts.up", (EXPERTS, WIDTH, HIDDEN), Normal(0.5), shard_dim=1, shard_axis="etp", expert_dim=0)
        down = ParamSpec(
            "experts.down", (EXPERTS, HIDDEN, WIDTH), Normal(0.5), shard_dim=2, shard_axis="etp", expert_dim=0
        )
        router = ParamSpec(
            "experts.router", (EXPERTS, HIDDEN), Normal(0.5), keep_fp32=True, tp_partial_grad=True, kind="router"
        )
        self.up, self.down = make_parameter(up, ctx, dtype), make_parameter(down, ctx, dtype)
        self.router = make_parameter(router, ctx, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[n, h] inside the tp region -> [n, h], partial over tp."""
        gates = F.linear(x.to(self.router.dtype), self.router).softmax(-1).to(x.dtype)
        own = self.up.shape[0]
        tokens = gather_from_sequence_parallel(x, self.ctx.ep)
        gates = gather_from_sequence_parallel(gates, self.ctx.ep).narrow(1, self.ctx.ep.rank * own, own)
        inner = torch.tanh(torch.einsum("nh,efh->nef", tokens, self.up))
        return reduce_scatter_to_sequence_parallel(torch.einsum("nef,ehf,ne->nh", inner, self.down, gates), self.ctx.ep)


class Small(nn.Module):
    """A fused column layer with biases, a row layer, vectors of all kinds, a scalar, experts and a frozen matrix."""

    def __init__(self, ctx: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        layer = make_layer_context(ModelConfig(), ctx, dtype=dtype)
        self.region = layer.region
        init = Normal(0.5)
        self.column = ColumnParallelLinear(layer, HIDDEN, 2 * INNER, init=init, bias=True, parts=(INNER, INNER))
        self.row = RowParallelLinear(layer, INNER, HIDDEN, init=init, bias=True)
        self.mix = make_parameter(ParamSpec("mix", (HIDDEN,), Normal(1.0), tp_partial_grad=True), ctx, dtype)
        self.scale = make_parameter(ParamSpec("scale", (), Normal(1.0), keep_fp32=True, weight_decay=False), ctx, dtype)
        self.experts = Experts(ctx, dtype)
        self.frozen = make_parameter(ParamSpec("frozen", (HIDDEN, HIDDEN), init), ctx, dtype).requires_grad_(False)
        name_parameters(self)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.column(self.region.enter(x) * self.mix).chunk(2, dim=-1)
        x = F.linear(x + self.row(torch.tanh(gate) * up), self.frozen)
        x = x + self.region.exit(self.experts(self.region.enter(x)))
        return (x * self.scale).square().mean()  # in fp32 at least: the scale is


@dataclass(frozen=True)
class Layout:
    world: int
    zero: int
    tp: int = 1
    ep: int = 1
    etp: int | None = None
    overlap: bool = True
    bucket_size: int = 150
    optimizer: str = "adam"

    def __str__(self) -> str:
        shape = f"{self.optimizer}-zero{self.zero}-world{self.world}-tp{self.tp}-ep{self.ep}"
        return f"{shape}-{'overlap' if self.overlap else 'after'}-bucket{self.bucket_size}"

    def context(self) -> ParallelContext:
        return ParallelContext.create(tp=self.tp, ep=self.ep, etp=self.etp)


@dataclass
class Outcome:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)  # masters and moments by checkpoint key
    weights: dict[str, Tensor] = field(default_factory=dict)  # in the model's type


class Run:
    """A model with its reducer and optimizer, as the trainer makes them."""

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        self.ctx, self.dtype = layout.context(), dtype
        self.model = Small(self.ctx, dtype)
        initialize_parameters(self.model, self.ctx, seed=5)
        perturb(self.model, self.ctx, 0.1)
        size, overlap = layout.bucket_size, layout.overlap
        load_extensions((str(TOY),))
        config = OptimizerConfig(optimizer=layout.optimizer)
        self.shards = (
            ShardedParameters(self.model, self.ctx, bucket_size=size, overlap=overlap, policy=bucket_policy(config))
            if layout.zero
            else None
        )
        self.optimizer = Optimizer(config, self.model, self.ctx, self.shards)
        self.reducer = GradientReducer(
            self.model,
            self.ctx,
            bucket_size=size,
            overlap=overlap,
            shards=self.shards,
            free_buffers=layout.zero == 2,
        )

    def loss(self, sample: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 * step + sample)
        x = torch.randn(5, HIDDEN, generator=generator, dtype=torch.float64)
        loss: Tensor = self.model(x.to(self.dtype))
        return loss

    def backward(self, step: int) -> float:
        """One micro-batch a sample; the global batch does not depend on the layout."""
        self.reducer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        own = range(self.ctx.dp.rank, BATCH, self.ctx.dp.size)
        for sample in own:
            self.reducer.set_last_microbatch(sample == own[-1])
            loss = self.loss(sample, step) / BATCH
            loss.backward()
            total += loss.detach().double()
        self.reducer.finish_grad_sync()
        return float(reduce_from_tensor_parallel(total, self.ctx.dp))

    def train(self) -> Outcome:
        found = Outcome()
        for step in range(STEPS):
            found.losses.append(self.backward(step))
            trained = [(s.name, p) for s, p in named_specs(self.model) if p.requires_grad]
            if step == 0:
                found.gradients = {name: p.main_grad.clone() for name, p in trained}  # type: ignore[attr-defined]
            found.norms.append(clip_gradients(self.model, self.ctx, 0.3))
            self.optimizer.step(LEARNING_RATE)
        self.optimizer.wait_for_parameters()
        found.state = {key: tensor.clone() for key, _, tensor in self.optimizer.entries()}
        found.weights = {spec.name: p.detach().clone() for spec, p in named_specs(self.model)}
        return found

    def parts(self, found: Outcome) -> Iterator[tuple[str, str, Tensor, tuple[slice, ...]]]:
        """(field of Outcome, key, own piece, where it lies globally) of everything that this rank holds."""
        for spec, parameter in named_specs(self.model):
            held = optimizer_shard(parameter)
            states = [f"optimizer.{state}.{spec.name}" for state in ("exp_avg", "exp_avg_sq", "momentum")]
            for kind, key, local, declared in (
                ("weights", spec.name, found.weights[spec.name], spec),
                ("gradients", spec.name, found.gradients.get(spec.name), held),
                *(("state", key, found.state.get(key), held) for key in (spec.name, *states)),
            ):
                for piece in declared.pieces(self.ctx) if local is not None else ():
                    where = tuple(slice(a, b) for a, b in piece.global_box)
                    yield kind, key, piece.local_view(local), where


def run_alone(dtype: torch.dtype, optimizer: str = "adam") -> Outcome:
    return Run(Layout(1, 0, optimizer=optimizer), dtype).train()


def differences(layout: Layout, dtype: torch.dtype, expected: Outcome) -> dict[str, float]:
    """The largest error of everything on this rank, relative to the largest value of its tensor."""
    run = Run(layout, dtype)
    found = run.train()
    errors: dict[str, float] = {}
    for step in range(STEPS):
        errors[f"loss {step}"] = abs(found.losses[step] / expected.losses[step] - 1)
        errors[f"norm {step}"] = abs(found.norms[step] / expected.norms[step] - 1)
    for what, key, own, where in run.parts(found):
        whole = getattr(expected, what)[key]
        assert own.dtype == whole.dtype, key
        error = float((own - whole[where]).abs().max() / whole.abs().max())
        errors[f"{what} {key}"] = max(errors.get(f"{what} {key}", 0.0), error)
    return errors


def worst(results: list[dict[str, float]], what: str = "") -> tuple[float, str]:
    return max((error, key) for errors in results for key, error in errors.items() if key.startswith(what))


SMALL_LAYOUTS = [
    Layout(1, 1),
    Layout(1, 2),
    Layout(2, 1, overlap=False),
    Layout(2, 2, ep=2),
    Layout(4, 1, ep=2),
    Layout(4, 2, ep=4, bucket_size=10_000),
    Layout(4, 1, bucket_size=1),
    Layout(4, 2, tp=2, overlap=False),
    Layout(4, 2, tp=2, ep=2, etp=2),
    Layout(2, 1, optimizer="centred"),
    Layout(4, 2, optimizer="centred", overlap=False),
    Layout(4, 1, tp=2, optimizer="centred"),
]


@pytest.mark.parametrize("layout", SMALL_LAYOUTS, ids=str)
def test_every_stage_trains_the_same_model(ranks, layout: Layout) -> None:
    expected = run_alone(torch.float64, layout.optimizer)
    assert min(expected.norms) > 0.3, "clipping must be at work"
    assert all(bool(gradient.any()) for gradient in expected.gradients.values())
    error, where = worst(ranks.run(layout.world, differences, layout, torch.float64, expected))
    assert error < 1e-12, where


@pytest.mark.parametrize("layout", [Layout(2, 1), Layout(4, 2)], ids=str)
def test_masters_of_16_bit_parameters_are_sharded_and_agree(ranks, layout: Layout) -> None:
    """Micro-batches are the same everywhere, so only sums in fp32 differ; a weight may round the other way."""
    expected = run_alone(torch.bfloat16)
    assert expected.state["column.weight"].dtype == torch.float32
    assert expected.weights["column.weight"].dtype == torch.bfloat16
    results = ranks.run(layout.world, differences, layout, torch.bfloat16, expected)
    assert worst(results, "gradients")[0] < 1e-6
    assert worst(results)[0] < 5e-3
    assert worst(results, "norm 0")[0] < 1e-6


def numbers(layout: Layout) -> tuple[Outcome, int]:
    run = Run(layout, torch.float32)
    return run.train(), sum(t.numel() for _, _, t in run.optimizer.state_entries())


def test_overlap_changes_no_bit(ranks) -> None:
    for zero in (0, 1, 2):
        with_overlap, without = (
            ranks.run(2, numbers, Layout(2, zero, ep=2, overlap=overlap)) for overlap in (True, False)
        )
        for (one, _), (other, _) in zip(with_overlap, without, strict=True):
            assert (one.losses, one.norms) == (other.losses, other.norms)
            for key, tensor in (one.state | one.weights).items():
                assert torch.equal(tensor, (other.state | other.weights)[key]), key


def test_moments_are_shared_out_without_remainder(ranks) -> None:
    """All ranks together keep each moment once (with experts over ep), whatever the padding."""
    whole = numbers(Layout(1, 0))[1]
    for layout in (Layout(4, 1), Layout(4, 2, ep=2)):
        kept = [count for _, count in ranks.run(4, numbers, layout)]
        assert sum(kept) == whole
        assert max(kept) < 0.5 * whole


def memory_between_microbatches(zero: int) -> tuple[int, int]:
    """Full gradient buffers alive in front of the second micro-batch, and parameters' own gradients."""
    run = Run(Layout(2, zero), torch.float32)
    run.reducer.zero_grad()
    run.reducer.set_last_microbatch(False)
    run.loss(0, 0).backward()
    run.reducer.set_last_microbatch(True)
    alive = sum(gradients.full is not None for lane in run.reducer._bucket_groups for gradients in lane.gradients)
    return alive, sum(p.grad is not None for p in run.model.parameters())


def test_stage_2_frees_gradients_between_micro_batches(ranks) -> None:
    for alive, own in ranks.run(2, memory_between_microbatches, 2):
        assert (alive, own) == (0, 0)
    assert ranks.run(2, memory_between_microbatches, 1)[0][0] > 2


def norm_with_a_bad_value(zero: int, name: str) -> float:
    run = Run(Layout(4, zero, ep=2), torch.float32)
    if run.ctx.world.rank == 3:
        parameter = next(p for spec, p in named_specs(run.model) if spec.name == name)
        with torch.no_grad():
            parameter.view(-1)[-1] = float("nan")
    run.backward(0)
    return clip_gradients(run.model, run.ctx, 1.0)


@pytest.mark.parametrize("zero", [1, 2])
def test_one_bad_value_is_seen_by_every_rank(ranks, zero: int) -> None:
    for name in ("row.bias", "experts.down"):
        assert all(norm != norm for norm in ranks.run(4, norm_with_a_bad_value, zero, name))


class PastTheHooks(Small):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.column.weight).square().mean()  # the module `column` is never called


def train_past_the_hooks(wait: bool) -> str:
    ctx = ParallelContext.create()
    model = PastTheHooks(ctx, torch.float32)
    initialize_parameters(model, ctx, seed=5)
    shards = ShardedParameters(model, ctx)
    optimizer = Optimizer(OptimizerConfig(), model, ctx, shards)
    reducer = GradientReducer(model, ctx, shards=shards)
    del model._forward_pre_hooks[next(iter(model._forward_pre_hooks))]  # nor does the model wait for its vectors
    try:
        for _ in range(2):
            reducer.zero_grad()
            model(torch.ones(2, HIDDEN)).backward()
            reducer.finish_grad_sync()
            optimizer.step(0.1)
            if wait:
                optimizer.wait_for_parameters()
    except RuntimeError as error:
        return str(error)
    finally:
        optimizer.wait_for_parameters()
        reducer.finish_grad_sync()
    return ""


def test_reading_parameters_before_they_arrived_is_an_error(ranks) -> None:
    for message in ranks.run(2, train_past_the_hooks, False):
        assert message.startswith("column.weight was used before its new values were waited for")
    assert ranks.run(2, train_past_the_hooks, True) == ["", ""]


def a_gradient_too_late() -> str:
    run = Run(Layout(2, 1), torch.float32)
    run.reducer.zero_grad()
    run.reducer.set_last_microbatch(True)
    run.loss(0, 0).backward()
    try:
        run.loss(1, 0).backward()
    except RuntimeError as error:
        return str(error)
    finally:
        run.reducer.finish_grad_sync()
    return ""


def test_a_gradient_after_its_bucket_was_sent_is_an_error(ranks) -> None:
    assert all("got a gradient after its bucket was sent" in text for text in ranks.run(2, a_gradient_too_late))


class Chunk(nn.Module):
    """One virtual stage: a matrix of its own and one that all stages share."""

    def __init__(self, ctx: ParallelContext, number: int, shared: nn.Parameter) -> None:
        super().__init__()
        spec = ParamSpec(f"own.{number}", (HIDDEN, HIDDEN), Normal(0.5))
        self.own, self.shared = make_parameter(spec, ctx, torch.float64), shared

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.own) @ self.shared


def train_chunks(zero: int) -> tuple[dict[str, Tensor], list[int], int]:
    """Two chunks whose last micro-batches come at different times, as in a pipeline; two steps over four samples.
    Weights, buckets sent after each chunk's last, and the most full buffers that lived between backward passes."""
    ctx = ParallelContext.create()
    tied = make_parameter(ParamSpec("tied", (HIDDEN, HIDDEN), Normal(0.5)), ctx, torch.float64)
    chunks = [Chunk(ctx, number, tied) for number in range(2)]
    model = nn.ModuleList(chunks)
    initialize_parameters(model, ctx, seed=5)
    shards = ShardedParameters(chunks, ctx) if zero else None
    optimizer = Optimizer(OptimizerConfig(), model, ctx, shards)
    reducer = GradientReducer(chunks, ctx, shards=shards, free_buffers=zero == 2)
    sent_before_the_end, alive = [], 0
    for step in range(2):
        reducer.zero_grad()
        own = range(ctx.dp.rank, BATCH, ctx.dp.size)
        for number in (1, 0):  # all of one chunk's micro-batches, then all of the other's
            for sample in own:
                reducer.set_last_microbatch(sample == own[-1], chunk=number)
                alive = max(alive, sum(g.full is not None for one in reducer._bucket_groups for g in one.gradients))
                generator = torch.Generator().manual_seed(100 * step + sample)
                x = torch.randn(5, HIDDEN, generator=generator, dtype=torch.float64)
                chunks[number](x).square().mean().backward()
            sent_before_the_end.append(sum(lane.sent for lane in reducer._bucket_groups))
        reducer.finish_grad_sync()
        clip_gradients(model, ctx, 0.1)
        optimizer.step(LEARNING_RATE)
    optimizer.wait_for_parameters()
    return {spec.name: p.detach().clone() for spec, p in named_specs(model)}, sent_before_the_end, alive


def test_chunks_are_sent_each_at_its_own_end_and_what_they_share_at_the_last(ranks) -> None:
    expected, _, _ = train_chunks(0)
    for zero in (0, 1, 2):
        for found, sent, alive in ranks.run(2, train_chunks, zero):
            assert sent == [1, 1, 1, 1] if zero == 2 else sent == [1, 2, 1, 2]
            assert alive == (0 if zero == 2 else 3), "full buffers between backward passes"
            for name, weight in expected.items():
                torch.testing.assert_close(found[name], weight, rtol=1e-12, atol=1e-13)


def save_trained(directory: Path, layout: Layout) -> dict[str, Tensor]:
    run = Run(layout, torch.bfloat16)
    state = run.train().state
    entries = run.optimizer.entries()
    save_checkpoint(directory, 1, entries, run.optimizer.state(), run.ctx)
    return state


def load_and_save(source: Path, target: Path | None, layout: Layout) -> tuple[dict[str, Tensor], list[str]]:
    """What a fresh run holds after loading ``source``, and which parameters are not their rounded masters."""
    run = Run(layout, torch.bfloat16)
    entries = run.optimizer.entries()
    for _, _, tensor in entries:
        tensor.fill_(float("nan"))
    meta = load_checkpoint(source / "step_0000001", entries, run.ctx)
    run.optimizer.load_state(meta)
    run.optimizer.after_load()
    run.optimizer.wait_for_parameters()
    if target is not None:
        save_checkpoint(target, 1, entries, run.optimizer.state(), run.ctx)
    wrong = [spec.name for spec, p in named_specs(run.model) if bool(p.isnan().any())]
    for (name, held, master), (_, p) in zip(run.optimizer.weight_entries(), named_specs(run.model), strict=True):
        local = p.detach().view(-1)[held.start : held.stop] if isinstance(held, FlatShard) else p.detach()
        if not torch.equal(master.to(p.dtype), local):
            wrong.append(name)
    return {key: tensor.clone() for key, _, tensor in run.optimizer.entries()}, wrong


@pytest.mark.parametrize("layout", [Layout(4, 2, ep=2), Layout(4, 1, tp=2)], ids=str)
def test_checkpoints_move_between_stages_to_the_bit(ranks, tmp_path: Path, layout: Layout) -> None:
    """Sharded over four ranks -> one rank without ZeRO -> back: masters and both moments, element for element."""
    before = ranks.run(4, save_trained, tmp_path / "sharded", layout)
    alone, wrong = load_and_save(tmp_path / "sharded", tmp_path / "alone", Layout(1, 0))
    assert not wrong and not any(bool(tensor.isnan().any()) for tensor in alone.values())
    plain, wrong = load_and_save(tmp_path / "alone", None, Layout(1, 0))
    assert all(torch.equal(tensor, plain[key]) for key, tensor in alone.items())
    after = ranks.run(4, load_and_save, tmp_path / "alone", None, layout)
    for old, (new, wrong) in zip(before, after, strict=True):
        assert not wrong
        assert old.keys() == new.keys()
        for key, tensor in old.items():
            assert torch.equal(tensor, new[key]), key
    other = ranks.run(2, load_and_save, tmp_path / "sharded", tmp_path / "other", Layout(2, 1, bucket_size=37))
    assert not other[0][1] and not other[1][1]
    again, _ = load_and_save(tmp_path / "other", None, Layout(1, 2))
    for key, tensor in alone.items():
        assert torch.equal(tensor.view(-1), again[key].view(-1)), key
